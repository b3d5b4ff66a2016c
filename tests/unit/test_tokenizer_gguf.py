"""The tokenizer inside a GGUF: small made-up vocabularies, and the refusals."""

import json

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import load_tokenizer
from puna.tokenizer.gguf import tokenizer_files_from_gguf
from puna.tokenizer.gguf_pre import PRE_TOKENIZERS
from puna.tokenizer.hf import CHAR_BYTES


def keys(**values):
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def bpe(pre="smollm", **more):
    """Bytes, digit pairs and a few words; three control tokens and a user-defined one."""
    words = ["12", "123", "ap", "app", "Ġapp", "00"]
    merges = ["1 2", "12 3", "a p", "ap p", "Ġ app", "0 0"]
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<tool>"]
    tokens = [*CHAR_BYTES, *words, *special]
    types = [1] * (len(tokens) - 4) + [3, 3, 3, 4]
    bos = tokens.index("<|im_start|>")
    return {
        **keys(model="gpt2", pre=pre, tokens=tokens, token_type=types, merges=merges),
        **keys(bos_token_id=bos, eos_token_id=bos + 1),
        **keys(**more),
    }


def spm(**more):
    """An SPM vocabulary with a user-defined token, as fine-tunes of Llama 2 have them."""
    pieces = ["▁", "a", "b", "▁a", "ab", "▁ab", "<|im_start|>", "<|im_end|>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * 6 + [4, 3]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return {
        **keys(model="llama", tokens=tokens, token_type=types, scores=scores),
        **keys(**more),
    }


def load(tmp_path, metadata):
    for name, data in tokenizer_files_from_gguf(metadata).items():
        (tmp_path / name).write_bytes(data)
    return load_tokenizer(tmp_path)


def cut(tok, text):
    return [tok.decode([i]) for i in tok.encode(text, add_bos=False)]


def test_smollm_splits_every_digit(tmp_path):
    tok = load(tmp_path, bpe("smollm"))
    assert cut(tok, "123 app 00") == ["1", "2", "3", " app", " ", "0", "0"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["123", " app", " ", "00"]),
        ("llama-bpe", ["123", " app", " ", "00"]),
        ("qwen2", ["1", "2", "3", " app", " ", "0", "0"]),
        ("default", ["123", " app", " ", "00"]),
        ("tekken", ["1", "2", "3", " app", " ", "0", "0"]),
        ("deepseek-coder", ["1", "2", "3", " app", " ", "0", "0"]),
    ],
)
def test_pre_tokenizers(tmp_path, pre, expected):
    assert cut(load(tmp_path, bpe(pre)), "123 app 00") == expected


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_rule_keeps_the_text(tmp_path, pre):
    tok = load(tmp_path, bpe(pre))
    text = "It's 12,345 naïve APPs\n\n  x\t中文 한국어 😀!? $a+b=c^~|` end "
    assert tok.decode(tok.encode(text)) == text


def test_gguf_without_rule_is_default(tmp_path):
    metadata = bpe()
    del metadata["tokenizer.ggml.pre"]
    assert cut(load(tmp_path, metadata), "123 app") == ["123", " app"]


def test_bos_rule(tmp_path):
    assert not load(tmp_path, bpe("smollm")).adds_bos
    assert load(tmp_path, bpe("llama-bpe")).adds_bos
    assert not load(tmp_path, bpe("llama-bpe", add_bos_token=False)).adds_bos
    tok = load(tmp_path, bpe("smollm", add_bos_token=True))
    assert tok.encode("app")[0] == tok.bos_token_id


def test_control_and_user_defined_tokens(tmp_path):
    tok = load(tmp_path, bpe())
    start, tool = tok.codec.token_id("<|im_start|>"), tok.codec.token_id("<tool>")
    assert start not in tok.encode("<|im_start|>app")
    assert tok.encode("<|im_start|>app", parse_special=True)[0] == start
    assert tok.encode("app<tool>")[-1] == tool
    assert tok.decode([start, tool]) == "<tool>"
    assert tok.eos_token_ids == (start + 1,)


def test_sentencepiece_vocabulary(tmp_path):
    tok = load(tmp_path, spm())
    assert (tok.bos_token_id, tok.vocab_size) == (1, 267)
    assert tok.eos_token_ids == (2, 266)
    piece = tok.codec.token_id
    assert tok.encode("ab") == [1, piece("▁ab")]
    assert tok.encode("é\n") == [1, piece("▁"), 0xC3 + 3, 0xA9 + 3, 0x0A + 3]
    # A space prefix follows a user-defined token too, as in llama.cpp; control text stays text.
    assert tok.encode("ab<|im_start|>ab") == [1, piece("▁ab"), piece("<|im_start|>"), piece("▁ab")]
    assert piece("<|im_end|>") not in tok.encode("<|im_end|>")
    assert tok.encode("<|im_end|>", parse_special=True) == [1, piece("<|im_end|>")]
    assert tok.decode([1, piece("▁ab"), piece("<|im_start|>"), 2]) == "ab<|im_start|>"


def test_sentencepiece_without_space_prefix(tmp_path):
    tok = load(tmp_path, spm(add_space_prefix=False))
    assert tok.encode("ab", add_bos=False) == [tok.codec.token_id("ab")]
    assert tok.decode([tok.codec.token_id("▁ab")]) == " ab"


def test_chat_template(tmp_path):
    metadata = bpe() | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    assert load(tmp_path, metadata).chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(tmp_path, "other").chat_template == "other"


def test_empty_and_undecodable_tokens(tmp_path):
    metadata = bpe()
    metadata["tokenizer.ggml.tokens"] += ["", "\udcff\udcfe"]
    metadata["tokenizer.ggml.token_type"] += [5, 1]
    assert load(tmp_path, metadata).vocab_size == len(metadata["tokenizer.ggml.tokens"])


def test_no_tokenizer_inside():
    assert tokenizer_files_from_gguf({}) == {}
    assert tokenizer_files_from_gguf(keys(model="no_vocab")) == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (keys(model="bert"), "model 'bert'"),
        (keys(model="t5"), "model 't5'"),
        (keys(model="rwkv"), "model 'rwkv'"),
        (keys(model=3), "model 3"),
        (bpe("deepseek-llm"), "'deepseek-llm'"),
        (bpe(["smollm"]), "pre-tokenizer"),
        (bpe(merges=[]), "no merges"),
        (bpe(merges=["a zz"]), "merge 0 is 'a zz'"),
        (bpe(merges=["ab"]), "merge 0"),
        (bpe(merges=[7]), "not all of them are text"),
        (bpe(tokens=["a", "a"]), "must all differ"),
        (bpe(tokens=[]), "must all differ"),
        (bpe(tokens=None), "cannot be read"),
        (bpe(token_type=[1]), "token types"),
        (bpe(add_bos_token="yes"), "true or false"),
        (spm(scores=[0.0]), "scores"),
        (spm(scores=[float("nan")] * 267), "scores"),
        (bpe() | {"tokenizer.chat_template": "\udcff"}, "chat template"),
    ],
)
def test_refusals(metadata, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_files_from_gguf(metadata)
    assert "\n" not in str(caught.value)


def test_smollm2(tmp_path, smollm2_gguf):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm2_gguf).fields
    metadata = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    tok = load(tmp_path, metadata)
    assert cut(tok, "12345 apples") == ["1", "2", "3", "4", "5", " apples"]
    assert (tok.vocab_size, tok.bos_token_id, tok.eos_token_ids) == (49152, 1, (2, 0))
    assert not tok.adds_bos
    ids = tok.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert tok.decode(ids, skip_special=False).endswith(
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tok.bos_token_id) == 3
    assert json.loads((tmp_path / "tokenizer_config.json").read_bytes())["add_bos_token"] is False
