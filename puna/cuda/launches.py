"""Launches: how the kernels of an operation come to be part of a program, and may overlap.

Knows nothing of operations. A program is emitted twice: once to prepare (cuBLAS alone runs), once
to be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from puna.cuda.choices import Choices
from puna.cuda.interfaces import FusedOps, Grid, Kernels, Recorder, Tensor
from puna.ops import Program


class Launches:
    """`fused`: operations that may hold launches back. `zeros_N`: as many as any product has
    columns, in its dtype."""

    def __init__(
        self,
        kernels: Kernels,
        recorder: Recorder,
        choices: Choices,
        fused: tuple[FusedOps, ...],
        zeros_N: Tensor,
    ) -> None:
        self._kernels = kernels
        self._recorder = recorder
        self._choices = choices
        self._fused = fused
        self._zeros_N = zeros_N
        self._state = "idle"
        self._is_behind_a_kernel = False  # of puna's own
        self._known_products: set[tuple[int, int, int]] = set()

    def record(self, emit: Callable[[], None]) -> Program:
        assert self._state == "idle", "already recording"
        try:
            # cuBLAS allocates and loads when it meets a product for the first time, which it may
            # not do while a graph is recorded. What it writes then is scratch between two steps.
            self._state = "preparing"
            self._recorder.prepare(emit)
            self._state = "recording"
            self._is_behind_a_kernel = False
            return self._recorder.record(partial(self._emit, emit))
        finally:
            self._state = "idle"

    def launch(self, name: str, grid: Grid, arguments: tuple[Tensor | int, ...]) -> None:
        self.own(partial(self._kernels.launch, name, grid, arguments))

    def own(self, launch: Callable[[bool], None]) -> None:
        """Launch a kernel of puna's, given whether it may overlap the one in front."""
        if self._is_recording():
            self._finish_fused()
            launch(self._choices.overlaps and self._is_behind_a_kernel)
            self._is_behind_a_kernel = True

    def fused(self, call: Callable[[], None]) -> None:
        """An operation that launches, or holds back, its kernels itself."""
        if self._is_recording():
            call()
            self._is_behind_a_kernel = False  # that waits as those of `own` do

    def product(self, x_TK: Tensor, w_NK: Tensor, y_TN: Tensor) -> None:
        """y = x W^T by cuBLAS, of the first rows and columns of W."""
        (num_tokens, num_cols), num_rows = x_TK.shape, y_TN.shape[1]
        key = (num_tokens, num_rows, num_cols)
        if self._is_recording() or key not in self._known_products:
            self._finish_fused()
            w_KN = w_NK[:num_rows, :num_cols].T
            if num_tokens <= self._choices.biased_tokens:
                torch.addmm(self._zeros_N[:num_rows], x_TK, w_KN, out=y_TN)
            else:
                torch.mm(x_TK, w_KN, out=y_TN)
            self._known_products.add(key)
            self._is_behind_a_kernel = False

    def _emit(self, emit: Callable[[], None]) -> None:
        emit()
        self._finish_fused()

    def _finish_fused(self) -> None:
        for fused in self._fused:
            fused.finish()

    def _is_recording(self) -> bool:
        assert self._state != "idle", "operations are called inside record() only"
        return self._state == "recording"
