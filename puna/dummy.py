"""DummyWeights: weights that are computed, not stored, for engines and checkpoints without a model.

Both the build (`puna.checkpoint.dummy`) and a session that opens a dummy engine read from here, so
the two halves agree on every bit without knowing each other.
"""

from __future__ import annotations

import numpy as np

from puna.dummy_values import dummy_values
from puna.quant import Array, Format, QuantTensor
from puna.spec import ModelSpec
from puna.weights import checkpoint_weights

FULL = slice(None)


class DummyWeights:
    """A `puna.shard.WeightSource` of near-normal values (standard deviation 0.018).

    Norms are 1 plus such a value. Every value is exact in float32, and all but the norms in
    float16.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.shapes = {weight.name: weight.shape for weight in checkpoint_weights(spec)}
        self.seed = seed

    def format(self, name: str) -> Format:
        return Format.dense("float16")

    def load(self, name: str, rows: slice = FULL, cols: slice = FULL) -> Array:
        shape = self.shapes[name]
        num_cols = shape[1] if len(shape) == 2 else 1
        rows, cols = slice(*rows.indices(shape[0])), slice(*cols.indices(num_cols))
        values = dummy_values(self.seed, name, num_cols, rows, cols)
        if len(shape) == 1:
            values = values[:, 0]
        return values + np.float32(1) if name.endswith("norm.weight") else values

    def load_quantized(self, name: str, rows: slice = FULL, cols: slice = FULL) -> QuantTensor:
        raise AssertionError(f"dummy {name} is dense")
