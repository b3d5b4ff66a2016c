"""Detokenizer: turns sampled ids into text as they come, without ever showing half a character.

Decides what can be shown now. It does not know when a sequence ends or which strings stop it.
"""

from __future__ import annotations

import codecs

from puna.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Incremental `tok.decode`: the outputs of `add` and `finish` joined equal it exactly.

    Tokens are pieces of UTF-8, so an incremental UTF-8 decoder is all the state there is: at most
    three bytes are ever held back, and a token costs the same however long the text already is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokenizer.codec.strips_space  # until the first character is out

    def add(self, token_id: int) -> str:
        """Return the text that can be shown now that `token_id` has come; may be empty."""
        return self._show(self._tokenizer.token_bytes(token_id, self._skip_special))

    def finish(self) -> str:
        """Return what was held back, as U+FFFD; the next `add` begins a new text."""
        rest = self._show(b"", final=True)
        self._decoder.reset()
        self._strips_space = self._tokenizer.codec.strips_space
        return rest

    def _show(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        if text and self._strips_space:
            self._strips_space = False
            text = text.removeprefix(" ")
        return text
