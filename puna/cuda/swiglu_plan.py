"""The product of gate and up with SiLU for many tokens on sm_90 (csrc/swiglu_sm90.cu): which
engines have it, and what it is compiled with.

Pure, from `EngineConfig`.
"""

from __future__ import annotations

from puna.engine import EngineConfig
from puna.weights import extent

CLUSTER = 2  # CTAs that share weights
TILE_ROWS, TILE_TOKENS, CHUNK_COLS = 128, 128, 64
NUM_WARPS = 9
_STAGE_BYTES = (2 * TILE_ROWS + TILE_TOKENS) * CHUNK_COLS * 2 + 16
SHARED_BYTES = 227 * 1024 // _STAGE_BYTES * _STAGE_BYTES


def has_swiglu(config: EngineConfig) -> bool:
    if config.target != "sm_90" or config.world_size > 1:
        return False
    spec = config.spec
    ffn = extent("ffn", spec.intermediate_size, spec, config.mapping(0), config.ffn_multiple).size
    return spec.hidden_size % CHUNK_COLS == 0 and ffn % CHUNK_COLS == 0


def swiglu_defines(config: EngineConfig) -> dict[str, int]:
    """Macros of the source."""
    return {
        "BF16": int(config.dtype == "bfloat16"),
        "TOKENS": TILE_TOKENS,
        "SHARED": SHARED_BYTES,
        "MLP_BIAS": int(config.spec.mlp_bias),
    }
