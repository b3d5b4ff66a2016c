"""What the products of sm_90 for several tokens are compiled with (csrc/wide_sm90.cu): which
engines have them, how each is cut among CTAs, their constants and shared memory.

Pure, from `EngineConfig`. The rows of a matrix go to CTAs in units: a unit is a box of rows, or two
of halves that belong together (of a head, for RoPE; gate and up). A CTA multiplies a tile of units
at a time. Where rows are few, two CTAs, a cluster, share the columns of twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from puna.cuda.attend_plan import (
    MAX_SHARED,
    OF_A_MULTIPROCESSOR,
    REGISTERS_BESIDE,
    RESERVED,
    has_attend,
    room_beside,
)
from puna.cuda.fused_plan import KERNELS, layer_defines
from puna.cuda.shapes import FusedShapes, fused_shapes
from puna.engine import EngineConfig

# Kernels are compiled for up to so many tokens.
TOKENS = (8, 16, 32, 64)
COLUMNS = 64  # of a box: 128 bytes
NUM_WARPS = 8
_CTAS = 132  # that tiles are sized for: multiprocessors of an H100 or H200
# Most rows of a tile, of either half.
_MOST_ROWS = MappingProxyType({"qkv": 64, "out": 96, "gate_up": 64, "down": 96, "head": 256})
# gate_up is resident beside out when attention has ended, so that its ring fills meanwhile. What
# out has of a multiprocessor's shared memory, by tokens. At 8, 16, 32 and 64, ms a step: 3.50,
# 3.70, 4.22 and 5.41 with 80 KB, 3.49, 3.71, 4.19 and 5.41 with 90, 3.51, 3.71, 4.19 and 5.46 with
# 100; of a slower one 3.58, 3.79, 4.32 and 5.63 with 90, 3.59, 3.78, 4.31 and 5.56 with 94, where
# out has a stage more at 64 and gate_up none less (7B at context 192, H200, 2026-11-27).
_OUT_BYTES = MappingProxyType({8: 90 * 1024, 16: 90 * 1024, 32: 94 * 1024, 64: 94 * 1024})
# Mirrors of constants in the source.
_ROW_BYTES, _BLOCK, _WARPS, _MAX_STAGES, _LEAST_STAGES = 128, 64, 4, 32, 3


@dataclass(frozen=True)
class Cut:
    """`halves`: 2 where rows belong together in pairs; `unit`: rows of a half in a box; `most`:
    units of a tile; `cluster`: CTAs of a tile."""

    halves: int
    unit: int
    most: int
    cluster: int

    @property
    def half_rows(self) -> int:
        """Of a tile, in shared memory: a unit's begin at multiples of eight."""
        return self.most * _ceil(self.unit, 8) * 8


def has_wide(config: EngineConfig) -> bool:
    if config.limits.max_batch_size < 2 or not has_attend(config):
        return False
    s = fused_shapes(config)
    # Whole chunks, and one at least for each CTA of a cluster.
    if any(size % COLUMNS or size < 2 * COLUMNS for size in (s.hidden, s.q_size, s.ffn)):
        return False
    return all(
        _num_stages(config, kernel, tokens) >= _LEAST_STAGES
        for kernel in KERNELS
        for tokens in variants(config)
    )


def variant(num_tokens: int) -> int:
    """Which of the kernels is for so many tokens."""
    return next(tokens for tokens in TOKENS if num_tokens <= tokens)


def variants(config: EngineConfig) -> tuple[int, ...]:
    """Those that a decode batch can need, or a short prompt."""
    return TOKENS[: TOKENS.index(variant(min(config.limits.max_batch_size, TOKENS[-1]))) + 1]


def cut(s: FusedShapes, vocab_size: int, kernel: str) -> Cut:
    """How a kernel's matrix is cut for GPUs of 132 multiprocessors; right for any other number."""
    most_rows = _MOST_ROWS[kernel]
    if kernel == "qkv":
        # Whole units of a head. Two CTAs of a tile have sums to exchange.
        pairs = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim // 2
        _, unit, cluster = min(
            (_imbalance(pairs, unit, cluster) * (1.03 if cluster > 1 else 1), unit, cluster)
            for cluster in (1, 2)
            for unit in (16, 32)
        )
        units = _ceil(_ceil(pairs, unit), _CTAS // cluster)
        return Cut(2, unit, _ceil(units, _ceil(units * unit, most_rows)), cluster)
    rows, halves, cluster, multiple = {
        "out": (s.hidden, 1, 2, 8),
        "gate_up": (s.ffn, 2, 1, 2),
        "down": (s.hidden, 1, 2, 8),
        "head": (vocab_size, 1, 1, 4),
    }[kernel]
    parties = _CTAS // cluster
    rounds = _ceil(rows, parties * most_rows)
    return Cut(halves, _ceil(rows, parties * rounds * multiple) * multiple, 1, cluster)


def _imbalance(rows: int, unit: int, cluster: int) -> float:
    """Rows of the busiest CTA, as a multiple of an even share."""
    parties = _CTAS // cluster
    return _ceil(_ceil(rows, unit), parties) * unit * parties / rows


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def wide_shared_bytes(config: EngineConfig, kernel: str, tokens: int) -> int:
    """Of dynamic shared memory."""
    beside = {
        "qkv": room_beside(fused_shapes(config)),
        "out": _OUT_BYTES[tokens],
        "gate_up": OF_A_MULTIPROCESSOR - _OUT_BYTES[tokens] - 2 * RESERVED,
    }
    return beside.get(kernel, MAX_SHARED) // 1024 * 1024


def _num_stages(config: EngineConfig, kernel: str, tokens: int) -> int:
    """Of a ring: `Cut::STAGES` of the source."""
    it = cut(fused_shapes(config), config.spec.vocab_size, kernel)
    eights, blocks = tokens // 8, _ceil(it.half_rows, _BLOCK)
    senders = _WARPS * 32 // (1 if eights > 1 else 2)
    received = it.halves * blocks * max(eights // 2, 1) * senders * 16 if it.cluster > 1 else 0
    barriers = (2 * _MAX_STAGES + 4) * 8
    words = (_WARPS * 8 * 20 + (_WARPS * 2 + 1) * tokens) * 4
    ring = (wide_shared_bytes(config, kernel, tokens) - received - barriers - words) // 1024 * 1024
    beyond = (2 if kernel == "qkv" else 1) * (blocks * _BLOCK - it.half_rows) * _ROW_BYTES
    stage = (tokens + it.halves * it.half_rows) * _ROW_BYTES
    return min((ring - beyond) // stage, _MAX_STAGES)


def wide_defines(config: EngineConfig, tokens: int) -> dict[str, int | str]:
    """Macros of the source."""
    s = fused_shapes(config)
    cuts = {kernel: cut(s, config.spec.vocab_size, kernel) for kernel in KERNELS}
    return {
        **layer_defines(config),
        "TOKENS": tokens,
        "ROWS": tokens,
        **{f"SHARED_{kernel}": wide_shared_bytes(config, kernel, tokens) for kernel in KERNELS},
        **{f"STAGES_{kernel}": _num_stages(config, kernel, tokens) for kernel in KERNELS},
        **{f"UNIT_{kernel}": it.unit for kernel, it in cuts.items()},
        **{f"MOST_{kernel}": it.most for kernel, it in cuts.items()},
        **{f"CLUSTER_{kernel}": it.cluster for kernel, it in cuts.items()},
        "REGISTERS_BESIDE": REGISTERS_BESIDE,
    }
