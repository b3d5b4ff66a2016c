"""What the fused decode kernels of sm_90 (csrc/decode_sm90.cu) are compiled with, and need.

Pure, from `EngineConfig`: which engines have them, for how many tokens, their constants, shared
memory and scratch. The kernels check the bytes of shared memory against their own layout when they
are compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.engine import EngineConfig
from puna.weights import extent

# Kernels are compiled for one token, and for up to eight.
FUSED_ROWS = (1, 8)
KERNELS = ("qkv", "out", "gate_up", "down", "head")
MAX_SPLITS = 16  # parts of a context in attention
# Of keys or values, the innermost dimension first: half a stage or all of one.
CACHE_BOX = (64, 16, 1)
# Mirrors of constants in the source.
_WARPS, _CHUNK, _REGISTER_UNITS = 8, 256, 32
_NUM_BUFFERS = 2 * _WARPS
_MAX_SHARED = 227 * 1024


@dataclass(frozen=True)
class FusedShapes:
    """Sizes of rank 0: hidden, heads, KV heads, head_dim, ffn."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def num_cols(self, kernel: str) -> int:
        """Columns of the kernel's matrix."""
        return {"out": self.q_size, "down": self.ffn}.get(kernel, self.hidden)


def fused_shapes(config: EngineConfig) -> FusedShapes:
    spec, mapping = config.spec, config.mapping(0)
    return FusedShapes(
        hidden=spec.hidden_size,
        num_heads=extent("heads", spec.q_size, spec, mapping).size // spec.head_dim,
        num_kv_heads=extent("kv_heads", spec.kv_size, spec, mapping).size // spec.head_dim,
        head_dim=spec.head_dim,
        ffn=extent("ffn", spec.intermediate_size, spec, mapping, config.ffn_multiple).size,
    )


def fused_rows(config: EngineConfig) -> tuple[int, ...]:
    """The numbers of rows for which the engine has fused kernels; () where its target or its sizes
    have none."""
    if config.target != "sm_90" or config.world_size > 1:
        return ()
    s = fused_shapes(config)
    # Whole chunks, and at least one for every warp.
    least = _CHUNK * _WARPS
    sizes_fit = all(size % _CHUNK == 0 and size >= least for size in (s.hidden, s.q_size, s.ffn))
    if not sizes_fit or s.head_dim not in (64, 128) or s.group > 8:
        return ()
    return tuple(
        rows
        for rows in FUSED_ROWS
        if rows <= config.limits.max_batch_size
        and all(shared_bytes(s, kernel, rows) <= _MAX_SHARED for kernel in KERNELS)
    )


def num_stages(s: FusedShapes, kernel: str, rows: int) -> int:
    """Stages of a warp's ring."""
    if rows > 1:
        return 3 if kernel == "down" else 4  # its input needs the room
    # Three are 1.5 % of a step faster than two, but not where few heads of keys leave attention to
    # few CTAs: there qkv of two is 1 % faster (H200, 2026-11-26).
    room = _MAX_SHARED - _other_bytes(s, kernel, rows)
    most = 2 if kernel == "qkv" and s.group > 1 else 3
    return min(room // (_WARPS * (_stage_bytes(rows) + 8)), most)


def shared_bytes(s: FusedShapes, kernel: str, rows: int) -> int:
    """Bytes of dynamic shared memory: `Shared<...>::TOTAL` of the source."""
    stages = num_stages(s, kernel, rows)
    return _WARPS * stages * (_stage_bytes(rows) + 8) + _other_bytes(s, kernel, rows)


def _stage_bytes(rows: int) -> int:
    return tile_rows(rows) * _CHUNK * 2


def _other_bytes(s: FusedShapes, kernel: str, rows: int) -> int:
    """Shared memory beside the rings and their barriers."""
    num_cols = s.num_cols(kernel)
    units = -(-num_cols // (_CHUNK * _WARPS)) * (_CHUNK // 32)
    in_shared = max(units - _REGISTER_UNITS, 0)
    inputs = num_cols * 2 if rows == 1 else _WARPS * in_shared * 512
    parts = _NUM_BUFFERS * _WARPS * tile_rows(rows) * rows * 4
    merge = 2 * _WARPS * s.group * (s.head_dim + 2) * 4 if kernel == "qkv" else 0
    words = (_WARPS * rows + 8) * 4
    return max(inputs + parts, merge) + _NUM_BUFFERS * 8 + words


def tile_rows(rows: int) -> int:
    """Rows of weights that belong together, TILE of the source; `rows`: of the variant."""
    return 16 if rows == 1 else 8


def weight_box(
    s: FusedShapes, kernel: str, num_rows: int, tile: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A kernel's matrix of `num_rows` rows as a tensor of three dimensions, the innermost first,
    and the box of it that is one copy: a chunk of the rows that belong together."""
    num_cols = s.num_cols(kernel)
    if kernel == "qkv":
        half = s.head_dim // 2
        return (num_cols, half, num_rows // half), (_CHUNK, tile // 2, 2)
    if kernel == "gate_up":
        return (num_cols, s.ffn, 2), (_CHUNK, tile // 2, 2)
    return (num_cols, num_rows, 1), (_CHUNK, tile, 1)


def fused_defines(config: EngineConfig, rows: int) -> dict[str, int | str]:
    """Macros of the source."""
    s, spec = fused_shapes(config), config.spec
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
        "ROWS": rows,
        "ATTENTION_BIAS": int(spec.attention_bias),
        "MLP_BIAS": int(spec.mlp_bias),
        **{f"SHARED_{kernel}": shared_bytes(s, kernel, rows) for kernel in KERNELS},
        **{f"STAGES_{kernel}": num_stages(s, kernel, rows) for kernel in KERNELS},
    }
