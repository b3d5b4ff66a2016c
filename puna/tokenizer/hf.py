"""HFCodec: `tokenizer.json`, read by the `tokenizers` library.

Encoding is the library's. Decoding is by token (see `Codec`): this file translates the decoder that
the JSON states into "bytes of one token" and refuses, by name, one that does not work by token.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from puna.errors import TokenizerError
from puna.tokenizer.native import native_errors

if TYPE_CHECKING:
    import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFCodec:
    """A vocabulary in Hugging Face's format: byte-level BPE, or BPE with sentencepiece's spaces."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A stored truncation would cut prompts silently; a stored padding would lengthen them.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # parse_special is a setting of the library's object
        self._added = tokenizer.get_added_tokens_decoder()
        self._decoder = TokenDecoder.from_json(_state(tokenizer.decoder))
        self.strips_space = self._decoder.strips_space
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1

    @classmethod
    def load(cls, source: object, data: bytes) -> HFCodec:
        """Read a `tokenizer.json`; TokenizerError if it is damaged or of an unsupported kind."""
        import tokenizers

        with native_errors(f"{source} is not a tokenizer that puna can read"):
            codec = cls(tokenizers.Tokenizer.from_buffer(data))
            codec.prefix_id()  # a tokenizer that cannot encode anything fails here, not later
            return codec

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return self._encode(text, parse_special, False)

    def prefix_id(self) -> int | None:
        """Return the id that the post-processor puts before a text, if it does."""
        plain, processed = self._encode("a", False, False), self._encode("a", False, True)
        added = len(processed) - len(plain)
        return processed[0] if added > 0 and processed[1 : 1 + len(plain)] == plain else None

    def token_bytes(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.content.encode()
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._decoder.piece_bytes(piece)

    def is_special(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and added.special

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _encode(self, text: str, parse_special: bool, add_special: bool) -> list[int]:
        with self._lock, native_errors("the tokenizer failed on the text"):
            self._tokenizer.encode_special_tokens = not parse_special
            return self._tokenizer.encode(text, add_special_tokens=add_special).ids


@dataclass(frozen=True)
class TokenDecoder:
    """A decoder of `tokenizer.json`, for one token at a time."""

    byte_level: bool = False
    byte_fallback: bool = False
    strips_space: bool = False
    replacements: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, decoder: dict[str, Any] | None) -> TokenDecoder:
        """Translate the `decoder` of a tokenizer.json."""
        if decoder is None:
            raise TokenizerError("it has no decoder; a LLaMA tokenizer needs one")
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        byte_level = byte_fallback = strips_space = False
        replacements = []
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    byte_level = True
                case {"type": "ByteFallback"}:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replacements.append((old, new))
                case {"type": "Metaspace", "replacement": str(old)}:
                    replacements.append((old, " "))
                    strips_space = step.get("prepend_scheme", "always") != "never"
                case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                    strips_space = start == 1
                case _:
                    raise TokenizerError(
                        f"its decoder {json.dumps(step):.120} is not one of a LLaMA tokenizer "
                        "(byte-level or sentencepiece)"
                    )
        return cls(byte_level, byte_fallback, strips_space, tuple(replacements))

    def piece_bytes(self, piece: str) -> bytes:
        """Return the bytes that a piece of the vocabulary stands for."""
        if self.byte_fallback and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        if self.byte_level:
            try:
                return bytes(CHAR_BYTES[char] for char in piece)
            except KeyError:  # not written in the byte alphabet: a token of plain text
                pass
        return piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return byte-level BPE's alphabet: printable Latin-1 is itself, the rest follows U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


CHAR_BYTES = _byte_alphabet()


def _state(component: Any) -> dict[str, Any] | None:
    """Return the JSON of a part of the tokenizer; the library gives it out for pickling only."""
    return None if component is None else json.loads(component.__getstate__())
