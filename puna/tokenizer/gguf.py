"""The tokenizer inside a GGUF, written out as the files of an ordinary tokenizer.

Runs once, at build time: byte-level BPE becomes `tokenizer.json`, a sentencepiece vocabulary
becomes the protobuf `tokenizer.model` again, and the rest goes to tokenizer_config.json. Decides
what llama.cpp decides when it loads the same metadata; it reads no GGUF and encodes no text.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer.config import END_TOKENS
from puna.tokenizer.gguf_pre import PRE_TOKENIZERS, PreTokenizer

# Types of a token; GGUF took the numbers from sentencepiece's protobuf.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKENS = 2**22
MAX_SCORE = 2.0**127  # scores are float32
MERGE_HINT = "the file is damaged, so get it again or pass --tokenizer DIR"


def tokenizer_files_from_gguf(metadata: Mapping[str, object]) -> dict[str, bytes]:
    """Return {file name: bytes} for the tokenizer in `metadata`; {} if it holds none.

    TokenizerError if the tokenizer is damaged, or of a kind that puna cannot run exactly.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return {}
    if model not in ("llama", "gpt2"):
        raise TokenizerError(
            f"the GGUF has a tokenizer of model {model!r:.80}; puna reads 'llama' and 'gpt2', so "
            "pass --tokenizer DIR with tokenizer.json or tokenizer.model"
        )
    vocabulary = _Vocabulary.read(metadata, is_sentencepiece=model == "llama")
    if model == "llama":
        name, data = "tokenizer.model", _sentencepiece_model(vocabulary, metadata)
        adds_bos = True
    else:
        name, data = "tokenizer.json", _tokenizer_json(vocabulary, metadata)
        adds_bos = _pre_tokenizer(metadata).adds_bos
    _check(name, data)
    config = {
        "add_bos_token": _flag(metadata, "add_bos_token", adds_bos),
        "bos_token": vocabulary.text(vocabulary.bos),
        "eos_token": vocabulary.text(vocabulary.eos[0] if vocabulary.eos else None),
        "eos_token_ids": vocabulary.eos,
        "chat_template": _chat_template(metadata),
        "added_tokens_decoder": {
            str(i): {"content": vocabulary.tokens[i], "special": False}
            for i, kind in enumerate(vocabulary.types)
            if kind == USER_DEFINED
        },
    }
    stated = {key: value for key, value in config.items() if value is not None}
    return {name: data, "tokenizer_config.json": json.dumps(stated, indent=1).encode()}


@dataclass(frozen=True)
class _Vocabulary:
    """Texts and types of all tokens, checked: texts differ, none is empty, lengths agree."""

    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: list[int]

    @classmethod
    def read(cls, metadata: Mapping[str, object], is_sentencepiece: bool) -> _Vocabulary:
        tokens = [
            token if _is_text(token) and token else f"[UNREADABLE_{i}]"
            for i, token in enumerate(_list(metadata, "tokens", str))
        ]
        if not 0 < len(set(tokens)) == len(tokens):
            raise TokenizerError(
                f"the GGUF's {len(tokens)} tokens have {len(set(tokens))} different texts; they "
                f"must all differ, so {MERGE_HINT}"
            )
        special = {name: _special_id(metadata, name, len(tokens)) for name in _SPECIAL_IDS}
        if is_sentencepiece:  # what the format's first files left unsaid
            for name, token_id in (("unknown", 0), ("bos", 1), ("eos", 2)):
                if special[name] is None and token_id < len(tokens):
                    special[name] = token_id
        types = _types(metadata, tokens)
        if is_sentencepiece:  # it wants exactly one unknown token
            types = [CONTROL if kind == UNKNOWN else kind for kind in types]
            types[special["unknown"] or 0] = UNKNOWN
        ends = [i for i, token in enumerate(tokens) if token in END_TOKENS]
        ends = [i for i in ends if tokens[i] != "</s>" or types[i] == CONTROL]  # else HTML
        for i in ends:  # some converters store them as ordinary text
            types[i] = CONTROL
        eos = [i for name in ("eos", "eot", "eom") if (i := special[name]) is not None]
        return cls(tokens, types, special["bos"], list(dict.fromkeys([*eos, *ends])))

    def text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]


_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown")


def _types(metadata: Mapping[str, object], tokens: list[str]) -> list[int]:
    types = _list(metadata, "token_type", int)
    if types and len(types) != len(tokens):
        raise TokenizerError(
            f"the GGUF has {len(tokens)} tokens but {len(types)} token types; {MERGE_HINT}"
        )
    types = [kind if NORMAL <= kind <= BYTE else UNUSED for kind in types]
    return types or [NORMAL] * len(tokens)


def _tokenizer_json(vocabulary: _Vocabulary, metadata: Mapping[str, object]) -> bytes:
    """Byte-level BPE in Hugging Face's format."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = _list(metadata, "merges", str)
    if not merges:
        raise TokenizerError(f"the GGUF's BPE tokenizer has no merges; {MERGE_HINT}")
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise TokenizerError(
                f"the GGUF's merge {number} is {merge!r:.80}; both parts and their sum must be "
                f"tokens, so {MERGE_HINT}"
            )
    added = [
        {
            "id": i,
            "content": vocabulary.tokens[i],
            "special": kind != USER_DEFINED,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i, kind in enumerate(vocabulary.types)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    pre = _pre_tokenizer(metadata)
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in pre.splits
    ]
    # The byte alphabet alone: "use_regex" would split by GPT-2's rule once more.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    model = {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": pre.ignore_merges}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def _pre_tokenizer(metadata: Mapping[str, object]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")  # as llama.cpp reads files without one
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"the GGUF has the pre-tokenizer {name!r:.80}, which puna does not have; it has "
            f"{', '.join(sorted(PRE_TOKENIZERS))}, so pass --tokenizer DIR with tokenizer.json"
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece_model(vocabulary: _Vocabulary, metadata: Mapping[str, object]) -> bytes:
    """The protobuf that sentencepiece stores: pieces with scores, how to train, how to normalize.

    The scores decide the merges and ties go to the left, in sentencepiece as in llama.cpp.
    """
    scores = _list(metadata, "scores", float)
    if len(scores) != len(vocabulary.tokens) or not all(abs(s) < MAX_SCORE for s in scores):
        raise TokenizerError(
            f"the GGUF has {len(vocabulary.tokens)} tokens and {len(scores)} scores; every token "
            f"needs a finite one, so {MERGE_HINT}"
        )
    pieces = [
        _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind))
        for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
    ]
    trainer = _field(3, 2) + _field(4, len(pieces))  # BPE, vocab_size
    trainer += _field(35, int(BYTE in vocabulary.types))  # byte_fallback
    normalizer = _field(1, b"identity")
    normalizer += _field(3, int(_flag(metadata, "add_space_prefix", True)))
    normalizer += _field(4, 0) + _field(5, 1)  # keep runs of spaces; write a space as U+2581
    return b"".join(pieces) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes(_varint_bytes(value))


def _varint_bytes(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def _check(name: str, data: bytes) -> None:
    """Load what was made, so that a damaged GGUF fails its build and not its first run."""
    from puna.tokenizer.hf import HFCodec
    from puna.tokenizer.sentencepiece_model import SentencePieceCodec

    if name == "tokenizer.json":
        HFCodec.load("the GGUF's tokenizer", data)
    else:
        SentencePieceCodec.load("the GGUF's tokenizer", data, {})


def _chat_template(metadata: Mapping[str, object]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not _is_text(template):
        raise TokenizerError(
            "the GGUF's chat template is not UTF-8 text; pass --chat-template FILE when you run it"
        )
    return template  # pyright: ignore[reportReturnType]


def _flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if value not in (True, False):
        raise TokenizerError(f"the GGUF's {name} is {value!r:.80}; it must be true or false")
    return bool(value)


def _special_id(metadata: Mapping[str, object], name: str, num_tokens: int) -> int | None:
    """An id out of range counts as not stated, as in llama.cpp."""
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    try:
        token_id = -1 if value is None else int(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        token_id = -1
    return token_id if 0 <= token_id < num_tokens else None


def _list(metadata: Mapping[str, object], name: str, kind: type) -> list[Any]:
    """Return an array of the metadata as a list of `kind`; [] if it is not there."""
    values: Any = metadata.get(f"tokenizer.ggml.{name}", [])
    try:
        if len(values) > MAX_TOKENS:
            raise ValueError(f"{len(values)} entries, at most {MAX_TOKENS} are read")
        if kind is str and not all(isinstance(value, str) for value in values):
            raise ValueError("not all of them are text")
        return [kind(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise TokenizerError(
            f"the GGUF's tokenizer.ggml.{name} cannot be read ({error}); {MERGE_HINT}"
        ) from None


def _is_text(value: object) -> bool:
    """Whether `value` is a string without surrogates (which stand for bytes that are not UTF-8)."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False
