"""Detokenizer: its outputs joined are `decode`, and no output shows half a character."""

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from puna.tokenizer import Detokenizer, load_tokenizer


@pytest.fixture(
    scope="module", params=["llama2-json", "llama2", "llama3-json", "llama3", "stories"]
)
def tok(request, shared_data, tmp_path_factory):
    name, _, is_json = request.param.partition("-")
    if name == "stories":
        return load_tokenizer(shared_data / "stories260K" / "meta")
    source = shared_data / "tokenizers" / name
    if is_json:
        return load_tokenizer(source)
    directory = tmp_path_factory.mktemp(name)
    (directory / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    return load_tokenizer(directory)


def pieces(tok, ids, skip_special=True):
    detokenizer = Detokenizer(tok, skip_special)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_ids(tok, data):
    near_start = st.integers(0, min(600, tok.vocab_size + 5))  # byte and control tokens
    anywhere = st.integers(-1, tok.vocab_size + 5)
    ids = data.draw(st.lists(near_start | anywhere, max_size=40))
    for skip_special in (True, False):
        assert "".join(pieces(tok, ids, skip_special)) == tok.decode(ids, skip_special)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("😀👩‍👧🏽🇫é中 \n"), max_size=40))
@example(text="<|begin_of_text|>a")
@example(text="<s>a<s>")
def test_random_text(tok, text):
    shown = pieces(tok, tok.encode(text))
    if tok.adds_bos:  # one that is written out is the BOS, which is not shown
        text = text.removeprefix(tok.token_bytes(tok.bos_token_id, skip_special=False).decode())
    expected = text.replace("\u2581", " ") if tok.codec.strips_space else text
    assert "".join(shown) == expected
    assert shown[-1] == ""  # a complete text holds nothing back
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def test_leading_space(tok):
    for text in ("a", " a", "  a", "", " ", "\n a"):
        assert "".join(pieces(tok, tok.encode(text))) == text


def test_cut_character_comes_at_the_end(tok):
    ids = tok.encode("😀", add_bos=False)[:-1]
    shown = pieces(tok, ids)
    assert not any(shown[:-1])
    assert shown[-1] == "\ufffd" == tok.decode(ids).removeprefix(" ")


def test_a_detokenizer_can_be_used_again(tok):
    detokenizer = Detokenizer(tok)
    for _ in range(2):
        ids = tok.encode("Hi 😀")
        assert "".join([*map(detokenizer.add, ids), detokenizer.finish()]) == "Hi 😀"


def test_work_per_token_does_not_grow(tok):
    """What is held back is never more than the start of one character."""
    rng = random.Random(0)
    detokenizer = Detokenizer(tok)
    for _ in range(500):
        detokenizer.add(rng.randrange(tok.vocab_size))
        held, _ = detokenizer._decoder.getstate()
        assert len(held) <= 3
