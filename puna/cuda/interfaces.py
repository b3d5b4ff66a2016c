"""What CudaOps is made of: kernels by name, a recorder, and perhaps operations of the target's own.

Protocols, and what a stored matrix is; tests have kernels and recorders that need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from puna.batch import ForwardBatch
from puna.ops import LayerCache, Linear, Norm, Program, RopeTable, Stream

# A torch.Tensor. The model's types say Array: what they hold is whatever the device's arrays are.
Tensor = Any
Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored matrix: num_rows x num_cols within data_NK, which is padded with zeros."""

    data_NK: Tensor
    num_rows: int
    num_cols: int


def joined(linear: Linear) -> Tensor:
    """The matrices of a product as one: they follow each other in the rank's file."""
    parts: list[Matrix] = list(linear.weights)
    first = parts[0].data_NK
    end = first.data_ptr()
    for part in parts:
        data_NK = part.data_NK
        assert data_NK.data_ptr() == end and data_NK.shape[1] == first.shape[1], (
            "matrices of one product lie apart"
        )
        end += data_NK.numel() * data_NK.element_size()
    num_rows = sum(len(part.data_NK) for part in parts)
    return first.as_strided((num_rows, first.shape[1]), (first.shape[1], 1))


class Kernels(Protocol):
    """The engine's compiled kernels by name. `puna.cuda.library.Library` on a GPU."""

    def launch(
        self, name: str, grid: Grid, arguments: tuple[Tensor | int, ...], overlaps: bool
    ) -> None:
        """Run on the current stream; tensors are passed as pointers, numbers as int32.

        `overlaps`: it may start before the kernel in front has ended, if it was compiled for that.
        """
        ...

    def constant(self, name: str, key: str) -> int:
        """What the kernel was compiled with."""
        ...


class Recorder(Protocol):
    """How launches become a program: `puna.cuda.graphs.GraphRecorder` on a GPU."""

    def prepare(self, call: Callable[[], None]) -> None:
        """Run at once, on the stream that launches are recorded from."""
        ...

    def record(self, emit: Callable[[], None]) -> Program: ...


class FusedOps(Protocol):
    """Operations for some tokens at once that are kernels of their own on some target.

    Those named in `operations` are used up to some number of tokens (attention: of a decode batch;
    qkv too, unless `out` is there for what attends to others), the others are as they are without.
    They read the residual and add straight into it, and never touch `partial`. `weight_XK` are q,
    k, v or gate, up one after the other, each padded to a multiple of 16 rows.
    """

    @property
    def operations(self) -> frozenset[str]:
        """Of qkv, attention, out, gate_up, down, head: those that there are."""
        ...

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

    def out(self, attended_TQ: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        """The product behind attention, where something else has attended."""
        ...

    def gate_up(
        self, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None, act_TF: Tensor
    ) -> None: ...

    def down(self, act_TF: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None: ...

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, weight_NK: Tensor, logits_LV: Tensor
    ) -> None: ...

    def sample_greedy(self, rows_L: Tensor, last_tokens_R: Tensor, out_tokens_L: Tensor) -> None:
        """As `CudaOps.sample_greedy`, of the logits that `head` wrote last. A token is -1 where a
        kernel waited in vain for another."""
        ...

    def finish(self) -> None:
        """Launch what was held back: an operation may wait to see which one comes next. Called
        before anything else is launched, and at the end of a recording."""
        ...


class SwigluProduct(Protocol):
    """gate_up of many tokens as one kernel: `puna.cuda.swiglu.Swiglu`."""

    def gate_up(
        self,
        x_TK: Tensor,
        weight_XK: Tensor,
        bias_N: Tensor | None,
        act_TF: Tensor,
        overlaps: bool,
    ) -> None: ...
