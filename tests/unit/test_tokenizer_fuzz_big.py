"""Damaged tokenizer files: a TokenizerError of one line, or a tokenizer that works; nothing else.

A crash of a native library would end the test run, which is the point.
"""

import base64
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import TokenizerError
from puna.tokenizer import Detokenizer, load_tokenizer
from puna.tokenizer.gguf import tokenizer_files_from_gguf
from puna.tokenizer.hf import CHAR_BYTES

TEXT = "Once upon a time, é 😀 \uff46 12\n\n  <s>x<|eot_id|>"
FUZZ = settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))


def tiktoken_file() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b"on", b" a", b"once", b"\xf0\x9f"]
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


def tokenizer_json() -> dict:
    vocab = {char: i for i, char in enumerate([*CHAR_BYTES, "on", "on" + "c", "Ġa"])}
    added = {"id": len(vocab), "content": "<s>", "single_word": False, "lstrip": False}
    bos = {"<s>": {"id": "<s>", "ids": [len(vocab)], "tokens": ["<s>"]}}
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pattern = {"Regex": r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{**added, "rstrip": False, "normalized": False, "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": bos,
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["o n", "on c", "Ġ a"]},
    }


def tokenizer_config() -> dict:
    return {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "eos_token_ids": [2],
        "add_bos_token": True,
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
        "chat_template": "{{ messages[0]['content'] }}",
    }


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Up to four bytes changed, a range removed or put in, or the end cut off."""
    blob = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(blob)))
        kind = draw(st.sampled_from(["change", "change", "change", "insert", "remove", "cut"]))
        if kind == "cut":
            del blob[start:]
        elif kind == "remove":
            del blob[start : start + draw(st.integers(1, 40))]
        elif kind == "insert":
            blob[start:start] = draw(st.binary(min_size=1, max_size=12))
        else:
            blob[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
    return bytes(blob)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(
        [[], {}, [[]], {"type": "WordPiece"}, {"type": "Metaspace"}, "(a", "\\p{", "▁"]
    ),
)


@st.composite
def other_value(draw, document: dict) -> bytes:
    """One value somewhere in a JSON document replaced or removed."""
    document = json.loads(json.dumps(document))
    node = document
    while True:
        keys = list(range(len(node))) if isinstance(node, list) else list(node)
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        if draw(st.booleans()):
            node[key] = draw(VALUES)
        else:
            del node[key]
        return json.dumps(document).encode()


def exercise(directory):
    """Load and use; whatever is wrong must come as a TokenizerError of one line."""
    message = "none"
    try:
        tok = load_tokenizer(directory)
        for parse_special in (False, True):
            ids = tok.encode(TEXT, parse_special=parse_special)
            assert isinstance(tok.decode(ids, skip_special=False), str)
        detokenizer = Detokenizer(tok)
        ids = range(-1, min(tok.vocab_size, 600) + 2)
        assert "".join([*map(detokenizer.add, ids), detokenizer.finish()]) == tok.decode(ids)
        if tok.chat_template is not None:
            tok.apply_chat_template([{"role": "user", "content": "Hi"}])
    except TokenizerError as error:
        message = str(error)
    assert message
    assert "\n" not in message


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def write(directory, **files):
    for path in directory.iterdir():
        path.unlink()
    for name, data in files.items():
        (directory / name.replace("__", ".")).write_bytes(data)


@FUZZ
@given(data=st.data())
def test_sentencepiece(directory, shared_data, data):
    model = (shared_data / "stories260K" / "meta" / "tokenizer.model").read_bytes()
    write(directory, tokenizer__model=data.draw(damaged(model)))
    exercise(directory)


@FUZZ
@given(blob=damaged(tiktoken_file()))
def test_tiktoken(directory, blob):
    write(directory, tokenizer__model=blob)
    exercise(directory)


@FUZZ
@given(blob=other_value(tokenizer_json()) | damaged(json.dumps(tokenizer_json()).encode()))
def test_tokenizer_json(directory, blob):
    write(directory, tokenizer__json=blob)
    exercise(directory)


@FUZZ
@given(blob=other_value(tokenizer_config()) | damaged(json.dumps(tokenizer_config()).encode()))
def test_tokenizer_config(directory, blob):
    tokenizer = json.dumps(tokenizer_json()).encode()
    for name in ("tokenizer_config__json", "special_tokens_map__json", "added_tokens__json"):
        write(directory, tokenizer__json=tokenizer, **{name: blob})
        exercise(directory)
    write(directory, tokenizer__model=tiktoken_file(), tokenizer_config__json=blob)
    exercise(directory)


@FUZZ
@given(data=st.data())
def test_gguf_metadata(directory, data):
    vocab = tokenizer_json()["model"]["vocab"]
    metadata = {
        "model": data.draw(st.sampled_from(["gpt2", "llama"])),
        "pre": "smollm",
        "tokens": [*vocab, "<0x41>", "<unk>"],
        "token_type": [1] * len(vocab) + [1, 2],
        "scores": [-1.0] * (len(vocab) + 2),
        "merges": ["o n", "on c"],
        "bos_token_id": 3,
        "unknown_token_id": len(vocab) + 1,
    }
    key = data.draw(st.sampled_from(list(metadata)))
    strange = VALUES | st.text(st.characters(), max_size=3)
    if isinstance(metadata[key], list) and data.draw(st.booleans()):
        metadata[key][data.draw(st.integers(0, len(metadata[key]) - 1))] = data.draw(strange)
    else:
        metadata[key] = data.draw(strange)
    write(directory)
    try:
        files = tokenizer_files_from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
        write(directory, **{name.replace(".", "__"): blob for name, blob in files.items()})
    except TokenizerError as error:
        message = str(error)
    else:
        message = "none"
    assert "\n" not in message
    exercise(directory)


def test_undamaged(directory):
    """The files that the tests above damage are sound, and a stored truncation is not applied."""
    write(directory, tokenizer__json=json.dumps(tokenizer_json()).encode())
    tok = load_tokenizer(directory)
    assert tok.decode(tok.encode(TEXT)) == TEXT
    write(directory, tokenizer__model=tiktoken_file())
    tok = load_tokenizer(directory)
    assert tok.decode(tok.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"[" * 100_000, "not a tokenizer that puna can read"),
        (b"null", "not a tokenizer that puna can read"),
    ],
)
def test_messages(directory, data, message):
    write(directory, tokenizer__json=data)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(directory)
