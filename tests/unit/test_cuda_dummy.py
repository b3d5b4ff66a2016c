"""Dummy weights as a GPU makes them, here by torch on a CPU: the bits of `puna.dummy_values`."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import puna.runtime.cuda_dummy  # noqa: E402
from puna.dummy_values import dummy_values  # noqa: E402
from puna.quant import DTYPES  # noqa: E402
from puna.runtime.cuda_dummy import fill_dummy_matrix  # noqa: E402


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("num_cols", "rows", "cols"),
    [
        (1, slice(0, 33), slice(0, 1)),
        (70, slice(0, 200), slice(0, 70)),
        (4096, slice(5, 70), slice(0, 4096)),
        (300, slice(11, 50), slice(100, 231)),
        (2**20, slice(4094, 4098), slice(2**20 - 7, 2**20)),  # across index 2^32
        (2**20, slice(9000, 9003), slice(0, 50)),  # beyond it
    ],
)
def test_the_same_bits(
    num_cols: int, rows: slice, cols: slice, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puna.runtime.cuda_dummy, "_CHUNK", 1000)  # so that there are several
    expected = dummy_values(7, "layers.3.attn.q.weight", num_cols, rows, cols)
    out = torch.zeros((len(expected), expected.shape[1] + 3), dtype=getattr(torch, dtype))
    part = out[:, : expected.shape[1]]
    fill_dummy_matrix(part, 7, "layers.3.attn.q.weight", num_cols, rows.start, cols.start)
    bits = torch.int32 if dtype == "float32" else torch.int16
    stored = expected.astype(DTYPES[dtype])
    np.testing.assert_array_equal(part.view(bits).numpy(), stored.view(f"i{stored.itemsize}"))
    assert not out[:, expected.shape[1] :].any(), "the padding stays zero"


def test_every_value_of_a_matrix_rounds_alike() -> None:
    """All 1,021 sums of four bytes, in the dtype that has to round them."""
    expected = dummy_values(0, "embed.weight", 4096, slice(0, 1024), slice(0, 4096))
    assert len(np.unique(expected)) > 900
    out = torch.empty(expected.shape, dtype=torch.bfloat16)
    fill_dummy_matrix(out, 0, "embed.weight", 4096, 0, 0)
    stored = expected.astype(DTYPES["bfloat16"]).view(np.int16)
    np.testing.assert_array_equal(out.view(torch.int16).numpy(), stored)
