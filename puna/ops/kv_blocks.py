"""Copying KV blocks, for every backend whose cache NumPy can reach."""

from __future__ import annotations

from puna.quant import Array


def copy_blocks(kv_arrays: tuple[Array, ...], copies_C2: Array) -> None:
    """Copy blocks (source, destination), axis 2 of each array; reads all before it writes any."""
    for array in kv_arrays:
        array[:, :, copies_C2[:, 1]] = array[:, :, copies_C2[:, 0]]
