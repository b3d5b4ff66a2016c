"""CudaOps: every operation as launches on the current CUDA stream, recorded as a CUDA graph.

This file decides which kernels an operation is, and which product goes to cuBLAS; how many
tokens decide between them is in `puna.cuda.choices`. It knows nothing of how a kernel computes.

The residual is float32; what feeds a product, and `partial`, have the engine's dtype. Up to
`Choices.direct_tokens` tokens, and always where the engine runs deterministically, products with
few rows add straight into the residual and `partial` is not touched; beyond, cuBLAS writes
`partial` and the consumer adds it. Which of the two depends on the stream's number of tokens alone,
so operations of one step may be recorded apart.

Shape suffixes as in `puna.ops`; X = rows of several matrices together, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from puna.batch import ForwardBatch
from puna.cuda.choices import Choices
from puna.engine import EngineConfig
from puna.ops import LayerCache, Norm, Program, RopeTable, Stream

Tensor = torch.Tensor
Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix: num_rows x num_cols within data_NK, which is padded with zeros."""

    data_NK: Tensor
    num_rows: int
    num_cols: int


class Kernels(Protocol):
    """The engine's compiled kernels by name. `puna.cuda.library.Library` on a GPU."""

    def launch(self, name: str, grid: Grid, arguments: tuple[Tensor | int, ...]) -> None:
        """Run on the current stream; tensors are passed as pointers, numbers as int32."""
        ...

    def constant(self, name: str, key: str) -> int:
        """What the kernel was compiled with."""
        ...


class Recorder(Protocol):
    """How launches become a program: `puna.cuda.graphs.GraphRecorder` on a GPU."""

    def record(self, emit: Callable[[], None]) -> Program: ...


class FusedOps(Protocol):
    """Operations for a few tokens at once that are kernels of their own on some target.

    They are used up to `Choices.fused_tokens` tokens of a decode batch, add straight into the
    residual, and never touch `partial`.
    """

    def qkv(
        self,
        x: Stream,
        norm: Norm,
        weight_XK: Tensor,
        bias_N: Tensor | None,
        rope: RopeTable,
        batch: ForwardBatch,
        cache: LayerCache,
        q_TQ: Tensor,
    ) -> None: ...

    def attention(
        self,
        q_TQ: Tensor,
        batch: ForwardBatch,
        cache: LayerCache,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        x: Stream,
    ) -> None: ...

    def gate_up(
        self, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None, act_TF: Tensor
    ) -> None: ...

    def down(self, act_TF: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None: ...

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, weight_NK: Tensor, logits_LV: Tensor
    ) -> None: ...


class CudaOps:
    """Operations of one rank. `arrays` are those of `memory.workspace_specs(config, rank, "cuda")`
    as torch tensors on the GPU; ForwardBatch, caches and weights hold torch tensors as well.

    `deterministic`: a row's result depends on nothing but the row (products and attention in one
    fixed order, whatever the batch). `fused` are kernels for a few tokens, where the target has
    some.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        kernels: Kernels,
        arrays: dict[str, Tensor],
        recorder: Recorder,
        choices: Choices,
        *,
        deterministic: bool = False,
        fused: FusedOps | None = None,
    ) -> None: ...

    def load_matrix(
        self,
        arrays: dict[str, Tensor],
        format_name: str,
        shape: tuple[int, int],
        out_NK: Tensor | None,
    ) -> Matrix: ...

    def record(self, emit: Callable[[], None]) -> Program: ...

    def sample_greedy(
        self, logits_LV: Tensor, rows_L: Tensor, last_tokens_R: Tensor, out_tokens_L: Tensor
    ) -> None:
        """out_tokens[l] = last_tokens[rows[l]] = the largest of logits[l], the lowest id where
        several are; rows below 0 write no last token."""
        ...

    def copy_blocks(self, kv_arrays: tuple[Tensor, ...], copies_C2: Any) -> None:
        """Copy KV blocks (source, destination) on the current stream, at once."""
        ...
