"""Tokenizer: the one interface to every vocabulary, and the rules that all of them share.

Decides when BOS is added and how bytes become text. How a text is cut into tokens, and which bytes
a token stands for, is the business of a `Codec`, one per file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from puna.errors import TokenizerError
from puna.tokenizer.chat import render_chat


class Codec(Protocol):
    """A vocabulary. Decoding is by token: the text of a sequence is the bytes of its tokens joined.

    Every LLaMA tokenizer decodes that way, but for the space that sentencepiece puts before a text
    (`strips_space`). It makes incremental decoding exact, whatever the model samples.
    """

    vocab_size: int
    strips_space: bool

    def encode(self, text: str, parse_special: bool) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def is_special(self, token_id: int) -> bool: ...
    def token_id(self, token: str) -> int | None: ...


class Tokenizer:
    """Encodes and decodes text; made by `load_tokenizer`.

    `vocab_size` is one more than the largest id, added tokens included. Ids that the vocabulary
    does not have (a model may be padded beyond it) decode to nothing.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        adds_bos: bool,
        chat_template: str | None,
    ) -> None:
        self.codec = codec
        self.vocab_size = codec.vocab_size
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.adds_bos = adds_bos and bos_token_id is not None
        self.chat_template = chat_template

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`.

        `add_bos` puts BOS first if this tokenizer is one that does so, and never a second one.
        Without `parse_special`, special tokens written in the text are ordinary characters.
        """
        check_unicode(text)
        bos = self.bos_token_id
        if bos is None or not (add_bos and self.adds_bos):
            return self.codec.encode(text, parse_special)
        if not parse_special:  # a BOS written out is still the BOS
            text = text.removeprefix(self._token_text(bos))
        ids = self.codec.encode(text, parse_special)
        return ids if ids[:1] == [bos] else [bos, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.codec.strips_space else text

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """Return what one token adds to the text; b"" for a skipped or an unknown one."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        if skip_special and self.codec.is_special(token_id):
            return b""
        return self.codec.token_bytes(token_id)

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the prompt for a conversation of {"role", "content"} messages.

        The template alone decides about BOS, as in the training of the model.
        """
        text = render_chat(
            self.chat_template,
            messages,
            bos_token=self._token_text(self.bos_token_id),
            eos_token=self._token_text(self.eos_token_ids[0] if self.eos_token_ids else None),
            add_generation_prompt=add_generation_prompt,
        )
        return self.encode(text, add_bos=False, parse_special=True)

    def _token_text(self, token_id: int | None) -> str:
        if token_id is None:
            return ""
        return self.token_bytes(token_id, skip_special=False).decode("utf-8", "replace")


def check_unicode(text: str) -> None:
    """Raise TokenizerError if `text` holds a lone surrogate, which no tokenizer can encode."""
    if not isinstance(text, str):
        raise TokenizerError(f"the text to encode is {type(text).__name__}; it must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}; tokenizers need valid Unicode, so decode the input as UTF-8"
        ) from None
