"""load_tokenizer: decides which reader a directory needs and joins what its files say.

It knows the file names and the defaults of each kind, not how any of them cuts text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from puna.errors import TokenizerError
from puna.tokenizer.chat import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE
from puna.tokenizer.config import END_TOKENS, TokenizerConfig, read_config
from puna.tokenizer.native import read_file
from puna.tokenizer.tokenizer import Codec, Tokenizer


def load_tokenizer(directory: Path, chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer of an engine's `tokenizer/` folder or of a checkpoint (HF or Meta).

    `chat_template` (Jinja text) takes the place of the directory's own.
    """
    directory = Path(directory)
    config = read_config(directory)
    if chat_template is not None:
        config = replace(config, chat_template=chat_template)
    if (path := directory / "tokenizer.json").exists():
        return _load_hf(path, config)
    if (path := directory / "tokenizer.model").exists():
        return _load_model(path, config)
    raise TokenizerError(
        f"{directory} has no tokenizer (tokenizer.json or tokenizer.model); "
        "pass --tokenizer DIR with one that has"
    )


def _load_hf(path: Path, config: TokenizerConfig) -> Tokenizer:
    from puna.tokenizer.hf import HFCodec

    codec = HFCodec.load(path, read_file(path))
    prefix = codec.prefix_id()
    bos = _token_id(codec, config.bos_token)
    if bos is None:
        bos = prefix
    adds_bos = config.add_bos_token
    if adds_bos is None:  # nothing stated: what the post-processor does
        adds_bos = bos is not None and prefix == bos
    return Tokenizer(
        codec,
        bos_token_id=bos,
        eos_token_ids=_eos_token_ids(codec, config),
        adds_bos=adds_bos,
        chat_template=config.chat_template,
    )


def _load_model(path: Path, config: TokenizerConfig) -> Tokenizer:
    """`tokenizer.model` is a sentencepiece protobuf (Llama 2) or tiktoken ranks (Llama 3)."""
    from puna.tokenizer.sentencepiece_model import SentencePieceCodec
    from puna.tokenizer.tiktoken_model import TiktokenCodec, is_tiktoken

    data = read_file(path)
    if is_tiktoken(data):
        codec = TiktokenCodec.load(path, data)
        template, bos_token = LLAMA3_TEMPLATE, "<|begin_of_text|>"
    else:
        codec = SentencePieceCodec.load(path, data, config.added_tokens)
        template, bos_token = LLAMA2_TEMPLATE, "<s>"
    if config.exists or config.chat_template is not None:
        template = config.chat_template  # a directory that is not Meta's states its own or none
    bos = _token_id(codec, config.bos_token)
    return Tokenizer(
        codec,
        bos_token_id=_token_id(codec, bos_token) if bos is None else bos,
        eos_token_ids=_eos_token_ids(codec, config),
        adds_bos=config.add_bos_token is not False,
        chat_template=template,
    )


def _token_id(codec: Codec, token: str | None) -> int | None:
    return None if token is None else codec.token_id(token)


def _eos_token_ids(codec: Codec, config: TokenizerConfig) -> tuple[int, ...]:
    if config.eos_token_ids:
        return tuple(i for i in config.eos_token_ids if i < codec.vocab_size)
    eos = _token_id(codec, config.eos_token)
    if eos is not None:
        return (eos,)
    ids = (codec.token_id(token) for token in END_TOKENS)
    return tuple(i for i in ids if i is not None and codec.is_special(i))
