"""The small files beside a vocabulary: stated tokens, BOS rules, added tokens, kinds of decoder."""

import json

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import load_tokenizer
from puna.tokenizer.hf import CHAR_BYTES, TokenDecoder


@pytest.fixture
def model(shared_data, tmp_path):
    """A Hugging Face directory of the old kind: tokenizer.model and small JSON files."""
    source = shared_data / "stories260K" / "meta" / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
    return tmp_path


def put(directory, name, data):
    (directory / name).write_text(json.dumps(data))


def test_added_tokens_of_an_old_directory(model):
    plain = load_tokenizer(model)
    put(model, "added_tokens.json", {"<pad>": 512, "<tool>": 513})
    put(model, "special_tokens_map.json", {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"})
    tok = load_tokenizer(model)
    assert (tok.vocab_size, tok.eos_token_ids, tok.bos_token_id) == (514, (2,), 1)
    the_end = plain.encode("The end")
    assert tok.encode("The end<tool>The end") == [*the_end, 513, *the_end[1:]]
    assert 512 not in tok.encode("The end<pad>")
    assert tok.encode("The end<pad>", parse_special=True) == [*the_end, 512]
    assert tok.decode([*the_end, 512, 513]) == "The end<tool>"


def test_added_tokens_of_a_config(model):
    added = {"512": {"content": "<|im_end|>", "special": True}}
    put(model, "tokenizer_config.json", {"added_tokens_decoder": added, "eos_token": "<|im_end|>"})
    tok = load_tokenizer(model)
    assert tok.eos_token_ids == (512,)
    assert tok.decode([512, 411]) == tok.decode([411])


def test_stated_bos_rule_wins(model):
    assert load_tokenizer(model).encode("a")[0] == 1
    put(model, "tokenizer_config.json", {"add_bos_token": False})
    assert 1 not in load_tokenizer(model).encode("a")
    put(model, "tokenizer_config.json", {"add_bos_token": None})
    assert load_tokenizer(model).encode("a")[0] == 1


@pytest.fixture
def byte_level(tmp_path):
    """A tokenizer.json with a byte vocabulary and two special tokens, and no post-processor."""
    vocab = {char: i for i, char in enumerate(CHAR_BYTES)}
    parts = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": 256, "content": "<bos>", "special": True, **flags},
        {"id": 257, "content": "<|eot_id|>", "special": True, **flags},
        {"id": 258, "content": "<né té>", "special": False, **flags},
    ]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    put(
        tmp_path,
        "tokenizer.json",
        {"model": model, "pre_tokenizer": parts, "decoder": parts, "added_tokens": added},
    )
    return tmp_path


def test_tokenizer_json_alone(byte_level):
    tok = load_tokenizer(byte_level)
    assert (tok.bos_token_id, tok.eos_token_ids, tok.adds_bos) == (None, (257,), False)
    assert tok.decode(tok.encode("é<né té>")) == "é<né té>"
    assert tok.encode("<né té>") == [258]


def test_bos_stated_but_not_added(byte_level):
    put(byte_level, "tokenizer_config.json", {"bos_token": {"content": "<bos>"}})
    tok = load_tokenizer(byte_level)
    assert (tok.bos_token_id, tok.adds_bos) == (256, False)
    assert tok.encode("a") == tok.encode("a", add_bos=False)
    put(byte_level, "tokenizer_config.json", {"bos_token": "<bos>", "add_bos_token": True})
    assert load_tokenizer(byte_level).encode("a")[0] == 256


def test_metaspace(shared_data, tmp_path):
    """Newer Llama files state the space prefix as a pre-tokenizer; the ids stay the same."""
    directory = shared_data / "tokenizers" / "llama2"
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    tokenizer |= {"normalizer": None, "pre_tokenizer": {**metaspace, "split": False}}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]}
    put(tmp_path, "tokenizer.json", tokenizer)
    tok, reference = load_tokenizer(tmp_path), load_tokenizer(directory)
    for text in ("Hello world", "two  spaces ", "é\n😀", ""):
        assert tok.encode(text) == reference.encode(text)
        assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "CTC"}]},
        {"type": "Strip", "content": " ", "start": 0, "stop": 1},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    ],
)
def test_decoders_that_do_not_work_by_token(decoder):
    with pytest.raises(TokenizerError, match="decoder"):
        TokenDecoder.from_json(decoder)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer_config.json", [], "JSON object"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "true or false"),
        ("tokenizer_config.json", {"eos_token_ids": [True]}, "list of ids"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "an object"),
        ("added_tokens.json", {"<pad>": -1}, "whole number"),
        ("added_tokens.json", {"<pad>": 10**9}, "whole number"),
    ],
)
def test_refusals(byte_level, name, data, message):
    put(byte_level, name, data)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(byte_level)
