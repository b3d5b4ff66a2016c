"""TiktokenCodec: the rank file `tokenizer.model` of Llama 3, run by `tiktoken`.

The file holds byte strings and ranks, nothing else; the split pattern and the 256 special tokens
are Llama 3's own and stated here. Nothing is ever downloaded.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from puna.errors import TokenizerError
from puna.tokenizer.native import native_errors

if TYPE_CHECKING:
    import tiktoken

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL = 256
# By position behind the ranks; the others are <|reserved_special_token_N|>. The names are those of
# Llama 3.1: the rank file is the same as 3.0's, where eom, python_tag and the pad were reserved.
SPECIAL_NAMES = MappingProxyType(
    {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
)
# Longer runs without a change between space and non-space are cut: the pattern backtracks over a
# run. Meta's code has the same limit, so the ids agree.
MAX_RUN = 25_000

RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,7})")


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` begins with a rank line (a protobuf does not)."""
    return RANK_LINE.fullmatch(data[:4096].split(b"\n", 1)[0].rstrip(b"\r")) is not None


class TiktokenCodec:
    """Llama 3's vocabulary: byte-level BPE by rank, and its special tokens behind the ranks."""

    strips_space = False

    def __init__(self, encoding: tiktoken.Encoding, tokens: list[bytes]) -> None:
        self._encoding = encoding
        self._tokens = tokens  # ranks, then special tokens
        self._num_ranks = len(tokens) - NUM_SPECIAL
        self._special_ids = {
            token.decode(): self._num_ranks + i for i, token in enumerate(tokens[-NUM_SPECIAL:])
        }
        self.vocab_size = len(tokens)

    @classmethod
    def load(cls, source: object, data: bytes) -> TiktokenCodec:
        """Read a rank file; TokenizerError if it is damaged."""
        import tiktoken

        ranks = _parse_ranks(source, data)
        special = _special_tokens()
        with native_errors(f"{source} holds ranks that tiktoken does not accept"):
            encoding = tiktoken.Encoding(
                name="llama3",
                pat_str=LLAMA3_SPLIT,
                mergeable_ranks=ranks,
                special_tokens={token: len(ranks) + i for i, token in enumerate(special)},
            )
        return cls(encoding, [*ranks, *(token.encode() for token in special)])

    def encode(self, text: str, parse_special: bool) -> list[int]:
        allowed = set(self._special_ids) if parse_special else set()
        ids = []
        with native_errors("the tokenizer failed on the text"):
            for part in split_long_runs(text):
                ids += self._encoding.encode(part, allowed_special=allowed, disallowed_special=())
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id >= self._num_ranks

    def token_id(self, token: str) -> int | None:
        return self._special_ids.get(token)


def split_long_runs(text: str) -> Iterator[str]:
    """Cut `text` wherever MAX_RUN characters of one kind, space or not, have gone by."""
    start = 0
    if len(text) > MAX_RUN:
        for run in re.finditer(r"\s+|\S+", text):
            for end in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield text[start:end]
                start = end
    yield text[start:]


def _special_tokens() -> list[str]:
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(NUM_SPECIAL))
    return [SPECIAL_NAMES.get(i) or next(reserved) for i in range(NUM_SPECIAL)]


def _parse_ranks(source: object, data: bytes) -> dict[bytes, int]:
    """Return {token: rank} in the order of the ranks, which must be 0, 1, 2 and so on."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        match = RANK_LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if not match or not token or int(match[2]) != number or token in ranks:
            raise TokenizerError(
                f"{source}: line {number + 1} is {line[:60]!r}; it must be a new base64 token and "
                f"the rank {number}, so get the file again from the checkpoint's source"
            )
        ranks[token] = number
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise TokenizerError(
            f"{source} lacks {missing} of the 256 single bytes; it is cut short or damaged, so get "
            "it again from the checkpoint's source"
        )
    return ranks
