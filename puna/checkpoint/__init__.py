"""Checkpoint: published weights, in any format, seen as canonical tensors.

`open_checkpoint` looks at a path and picks the reader. Each reader adapts its format to puna's names
(`puna.weights`), puna's half-split RoPE, and `ModelSpec`; nothing above this package knows which
format the weights came from.
"""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from pathlib import Path
from typing import Protocol

from puna.quant import Array, Format, QuantTensor
from puna.spec import GenerationDefaults, ModelSpec

FULL = slice(None)


class Checkpoint(Protocol):
    """Weights that can be read by canonical name, a slice at a time.

    Tensors are [N, K] matrices (output rows first) or [N] vectors. A reader opens lazily: opening reads
    headers only, and `load` reads (from a memory map where it can) only the rows asked for.
    """

    kind: str  # "hf", "meta", "gguf" or "dummy"
    source: str  # what the user named: a path or a hub id
    spec: ModelSpec
    generation: GenerationDefaults

    def names(self) -> frozenset[str]:
        """Canonical names of all tensors held, buffers that follow from the config left out."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers."""
        ...

    def format(self, name: str) -> Format:
        """The dense dtype, or the format that holds the checkpoint's quantised blocks exactly.

        Quantised types that no puna format holds exactly are given as dense float32.
        """
        ...

    def load(self, name: str, rows: slice = FULL, cols: slice = FULL) -> Array:
        """Floats of a slice: the stored dtype, or float32 where blocks were dequantised."""
        ...

    def load_quantized(self, name: str, rows: slice = FULL, cols: slice = FULL) -> QuantTensor:
        """The blocks of a slice, not requantised. `cols` must begin and end at group boundaries."""
        ...

    def notes(self) -> tuple[str, ...]:
        """One line each on what the reader had to decide (shown by `puna plan` and kept in the engine)."""
        ...

    def files(self) -> tuple[Path, ...]:
        """Files whose digests identify the weights (empty for dummy weights)."""
        ...

    def tokenizer_files(self) -> MappingABC[str, bytes]:
        """What belongs in the engine's tokenizer/ directory, by file name; empty without a tokenizer."""
        ...

    def close(self) -> None: ...
