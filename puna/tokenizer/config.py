"""TokenizerConfig: what the small files beside a vocabulary say of it.

Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja, all
of them optional. Decides which of two statements wins; knows no vocabulary and resolves no ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.tokenizer.native import read_json, read_text

# Everything a tokenizer is loaded from; a build stores those that the checkpoint has.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

# End of a turn or a text wherever a vocabulary has them as special tokens and states no others.
END_TOKENS = (
    "</s>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
)

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary: matched in text before anything else is.

    `special` ones only where the caller parses special tokens, and decoding skips them.
    """

    content: str
    special: bool


@dataclass(frozen=True)
class TokenizerConfig:
    """Facts beside the vocabulary; None or empty where the files say nothing."""

    exists: bool = False  # tokenizer_config.json is there: not a directory of Meta's
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()  # written by puna for GGUF vocabularies, which list several
    add_bos_token: bool | None = None
    added_tokens: Mapping[int, AddedToken] = field(default_factory=dict)
    chat_template: str | None = None


def read_config(directory: Path) -> TokenizerConfig:
    """Read what `directory` has of these files; TokenizerError if one is damaged."""
    path = directory / "tokenizer_config.json"
    config = read_json(path)
    names = {**read_json(directory / "special_tokens_map.json"), **config}
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise TokenizerError(f"{path}: add_bos_token is {add_bos!r:.80}; it must be true or false")
    return TokenizerConfig(
        exists=bool(config),
        bos_token=_content(names.get("bos_token")),
        eos_token=_content(names.get("eos_token")),
        eos_token_ids=_ids(path, config.get("eos_token_ids", [])),
        add_bos_token=add_bos,
        added_tokens=_added_tokens(directory, config, names),
        chat_template=_chat_template(directory, config),
    )


def _content(token: Any) -> str | None:
    """A token is stated as its text, or as an object that has the text as `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _ids(path: Path, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise TokenizerError(f"{path}: eos_token_ids is {ids!r:.80}; it must be a list of ids")
    return tuple(ids)


def _added_tokens(
    directory: Path, config: dict[str, Any], names: dict[str, Any]
) -> dict[int, AddedToken]:
    """Old directories list added tokens in a file of their own, newer ones in the config."""
    special = {_content(names.get(name)) for name in SPECIAL_NAMES}
    more = names.get("additional_special_tokens")
    special.update(_content(token) for token in (more if isinstance(more, list) else ()))
    old = read_json(directory / "added_tokens.json")
    new = config.get("added_tokens_decoder", {})
    if not isinstance(new, dict):
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'}: added_tokens_decoder is "
            f"{type(new).__name__}; it must be an object"
        )
    stated = [(token_id, token, token in special) for token, token_id in old.items()]
    stated += [
        (token_id, _content(token), isinstance(token, dict) and token.get("special") is True)
        for token_id, token in new.items()
    ]
    added = {}
    for token_id, content, is_special in stated:
        text = str(token_id)
        if not (text.isascii() and text.isdigit() and len(text) < 10) or content is None:
            raise TokenizerError(
                f"{directory}: added token {content!r:.80} has id {token_id!r:.80}; an added "
                "token needs a text and a whole number, so get the tokenizer again"
            )
        added[int(text)] = AddedToken(content, is_special)
    return added


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'}: chat_template is "
            f"{type(template).__name__}; it must be text or a list of named texts"
        )
    return template
