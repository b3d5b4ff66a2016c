"""Products of sm_90 for 17 to 64 tokens (csrc/stream_k_sm90.cu): which engines have them, how a
product is cut, and what the kernel is compiled with.

Pure, from `EngineConfig`. A product y = x W^T is cut into blocks of 256 rows of W and each of those
into chunks of 64 columns; all chunks, block by block, go in equal runs to the CTAs ("stream-K",
Osama et al., 2023). A block is the sum of the parts that one or several CTAs have of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.cuda.attend_plan import MAX_SHARED, REGISTERS, has_attend, room_beside
from puna.cuda.shapes import fused_shapes
from puna.engine import EngineConfig
from puna.weights import extent

# Kernels are compiled for up to so many tokens.
TOKENS = (32, 64)
PART_TOKENS = TOKENS[-1]  # rows of a part, however many tokens there are
BLOCK_ROWS, CHUNK_COLS = 256, 64
NUM_WARPS = 9
MAX_CTAS = 132  # of a product: multiprocessors of an H100 or H200
LEAST_CHUNKS = 4  # of a CTA: parts of less would be as much to add as there were weights to read


@dataclass(frozen=True)
class Cut:
    """How the product of `num_rows` rows and `num_cols` columns of W is cut among CTAs."""

    num_rows: int
    num_cols: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // BLOCK_ROWS)

    @property
    def num_chunks(self) -> int:
        """Of a block."""
        return -(-self.num_cols // CHUNK_COLS)

    def num_ctas(self, num_multiprocessors: int) -> int:
        most = self.num_blocks * self.num_chunks // LEAST_CHUNKS
        return max(min(num_multiprocessors, MAX_CTAS, most), 1)

    @property
    def most_parts(self) -> int:
        """Of any block, on any GPU: as many of the shortest runs as fit into it, and what is left
        on either side of them."""
        shortest = self.num_blocks * self.num_chunks // self.num_ctas(MAX_CTAS)
        return max(self.num_chunks - 2, 0) // shortest + 2

    def num_parts(self, block: int, num_ctas: int) -> int:
        """CTAs that have chunks of a block: CTA c has those from floor(all c / num_ctas) on."""
        all_chunks = self.num_blocks * self.num_chunks
        first = ((block * self.num_chunks + 1) * num_ctas - 1) // all_chunks
        last = ((block + 1) * self.num_chunks * num_ctas - 1) // all_chunks
        return last - first + 1


def stream_k_cuts(config: EngineConfig) -> dict[str, Cut]:
    """The products that an engine computes so, by role; {} where its target or its sizes do not
    suit."""
    if config.target != "sm_90" or config.world_size > 1:
        return {}
    spec, mapping = config.spec, config.mapping(0)
    q_size = extent("heads", spec.q_size, spec, mapping).size
    kv_size = extent("kv_heads", spec.kv_size, spec, mapping).size
    ffn = extent("ffn", spec.intermediate_size, spec, mapping, config.ffn_multiple).size
    vocab = extent("vocab", spec.vocab_size, spec, mapping, config.vocab_multiple).size
    hidden = spec.hidden_size
    # Whole chunks, and several of them for a CTA.
    if any(size % CHUNK_COLS or size < 1024 for size in (hidden, q_size, ffn)) or kv_size % 16:
        return {}
    return {
        "qkv": Cut(q_size + 2 * kv_size, hidden),
        "o": Cut(hidden, q_size),
        "gate_up": Cut(2 * ffn, hidden),
        "down": Cut(hidden, ffn),
        "head": Cut(vocab, hidden),
    }


def part_numbers(config: EngineConfig) -> int:
    """Numbers that the parts of the largest product have; 0 where there is none."""
    cuts = [cut for role, cut in stream_k_cuts(config).items() if role != "head"]
    return max((cut.most_parts * PART_TOKENS * cut.num_rows for cut in cuts), default=0)


def stream_k_shared_bytes(config: EngineConfig, tokens: int, is_beside: bool) -> int:
    """Of the ring and its barriers: as many stages as there is room for; beside attention, where
    the engine has such a kernel."""
    room = room_beside(fused_shapes(config)) if is_beside and has_attend(config) else MAX_SHARED
    stage = (BLOCK_ROWS + tokens) * CHUNK_COLS * 2 + 16
    return room // stage * stage


def stream_k_defines(config: EngineConfig, tokens: int) -> dict[str, int]:
    """Macros of the source. Three of nine warps share a quarter of a multiprocessor's registers
    with one of attention's."""
    is_bfloat16, registers = config.dtype == "bfloat16", (512 - REGISTERS) // 3 // 8 * 8
    return {"TOKENS": tokens, "BF16": int(is_bfloat16), "REGISTERS": registers}
