"""SentencePieceCodec: the protobuf `tokenizer.model` of Llama 1 and 2, read by `sentencepiece`.

Decides how tokens beside the trained pieces are found in a text; the pieces themselves are the
library's. Each stretch of text between such tokens is encoded on its own, with the leading space
that sentencepiece gives a text: so did Meta's chat code, and so do HF's and llama.cpp's tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from puna.tokenizer.config import AddedToken
from puna.tokenizer.native import native_errors

if TYPE_CHECKING:
    import sentencepiece

SPACE = "\u2581"  # how sentencepiece writes a space


class SentencePieceCodec:
    """A sentencepiece vocabulary with the tokens that were added beside it."""

    def __init__(
        self, model: sentencepiece.SentencePieceProcessor, added: Mapping[int, AddedToken]
    ) -> None:
        self._model = model
        size = model.get_piece_size()
        pieces = [model.id_to_piece(i) for i in range(size)]  # fails where one is not UTF-8
        self._bytes = [_piece_bytes(piece, model.is_byte(i)) for i, piece in enumerate(pieces)]
        self._added = {
            i: AddedToken(piece, special=True)
            for i, piece in enumerate(pieces)
            if model.is_control(i) or model.is_unknown(i)
        }
        self._added.update(added)
        added_ids = {token.content: i for i, token in self._added.items()}
        self._ids = {piece: i for i, piece in enumerate(pieces)} | added_ids
        self._always = _pattern(t.content for t in self._added.values() if not t.special)
        self._parsed = _pattern(added_ids)
        self.vocab_size = max([size, *(i + 1 for i in added)])
        self.strips_space = model.normalize("a").startswith(SPACE)

    @classmethod
    def load(
        cls, source: object, data: bytes, added: Mapping[int, AddedToken]
    ) -> SentencePieceCodec:
        """Read a sentencepiece model; TokenizerError if it is damaged."""
        import sentencepiece

        with native_errors(
            f"{source} is neither a sentencepiece model nor tiktoken ranks; get it again from the "
            "checkpoint's source"
        ):
            model = sentencepiece.SentencePieceProcessor(model_proto=data)
            return cls(model, added)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        pattern = self._parsed if parse_special else self._always
        if pattern is None:
            return self._encode(text)
        ids = []
        for i, part in enumerate(pattern.split(text)):
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.content.encode()
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def is_special(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and added.special

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _encode(self, text: str) -> list[int]:
        with native_errors("the tokenizer failed on the text"):
            return self._model.encode(text)


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()  # <0xNN>


def _pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that splits a text at `tokens`, the longest first."""
    ordered = sorted((t for t in tokens if t), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None
