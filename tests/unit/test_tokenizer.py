# ruff: noqa: RUF001 (the texts are meant to be odd)
"""The same vocabulary in every format gives the same ids, and those of transformers."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import load_tokenizer
from puna.tokenizer.gguf import tokenizer_files_from_gguf

SENTENCE = "Born in north-east France, Soyer trained as a"
LLAMA2_IDS = [1, 19298, 297, 6641, 29899, 23027, 3444, 29892, 1105, 7598, 16370, 408, 263]
LLAMA3_IDS = [59204, 304, 10411, 40607, 9822, 11, 2100, 27253, 16572, 439, 264]

# fmt: off
PARTS = [
    "Hello", " world", "HELLO'LL we've", "don't", " ", "  ", " " * 23, "\n", "\r\n", "\n\n \n",
    "\t", "1", "12345", "3.14159", "2,000,000", "٣٤٥", "½", "é", "e\u0301", "naïve café", "ß",
    "Ünïcödé", "日本語のテキスト", "中文，标点。", "한국어", "Привет, мир", "שלום", "العربية",
    "हिन्दी", "ไทย", "😀", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "🇫🇷", "\u00a0", "\u200b",
    "\ufeff", "\u3000", "\u2581", "\u2581\u2581", "\x00", "\x07", "\U0010ffff", "𝔘𝔫𝔦",
    "def f(x):\n    return x**2  # ok\n", "if (a&&b) { c[i]++; }", '{"k": [1, null]}', "<0x0A>",
    "<s", "</p>", "https://a.b/c?d=e&f=g#h", "a@b.co", "...", "!?!", "--", "—“”‘’", "C++", "\\n",
    "x_y_z", "Once upon a time", "the", "ing", "Supercalifragilisticexpialidocious", "A" * 16,
]
# fmt: on


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    mixed = ["".join(rng.choices(PARTS, k=rng.randint(2, 12))) for _ in range(150)]
    return [SENTENCE, "", *PARTS, *mixed]


@pytest.fixture(scope="module")
def hf(shared_data):
    """tokenizer.json by model, loaded once."""
    return {n: load_tokenizer(shared_data / "tokenizers" / n) for n in ("llama2", "llama3")}


@pytest.fixture(scope="module")
def meta(shared_data, tmp_path_factory):
    """tokenizer.model alone by model, as in Meta's directories."""
    loaded = {}
    for name in ("llama2", "llama3"):
        directory = tmp_path_factory.mktemp(name)
        shutil.copy(shared_data / "tokenizers" / name / "tokenizer.model", directory)
        loaded[name] = load_tokenizer(directory)
    return loaded


def ids_of(tok, texts):
    return [tok.encode(text, add_bos=False) for text in texts]


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_known_ids(hf, meta, name):
    expected = LLAMA2_IDS if name == "llama2" else LLAMA3_IDS
    assert hf[name].encode(SENTENCE) == expected  # this Llama 3 tokenizer.json adds no BOS
    with_bos = expected if name == "llama2" else [128000, *expected]
    assert meta[name].encode(SENTENCE) == with_bos
    assert meta[name].encode(SENTENCE, add_bos=False) == with_bos[1:]
    assert meta[name].decode(with_bos) == hf[name].decode(expected) == SENTENCE


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_model_file_equals_tokenizer_json(hf, meta, texts, name):
    assert ids_of(meta[name], texts) == ids_of(hf[name], texts)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_tokenizer_json_equals_transformers(hf, texts, shared_data, name):
    transformers = pytest.importorskip("transformers")
    path = str(shared_data / "tokenizers" / name / "tokenizer.json")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    plain = [text for text in texts if "<s" not in text]
    expected = [reference.encode(text, add_special_tokens=False) for text in plain]
    assert ids_of(hf[name], plain) == expected
    for ids in expected:
        assert hf[name].decode(ids) == reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_round_trip(hf, meta, texts, name):
    for tok in (hf[name], meta[name]):
        for text in texts:
            # Sentencepiece writes a space as U+2581, so it reads one as a space.
            expected = text.replace("\u2581", " ") if name == "llama2" else text
            assert tok.decode(tok.encode(text)) == expected


def write(directory: Path, files: dict[str, bytes]):
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return load_tokenizer(directory)


def test_gguf_of_sentencepiece_equals_original(meta, texts, shared_data, tmp_path):
    spm = pytest.importorskip("sentencepiece").SentencePieceProcessor(
        model_file=str(shared_data / "tokenizers" / "llama2" / "tokenizer.model")
    )
    ids = range(spm.vocab_size())
    types = [
        2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1
        for i in ids
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [spm.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
    }
    tok = write(tmp_path, tokenizer_files_from_gguf(metadata))
    assert ids_of(tok, texts) == ids_of(meta["llama2"], texts)
    assert tok.encode(SENTENCE) == LLAMA2_IDS
    assert (tok.vocab_size, tok.bos_token_id, tok.eos_token_ids) == (32000, 1, (2,))
    assert tok.decode(LLAMA2_IDS) == SENTENCE


def test_gguf_of_bpe_equals_original(hf, texts, shared_data, tmp_path):
    path = shared_data / "tokenizers" / "llama3" / "tokenizer.json"
    source = json.loads(path.read_text(encoding="utf-8"))
    tokens = sorted(source["model"]["vocab"], key=source["model"]["vocab"].__getitem__)
    special = [token["content"] for token in source["added_tokens"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens + special,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * len(special),
        "tokenizer.ggml.merges": source["model"]["merges"],
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128009,
    }
    tok = write(tmp_path, tokenizer_files_from_gguf(metadata))
    assert ids_of(tok, texts) == ids_of(hf["llama3"], texts)
    assert tok.encode(SENTENCE) == [128000, *LLAMA3_IDS]
    assert (tok.vocab_size, tok.eos_token_ids) == (128256, (128009, 128001))


def test_special_tokens_of_llama3(hf, meta):
    assert meta["llama3"].eos_token_ids == (128001, 128008, 128009)
    assert meta["llama3"].vocab_size == hf["llama3"].vocab_size == 128256
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    expected = hf["llama3"].encode(text, parse_special=True)
    assert expected == [128000, 128006, 882, 128007, 271, 13347, 128009]
    assert meta["llama3"].encode(text, parse_special=True) == expected
    assert meta["llama3"].decode(expected, skip_special=False) == text
    assert meta["llama3"].decode(expected) == "user\n\nHi"
    assert meta["llama3"].codec.token_id("<|reserved_special_token_247|>") == 128255


def test_special_tokens_of_llama2(hf, meta):
    text = "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]"
    expected = hf["llama2"].encode(text, parse_special=True)
    assert expected.count(1) == 2
    assert meta["llama2"].encode(text, parse_special=True) == expected


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_special_tokens_in_plain_text_are_characters(hf, meta, kind):
    toks = hf if kind == "hf" else meta
    for name, text in (("llama2", "a</s>b"), ("llama3", "a<|eot_id|>b")):
        tok = toks[name]
        assert not any(map(tok.codec.is_special, tok.encode(text, add_bos=False)))
        assert tok.decode(tok.encode(text)) == text


def test_no_double_bos(hf, meta):
    for tok in (hf["llama2"], meta["llama2"], meta["llama3"]):
        bos = tok.decode([tok.bos_token_id], skip_special=False)
        expected = tok.encode("Hello")
        assert expected[0] == tok.bos_token_id
        assert expected.count(tok.bos_token_id) == 1
        assert tok.encode(bos + "Hello") == expected
        assert tok.encode(bos + "Hello", parse_special=True) == expected
        assert tok.encode("") == [tok.bos_token_id]


def test_long_runs_are_quick(hf, meta):
    start = time.monotonic()
    for text in ("a" * 200_000, " " * 200_000, "\n" * 100_000, "é1!" * 60_000):
        for tok in (hf["llama2"], hf["llama3"], meta["llama2"], meta["llama3"]):
            assert tok.decode(tok.encode(text)) == text
    assert time.monotonic() - start < 30


def test_invalid_unicode(hf, meta):
    for tok in (*hf.values(), *meta.values()):
        with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800 at character 1"):
            tok.encode("a\ud800")


def test_ids_outside_the_vocabulary_decode_to_nothing(hf, meta):
    for tok in (*hf.values(), *meta.values()):
        assert tok.decode([-1, tok.vocab_size, 2**40]) == ""


def test_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="pass --tokenizer DIR"):
        load_tokenizer(tmp_path)


def test_import_is_cheap():
    code = (
        "import sys, puna.tokenizer, puna.tokenizer.gguf\n"
        "names = {'tokenizers', 'sentencepiece', 'tiktoken', 'jinja2', 'transformers', 'gguf'}\n"
        "sys.exit(repr(names & set(sys.modules)) if names & set(sys.modules) else 0)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
