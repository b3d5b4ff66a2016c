"""Sizes of a layer that the kernels of sm_90 are compiled for. Pure, from `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from puna.engine import EngineConfig
from puna.weights import extent


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
