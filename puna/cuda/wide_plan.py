"""What the products of sm_90 for several tokens are compiled with (csrc/wide_sm90.cu): which
engines have them, how each is cut among CTAs, their constants and shared memory.

Pure, from `EngineConfig`. The rows of a matrix go to CTAs in units: a unit is a box of rows, or two
of halves that belong together (of a head, for RoPE; gate and up). A CTA multiplies a tile of units
at a time. Where rows are few, two CTAs, a cluster, share the columns of twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from puna.cuda.attend_plan import MAX_SHARED, REGISTERS_BESIDE, has_attend, room_beside
from puna.cuda.fused_plan import layer_defines
from puna.cuda.shapes import FusedShapes, fused_shapes
from puna.engine import EngineConfig

# Kernels are compiled for up to so many tokens.
TOKENS = (8, 16, 32, 64)
# Of a layer, in the order in which a launch can have them: the numbers of `Mode` in the source.
PRODUCTS = ("out", "gate_up", "down", "qkv")
WIDE_KERNELS = ("layer", "head")
COLUMNS = 64  # of a box: 128 bytes
NUM_WARPS = 8
_CTAS = 132  # that tiles are sized for: multiprocessors of an H100 or H200
# Most rows of a tile, of either half.
_MOST_ROWS = MappingProxyType({"qkv": 64, "out": 96, "gate_up": 64, "down": 96, "head": 256})
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
        for kernel in WIDE_KERNELS
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


def wide_shared_bytes(config: EngineConfig, kernel: str) -> int:
    """Of dynamic shared memory. `kernel`: "layer", or "head"."""
    most = room_beside(fused_shapes(config)) if kernel == "layer" else MAX_SHARED
    return most // 1024 * 1024


def _num_stages(config: EngineConfig, kernel: str, tokens: int) -> int:
    """Of a ring: as `Room` of the source lays it out."""
    products = PRODUCTS if kernel == "layer" else (kernel,)
    cuts = [(it, cut(fused_shapes(config), config.spec.vocab_size, it)) for it in products]
    received = max(_received_bytes(it, tokens) for _, it in cuts)
    barriers = (2 * _MAX_STAGES + 8) * 8
    numbers = (_WARPS * 8 * 20 + (_WARPS * 2 + 1) * tokens) * 4
    ring = (wide_shared_bytes(config, kernel) - received - barriers - numbers) // 1024 * 1024
    beyond = max(_beyond_rows(product, it) for product, it in cuts) * _ROW_BYTES
    slot = max(tokens + it.halves * it.half_rows for _, it in cuts) * _ROW_BYTES
    return min((ring - beyond) // slot, _MAX_STAGES)


def _received_bytes(it: Cut, tokens: int) -> int:
    """Sums of the other CTA of a cluster."""
    eights, blocks = tokens // 8, _ceil(it.half_rows, _BLOCK)
    senders = _WARPS * 32 // (1 if eights > 1 else 2)
    return it.halves * blocks * max(eights // 2, 1) * senders * 16 if it.cluster > 1 else 0


def _beyond_rows(product: str, it: Cut) -> int:
    """Behind a stage, that a block of the product reaches."""
    blocks = _ceil(it.half_rows, _BLOCK)
    return (2 if product == "qkv" else 1) * (blocks * _BLOCK - it.half_rows)


def wide_defines(config: EngineConfig, tokens: int) -> dict[str, int | str]:
    """Macros of the source."""
    s = fused_shapes(config)
    cuts = {kernel: cut(s, config.spec.vocab_size, kernel) for kernel in (*PRODUCTS, "head")}
    return {
        **layer_defines(config),
        "TOKENS": tokens,
        "ROWS": tokens,
        **{f"SHARED_{kernel}": wide_shared_bytes(config, kernel) for kernel in WIDE_KERNELS},
        **{f"STAGES_{kernel}": _num_stages(config, kernel, tokens) for kernel in WIDE_KERNELS},
        **{f"UNIT_{kernel}": it.unit for kernel, it in cuts.items()},
        **{f"MOST_{kernel}": it.most for kernel, it in cuts.items()},
        **{f"CLUSTER_{kernel}": it.cluster for kernel, it in cuts.items()},
        "CLUSTER_layer": 2,
        "REGISTERS_BESIDE": REGISTERS_BESIDE,
    }
