"""LLM with a fake session and a byte-like tokenizer: text, stop strings, streams, failures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fake_session import VOCAB_SIZE, FakeSession, fake_logits, one_by_one

import puna.llm
from puna.errors import RequestError
from puna.job import TextStream
from puna.llm import LLM
from puna.runtime.request import SamplingParams
from puna.spec import GenerationDefaults
from puna.tokenizer import Tokenizer

EOS = 30
# Pieces of one to three characters, one that is half a character, and EOS.
PIECES = [
    *(bytes([97 + i]) for i in range(20)),
    *(b"ab", b"bc", b"abc", b" d", "é".encode()[:1], "é".encode()[1:], b"\n", b"the", b"xyz", b"e"),
    b"<eos>",
]
assert len(PIECES) == VOCAB_SIZE


class FakeCodec:
    vocab_size = VOCAB_SIZE
    strips_space = False

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return [byte % 20 for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return PIECES[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id == EOS

    def token_id(self, token: str) -> int | None:
        return None


def fake_tokenizer() -> Tokenizer:
    return Tokenizer(
        FakeCodec(),
        bos_token_id=None,
        eos_token_ids=(EOS,),
        adds_bos=False,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    )


@pytest.fixture
def open_llm(monkeypatch, tmp_path):
    """A function that opens an LLM on a FakeSession."""

    def open_llm(has_tokenizer: bool = True, generation=None, num_blocks=60, **options) -> LLM:
        def open_session(engine_dir, *, max_batch_size=None, max_num_tokens=None, **_):
            return FakeSession(
                num_blocks,
                4,
                max_batch_size or 8,
                64,
                max_num_tokens or 64,
                generation=generation,
                engine_dir=engine_dir,
            )

        monkeypatch.setattr(puna.llm.Session, "open", open_session)
        if has_tokenizer:
            (tmp_path / "tokenizer").mkdir(exist_ok=True)
        monkeypatch.setattr(
            puna.llm, "load_tokenizer", lambda directory, template: fake_tokenizer()
        )
        return LLM(tmp_path, **options)

    return open_llm


def text_of(token_ids) -> str:
    return b"".join(PIECES[i] for i in token_ids if i != EOS).decode("utf-8", "replace")


def test_generate_many_prompts_in_order(open_llm):
    params = SamplingParams(max_new_tokens=12)
    prompts = [f"prompt {i}" for i in range(40)]
    with open_llm() as llm:
        outputs = llm.generate(prompts, params)
        assert llm.executor.is_idle
    for prompt, out in zip(prompts, outputs, strict=True):
        ids = FakeCodec().encode(prompt, False)
        tokens, reason = one_by_one(ids, params, eos=[EOS])
        assert out.prompt_token_ids == tuple(ids)
        assert (list(out.token_ids), out.finish_reason) == (tokens, reason)
        assert out.text == text_of(tokens)
        assert out.logprobs is None


def test_one_prompt_in_every_form(open_llm):
    llm = open_llm()
    ids = FakeCodec().encode("hello", False)
    expected = llm.generate("hello")
    assert len(expected) == 1
    for form in (["hello"], ids, [ids], tuple(ids), np.array(ids), [np.array(ids)]):
        assert llm.generate(form) == expected
    assert llm.generate([]) == []


def test_params_for_each_prompt(open_llm):
    llm = open_llm(generation=GenerationDefaults(eos_token_ids=(1000,)))
    outs = llm.generate(["a", "b"], [SamplingParams(max_new_tokens=i) for i in (3, 5)])
    assert [len(out.token_ids) for out in outs] == [3, 5]
    with pytest.raises(RequestError, match="found 1 sampling parameters for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_n(open_llm):
    llm = open_llm()
    one = llm.generate("hello", SamplingParams(max_new_tokens=9))[0]
    four = llm.generate("hello", SamplingParams(max_new_tokens=9, n=4))[0]
    assert four.completions == one.completions * 4
    assert (four.text, four.token_ids) == (one.text, one.token_ids)
    drawn = llm.generate("hello", SamplingParams(max_new_tokens=9, n=4, temperature=2.0, seed=1))[0]
    assert len({c.token_ids for c in drawn.completions}) == 4


def test_eos_is_not_text_but_a_token(open_llm):
    tokens, _ = one_by_one([1, 2, 3], SamplingParams(max_new_tokens=40))
    stop = next(t for i, t in enumerate(tokens) if i >= 5 and t not in tokens[:i])
    for llm, params in (
        (open_llm(generation=GenerationDefaults(eos_token_ids=(stop,))), SamplingParams()),
        (open_llm(), SamplingParams(stop_token_ids=(stop,), ignore_eos=True)),
    ):
        out = llm.generate([1, 2, 3], params)[0]
        assert out.token_ids == tuple(tokens[: tokens.index(stop) + 1])
        assert out.finish_reason == "stop"
        assert out.text == text_of(out.token_ids[:-1])


@pytest.mark.parametrize("start", range(0, 24, 3))
@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_strings_anywhere(open_llm, start: int, size: int):
    llm = open_llm()
    prompt, params = "some prompt", SamplingParams(max_new_tokens=30, ignore_eos=True)
    whole = llm.generate(prompt, params)[0]
    stop = whole.text[start : start + size]
    cut = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=("never there", stop))
    out = llm.generate([prompt, "other"], [cut, params])[0]
    assert out.text == whole.text[: whole.text.index(stop)]
    assert out.finish_reason == "stop"
    assert out.token_ids == whole.token_ids[: len(out.token_ids)]
    assert stop in text_of(out.token_ids)
    assert stop not in text_of(out.token_ids[:-1])
    assert llm.executor.is_idle
    deltas = list(llm.stream(prompt, cut))
    assert "".join(delta.text for delta in deltas) == out.text
    assert sum((delta.token_ids for delta in deltas), ()) == out.token_ids


def test_stop_string_in_one_of_n(open_llm):
    llm = open_llm()
    params = SamplingParams(max_new_tokens=20, n=6, temperature=2.0, seed=3, ignore_eos=True)
    whole = llm.generate("x", params)[0]
    stop = whole.completions[2].text[3:6]
    out = llm.generate("x", SamplingParams(**{**vars(params), "stop": stop}))[0]
    for before, after in zip(whole.completions, out.completions, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.finish_reason == ("stop" if stop in before.text else "length")
    assert out.completions[2].finish_reason == "stop"


def test_stream_equals_generate(open_llm):
    llm = open_llm()
    for i in range(10):
        params = SamplingParams(max_new_tokens=25, temperature=1.5, seed=i, logprobs=1)
        out = llm.generate(f"p{i}", params)[0]
        deltas = list(llm.stream(f"p{i}", params))
        assert "".join(delta.text for delta in deltas) == out.text
        assert sum((delta.token_ids for delta in deltas), ()) == out.token_ids
        assert sum((delta.logprobs for delta in deltas), ()) == out.logprobs
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [out.finish_reason]
        assert len(out.logprobs) == len(out.token_ids)


def test_interleaved_streams_and_generate(open_llm):
    llm = open_llm()
    params = SamplingParams(max_new_tokens=12)
    expected = [out.text for out in llm.generate(["a", "bb", "ccc"], params)]
    a, b = llm.stream("a", params), llm.stream("bb", params)
    text_a, text_b = next(a).text, next(b).text
    text_c = llm.generate("ccc", params)[0].text
    for delta_a, delta_b in itertools.zip_longest(a, b):
        text_a += delta_a.text if delta_a else ""
        text_b += delta_b.text if delta_b else ""
    assert [text_a, text_b, text_c] == expected


def test_beams(open_llm):
    """Their text ends before the token that ended them; they cannot be streamed."""
    llm = open_llm(generation=GenerationDefaults(eos_token_ids=(EOS, 3, 8, 21)))
    params = SamplingParams(max_new_tokens=12, num_beams=4, n=4)
    found = [c for text in "abcdefgh" for c in llm.generate(text, params)[0].completions]
    assert {c.finish_reason for c in found} == {"stop", "length"}
    for completion in found:
        is_stop = completion.finish_reason == "stop"
        assert (completion.token_ids[-1] in (EOS, 3, 8, 21)) == is_stop
        assert completion.score is not None and completion.logprobs is None
        shown = completion.token_ids[:-1] if is_stop else completion.token_ids
        assert completion.text == text_of(shown)
    with pytest.raises(RequestError, match="num_beams is 4; the best beam is known at the end"):
        llm.stream("a", params=SamplingParams(num_beams=4))


def test_closing_a_stream_aborts_it(open_llm):
    llm = open_llm()
    stream = llm.stream("a")
    next(stream)
    assert not llm.executor.is_idle
    stream.close()
    assert llm.executor.is_idle
    llm.stream("b")  # never begun: nothing runs
    assert llm.executor.is_idle


def test_chat(open_llm):
    llm = open_llm()
    messages = [{"role": "user", "content": "hi"}]
    out = llm.chat(messages, SamplingParams(max_new_tokens=8))
    assert out == llm.generate("user: hi\n", SamplingParams(max_new_tokens=8))[0]
    deltas = list(llm.stream_chat(messages, SamplingParams(max_new_tokens=8)))
    assert "".join(delta.text for delta in deltas) == out.text


@pytest.mark.parametrize("num_prefill", [None, 1, 3, 7])
def test_logits(open_llm, num_prefill):
    llm = open_llm(max_num_tokens=8)
    ids = [5, 4, 3, 2, 1, 0, 9]
    logits = llm.logits(ids, num_prefill)
    assert (logits.shape, logits.dtype) == ((7, VOCAB_SIZE), np.float32)
    np.testing.assert_array_equal(logits, [fake_logits(ids[: i + 1]) for i in range(7)])
    for bad in (0, 8):
        with pytest.raises(RequestError, match="num_prefill"):
            llm.logits(ids, bad)
    with pytest.raises(RequestError, match="empty"):
        llm.logits([])


def test_logits_while_memory_is_short(open_llm):
    """The request for logits is preempted and computes them again from the start."""
    llm = open_llm(num_blocks=8)
    stream = llm.stream([1, 2, 3, 4], SamplingParams(max_new_tokens=24, ignore_eos=True))
    next(stream)
    ids = [i % VOCAB_SIZE for i in range(16)]
    logits = llm.logits(ids, num_prefill=2)
    assert llm.executor.scheduler.num_preemptions > 0
    np.testing.assert_array_equal(logits, [fake_logits(ids[: i + 1]) for i in range(16)])


def test_without_a_tokenizer(open_llm):
    llm = open_llm(has_tokenizer=False)
    out = llm.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))[0]
    assert (out.text, len(out.token_ids)) == ("", 4)
    for call in (
        lambda: llm.generate("text"),
        lambda: llm.stream("text"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: llm.generate([1], SamplingParams(stop="x")),
    ):
        with pytest.raises(RequestError, match=r"no tokenizer.*tokenizer=DIR"):
            call()
    assert open_llm(has_tokenizer=False, tokenizer="elsewhere").generate("text")[0].text


def test_refused_prompts(open_llm):
    llm = open_llm()
    with pytest.raises(RequestError, match=r"lone surrogate U\+D800 at character 1"):
        llm.generate("a\ud800")
    with pytest.raises(RequestError, match="prompt 1: the prompt has token id 31"):
        llm.generate([[1], [31]])
    with pytest.raises(RequestError, match="must be text or token ids"):
        llm.generate(["a", None])
    with pytest.raises(RequestError, match="must be text or token ids"):
        llm.generate(b"abc")
    with pytest.raises(RequestError, match="streaming takes 1"):
        llm.stream("a", SamplingParams(n=2))
    assert llm.executor.is_idle
    assert llm.generate("a")[0].text


def test_a_failing_step_ends_every_request(open_llm):
    llm = open_llm()
    stream = llm.stream("a", SamplingParams(ignore_eos=True))
    next(stream)
    llm.session.fail_at = len(llm.session.plans) + 3
    with pytest.raises(RuntimeError, match="on fire"):
        llm.generate(["b"] * 20)
    assert [delta.finish_reason for delta in stream][-1] == "abort"
    assert llm.executor.is_idle
    assert llm.generate("a")[0].token_ids == open_llm().generate("a")[0].token_ids


def test_close(open_llm):
    llm = open_llm()
    session, stream = llm.session, llm.stream("a")
    next(stream)
    with llm:
        pass
    llm.close()
    assert session.is_closed
    with pytest.raises(RequestError, match="closed"):
        llm.generate("a")
    assert [delta.finish_reason for delta in stream][-1] == "abort"


@pytest.mark.parametrize("stop", [("aab",), ("abab", "ba"), ("aba",), ("b",), ("aaaa", "ab")])
def test_text_stream_never_shows_a_stop_string_nor_holds_text_for_long(stop):
    """Over all short texts: what is shown is the text up to the first stop string, at once."""
    for letters in itertools.product("ab", repeat=7):
        text = "".join(letters)
        stream = TextStream(fake_tokenizer(), stop)
        shown = ""
        ends = [text.find(s) for s in stop if s in text]
        for i, letter in enumerate(letters):
            shown += stream.add("ab".index(letter))
            known = text[: i + 1]
            if stream.is_stopped:
                break
            assert not any(s in known for s in stop)
            held = known[len(shown) :]
            assert known.startswith(shown)
            assert not held or any(s.startswith(held) for s in stop)
        else:
            shown += stream.finish()
            assert shown == text
        if ends:
            assert stream.is_stopped
            known_ends = [known.find(s) for s in stop if s in known]
            assert shown == text[: min(known_ends)]
