"""What the cases of CudaOps have in common: a configuration on a device with random matrices, and
how near a result must be.

Outputs, unused slots of the cache and padding of scratch hold NaN, so that reading or leaving one
shows. Shapes are odd on purpose; suffixes as in `puna.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cuda_configs import cuda_config

from puna.cuda.choices import Choices
from puna.cuda.ops import CudaOps
from puna.cuda.wide_plan import has_wide
from puna.cuda_memory import PART_ROWS, padded_cols, padded_rows, product_splits
from puna.engine import EngineConfig
from puna.memory import workspace_specs
from puna.ops import Linear, Norm, Stream
from puna.spec import ModelSpec

# Of a device of tests: (config, arrays, choices, deterministic, has_fused) -> CudaOps. has_fused:
# with the target's own operations.
MakeOps = Callable[[EngineConfig, dict[str, torch.Tensor], Choices, bool, bool], CudaOps]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# A row beyond this takes the way of many tokens: few are enough to see both.
DIRECT = 20


@dataclass(frozen=True)
class TestDevice:
    """Where the operations run, and how they are made there."""

    __test__ = False
    name: str
    make_ops: MakeOps


SPEC = ModelSpec(
    hidden_size=72,
    intermediate_size=200,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=2500,
    max_position_embeddings=1024,
    attention_bias=True,
    mlp_bias=True,
)
# Its product of q, k and v is one in parts, as those of o and down are above.
PLAIN = ModelSpec(160, 128, 1, 4, 4, 16, 300, 1024)
# Has operations of its own for several tokens, where the target has them.
WIDE = ModelSpec(1024, 1088, 1, 16, 4, 64, 2500, 1024, attention_bias=True, mlp_bias=True)


def arrays_of(config: EngineConfig, device: str) -> dict[str, torch.Tensor]:
    """The workspace, full of NaN (integers: -1), but for what begins as zeros."""
    made = {}
    for name, (dtype, shape) in workspace_specs(config, 0, "cuda").items():
        kind = {"float32": torch.float32, "int32": torch.int32, **DTYPES}[dtype.name]
        fill = -1 if kind == torch.int32 else float("nan")
        fill = 0 if name in ("attend_counts", "fused_epoch", "fused_error", "zeros_N") else fill
        made[name] = torch.full(shape, fill, dtype=kind, device=device)
    return made


class Bench:
    """One configuration on a device, with random matrices in its dtype."""

    def __init__(
        self,
        device: TestDevice,
        spec: ModelSpec,
        dtype: str,
        *,
        deterministic: bool = False,
        max_num_tokens: int = 128,
        max_batch_size: int = 8,
        max_seq_len: int = 1024,
        overlaps: bool = True,
        has_fused: bool = True,
    ) -> None:
        self.config = cuda_config(
            spec,
            dtype,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            max_batch_size=max_batch_size,
        )
        self.spec, self.dtype, self.device = spec, DTYPES[dtype], device.name
        self.arrays = arrays_of(self.config, device.name)
        direct_tokens = 64 if has_wide(self.config) else DIRECT
        choices = Choices(direct_tokens, biased_tokens=100, overlaps=overlaps, swiglu_tokens=150)
        self.ops = device.make_ops(self.config, self.arrays, choices, deterministic, has_fused)
        self.rng = torch.Generator(self.device).manual_seed(5)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)

    def rounded(self, *shape: int) -> torch.Tensor:
        return self.floats(*shape).to(self.dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def integers(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int32)).to(self.device)

    def linear(self, sizes: list[int], num_cols: int, has_bias: bool = False) -> Linear:
        """Matrices one after the other as in a rank's file, and their bias."""
        total = sum(map(padded_rows, sizes))
        stored = torch.zeros((total, padded_cols(num_cols)), dtype=self.dtype, device=self.device)
        matrices, at = [], 0
        for size in sizes:
            weight_NK = self.floats(size, num_cols) / num_cols**0.5
            stored[at : at + size, :num_cols] = weight_NK.to(self.dtype)
            data = stored[at : at + padded_rows(size)]
            name = "float16" if self.dtype == torch.float16 else "bfloat16"
            matrices.append(self.ops.load_matrix({"data": data}, name, (size, num_cols), None))
            at += padded_rows(size)
        return Linear(tuple(matrices), self.floats(sum(sizes)) if has_bias else None)

    def stream(self, num_tokens: int) -> tuple[Stream, torch.Tensor]:
        """A stream to which a product was added, and the residual that its consumer should see, in
        float32."""
        residual_TD = self.floats(num_tokens, self.spec.hidden_size)
        partial_TD = self.poisoned(*residual_TD.shape, dtype=self.dtype)
        x, sum_TD = Stream(residual_TD.clone(), partial_TD), residual_TD
        beside = self.beside(x)
        if beside == "_partial":
            partial_TD[:] = self.rounded(*residual_TD.shape)
            sum_TD = residual_TD + partial_TD.float()
        if beside == "_parts":
            parts = self.parts(num_tokens)
            parts[:] = self.floats(*parts.shape)
            sum_TD = residual_TD + added(parts)
        return x, sum_TD

    def beside(self, x: Stream) -> str:
        """How the operations hold what is not in the residual yet."""
        return self.ops._products.beside(x)[0]

    def parts(self, num_tokens: int) -> torch.Tensor:
        """The parts of products of o and down, [SPLITS, T, D]."""
        splits, hidden = product_splits(self.config)[1], self.spec.hidden_size
        flat = self.arrays["product_parts"][: splits * PART_ROWS * hidden]
        return flat.view(splits, PART_ROWS, hidden)[:, :num_tokens]

    def added_by(self, emit: Callable[[], None], x: Stream) -> torch.Tensor:
        """What a product adds to a stream, wherever it leaves it; as near as float32 is."""
        before_TD = x.residual_TD.clone()
        self.arrays["product_parts"][:] = float("nan")
        self.run(emit)
        beside = self.beside(x)
        if beside:
            assert torch.equal(x.residual_TD, before_TD)
        if beside == "_parts":
            return added(self.parts(len(x.residual_TD)))
        return x.partial_TD if beside else x.residual_TD - before_TD

    def run(self, emit: Callable[[], None]) -> None:
        self.ops.record(emit).run()
        if self.device != "cpu":
            torch.cuda.synchronize()


def added(parts_STD: torch.Tensor) -> torch.Tensor:
    """In order."""
    total_TD = parts_STD[0].clone()
    for part_TD in parts_STD[1:]:
        total_TD += part_TD
    return total_TD


def weight_of(linear: Linear) -> torch.Tensor:
    return torch.cat([part.data_NK[: part.num_rows, : part.num_cols] for part in linear.weights])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found.double()).all(), "NaN leaked in, or an output is missing"
    return float((found.double() - expected).norm() / expected.norm())


def assert_near(found: torch.Tensor, expected: torch.Tensor, same: torch.Tensor) -> None:
    """`found` is at most twice as far from the float64 result as torch in the same dtype is."""
    assert error(found, expected) <= 2 * error(same, expected) + 1e-6, (
        error(found, expected),
        error(same, expected),
    )


def norm_of(x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
    scale = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + norm.eps)
    return x_TD * scale * torch.as_tensor(norm.weight_D).to(x_TD.dtype)


def project(x_TK: torch.Tensor, linear: Linear, dtype: torch.dtype) -> torch.Tensor:
    """x W^T + b in a dtype: float64 for what is right, the engine's for what torch makes of it."""
    y_TN = x_TK.to(dtype) @ weight_of(linear).to(dtype).T
    return y_TN if linear.bias_N is None else y_TN + torch.as_tensor(linear.bias_N).to(dtype)


def activated(sum_TD: torch.Tensor, norm: Norm, linear: Linear, dtype: torch.dtype) -> torch.Tensor:
    """What gate_up makes of a residual, in a dtype."""
    gate_TF, up_TF = project(norm_of(sum_TD.to(dtype), norm), linear, dtype).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TF) * up_TF


both_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
# One token, a tile's edge, both sides of the bound, and two tiles.
every_way = pytest.mark.parametrize(
    ("spec", "num_tokens"),
    [
        *((spec, num) for spec in (SPEC, PLAIN) for num in (1, 16, 17, 20, 21, 37)),
        *((WIDE, num) for num in (3, 17, 50, 100)),
    ],
    ids=lambda it: {SPEC: "biased", PLAIN: "plain", WIDE: "wide"}.get(it, str(it)),
)
