"""The C structs and functions of the native library, as ctypes sees them.

Mirrors `puna/native/csrc/kernels.h`, `program.h` and `abi.cpp`; the library's digest of its sources
keeps the two from drifting apart in an installation.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p


class Matrix(Structure):
    """A packed matrix [n, k]."""

    _fields_ = (
        ("kind", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("group", c_int32),
        ("has_min", c_int32),
        ("scale_f32", c_int32),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("min", c_void_p),
    )


class Linear(Structure):
    """Up to three matrices whose rows follow each other, and a bias or null."""

    _fields_ = (("num_parts", c_int32), ("parts", Matrix * 3), ("bias", c_void_p))


class Stream(Structure):
    _fields_ = (
        ("residual_TD", c_void_p),
        ("partial_TD", c_void_p),
        ("num_tokens", c_int32),
        ("hidden_size", c_int32),
    )


class Norm(Structure):
    _fields_ = (("weight_D", c_void_p), ("eps", c_float))


class Batch(Structure):
    _fields_ = (
        ("positions_T", c_void_p),
        ("slots_T", c_void_p),
        ("query_start_S1", c_void_p),
        ("seq_lens_S", c_void_p),
        ("block_table_SM", c_void_p),
        ("num_seqs", c_int32),
        ("max_blocks", c_int32),
    )


class Rope(Structure):
    _fields_ = (("cos_PE", c_void_p), ("sin_PE", c_void_p))


class Cache(Structure):
    """One layer's KV cache; the scales are null unless it is int8."""

    _fields_ = (
        ("kind", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("keys_NKEP", c_void_p),
        ("values_NKPE", c_void_p),
        ("key_scales_NKP", c_void_p),
        ("value_scales_NKP", c_void_p),
    )


class Acts(Structure):
    """Rows of activations in several forms."""

    _fields_ = (
        ("stride", c_int64),
        ("f", c_void_p),
        ("b", c_void_p),
        ("q32", c_void_p),
        ("q16", c_void_p),
    )


class Scratch(Structure):
    _fields_ = (
        ("acts", Acts),
        ("kv_TX", c_void_p),
        ("attended_TQ", c_void_p),
        ("attn_part", c_void_p),
        ("max_chunks", c_int32),
    )


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions that `puna.cpu` calls their types; returns the library."""
    arrays, handle, flag = c_void_p, c_void_p, c_int
    x, norm, linear = POINTER(Stream), POINTER(Norm), POINTER(Linear)
    batch, cache = POINTER(Batch), POINTER(Cache)
    for name, result, arguments in (
        ("instruction_sets", c_char_p, []),
        ("machine_new", handle, [c_int, c_char_p]),
        ("machine_free", None, [handle]),
        ("program_new", handle, [handle, POINTER(Scratch)]),
        ("program_free", None, [handle]),
        ("program_embed", flag, [handle, arrays, linear, x]),
        (
            "program_qkv",
            flag,
            [handle, x, norm, linear, POINTER(Rope), batch, cache, arrays, c_int],
        ),
        ("program_attention", flag, [handle, arrays, c_int, batch, cache, linear, x]),
        ("program_gate_up", flag, [handle, x, norm, linear, arrays]),
        ("program_down", flag, [handle, arrays, linear, x]),
        ("program_head", flag, [handle, x, arrays, c_int, norm, linear, arrays, c_int64]),
        ("program_end", flag, [handle]),
        ("program_run", flag, [handle]),
    ):
        function = getattr(library, f"puna_{name}")
        function.restype, function.argtypes = result, arguments
    return library
