"""What the products of sm_90 for several tokens (csrc/wide_sm90.cu) are compiled with: which engines
have them, how each is cut among CTAs, their constants and shared memory.

Pure, from `EngineConfig`. The rows of a matrix go to CTAs in units: a unit is a box of rows, or two
of halves that belong together (of a head, for RoPE; gate and up). A CTA multiplies a tile of units
at a time. Where rows are few, two CTAs, a cluster, share the columns of twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.cuda.attend_plan import MAX_SHARED, REGISTERS_BESIDE, has_attend, room_beside
from puna.cuda.fused_plan import KERNELS
from puna.cuda.shapes import FusedShapes, fused_shapes
from puna.engine import EngineConfig

# Kernels are compiled for up to so many tokens.
TOKENS = (8, 16, 32, 64)
COLUMNS = 64  # of a box: 128 bytes
NUM_WARPS = 8
_CTAS = 132  # that tiles are sized for: multiprocessors of an H100 or H200
_MOST_ROWS = 256  # of a tile

OUT_BYTES = 100 * 1024
DOWN_BYTES = 227 * 1024
QKV_BYTES = 227 * 1024
_OF_A_MULTIPROCESSOR = 228 * 1024


@dataclass(frozen=True)
class Cut:
    """`unit`: rows of a half in a box; `most`: units of a tile; `cluster`: CTAs of a tile."""

    halves: int
    unit: int
    most: int
    cluster: int

    @property
    def num_rows(self) -> int:
        """Of a tile; those of a half begin at multiples of eight."""
        return self.most * self.halves * (-(-self.unit // 8) * 8)


def has_wide(config: EngineConfig) -> bool:
    if config.limits.max_batch_size < 2 or not has_attend(config):
        return False
    s = fused_shapes(config)
    return all(size % COLUMNS == 0 for size in (s.hidden, s.q_size, s.ffn))


def cut(s: FusedShapes, vocab_size: int, kernel: str) -> Cut:
    if kernel == "qkv":
        pairs = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim // 2
        # Whole units of a head. Two CTAs to a tile exchange sums; boxes of eight rows are small.
        choices = [
            (_imbalance(pairs, unit, cluster) * (1.03 if cluster > 1 else 1), -unit, cluster)
            for cluster in (1, 2)
            for unit in (32, 16)
        ]
        _, negative, cluster = min(choices)
        return _cut(2, pairs, -negative, cluster)
    if kernel in ("gate_up", "head"):
        halves = 2 if kernel == "gate_up" else 1
        rows, most = (s.ffn, 64) if halves == 2 else (vocab_size, _MOST_ROWS)
        rounds = -(-rows // (_CTAS * most))
        # Even: neighbouring columns are stored together.
        even = 2 if halves == 2 else 4
        unit = -(-rows // (_CTAS * rounds * even)) * even
        return Cut(halves, unit, 1, 1)
    rounds = -(-s.hidden // (_CTAS // 2 * _MOST_ROWS))
    return Cut(1, -(-s.hidden // (_CTAS // 2 * rounds * 8)) * 8, 1, 2)


def _cut(halves: int, rows: int, unit: int, cluster: int) -> Cut:
    """Of so many rows of either half, as many units in a tile as the busiest CTA has, if it can."""
    units = -(-(-(-rows // unit)) // (_CTAS // cluster))
    rounds = -(-units * unit // (_MOST_ROWS // 4 if halves == 2 else _MOST_ROWS))
    return Cut(halves, unit, -(-units // rounds), cluster)


def _imbalance(rows: int, unit: int, cluster: int) -> float:
    """Rows of the busiest CTA, as a multiple of an even share."""
    parties = _CTAS // cluster
    return -(-(-(-rows // unit)) // parties) * unit * parties / rows


def wide_shared_bytes(config: EngineConfig, kernel: str) -> int:
    """Of dynamic shared memory: attention is resident beside the kernels in front of it and behind
    it."""
    beside_attention = room_beside(fused_shapes(config)) // 1024 * 1024
    return {
        "qkv": min(beside_attention, QKV_BYTES),
        "out": OUT_BYTES,
        "gate_up": _OF_A_MULTIPROCESSOR - OUT_BYTES - 2 * 1024,
        "down": DOWN_BYTES,
    }.get(kernel, MAX_SHARED)


def _registers(kernel: str) -> int:
    """Most of a thread: qkv and out are resident beside attention, gate_up beside out."""
    return REGISTERS_BESIDE if kernel in ("qkv", "out") else 255


def wide_defines(config: EngineConfig, tokens: int) -> dict[str, int | str]:
    """Macros of the source."""
    s, spec = fused_shapes(config), config.spec
    cuts = {kernel: cut(s, spec.vocab_size, kernel) for kernel in KERNELS}
    return {
        "BF16": int(config.dtype == "bfloat16"),
        "HIDDEN": s.hidden,
        "HEADS": s.num_heads,
        "KV_HEADS": s.num_kv_heads,
        "HEAD_DIM": s.head_dim,
        "FFN": s.ffn,
        "VOCAB": spec.vocab_size,
        "KV_BLOCK": config.limits.block_size,
        "EPS": f"{spec.rms_norm_eps!r}f",
        "TOKENS": tokens,
        "ROWS": tokens,
        "ATTENTION_BIAS": int(spec.attention_bias),
        "MLP_BIAS": int(spec.mlp_bias),
        **{f"SHARED_{kernel}": wide_shared_bytes(config, kernel) for kernel in KERNELS},
        **{f"UNIT_{kernel}": it.unit for kernel, it in cuts.items()},
        **{f"MOST_{kernel}": it.most for kernel, it in cuts.items()},
        **{f"CLUSTER_{kernel}": it.cluster for kernel, it in cuts.items()},
        **{f"REGISTERS_{kernel}": _registers(kernel) for kernel in KERNELS},
    }
