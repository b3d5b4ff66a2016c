"""gate_up of many tokens on sm_90 (csrc/swiglu_sm90.cu), emulated on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import emulator
import pytest
import torch
from cuda_configs import cuda_config
from emulator import EmulatedDriver, EmulatedLibrary

from puna.cuda.source_table import cuda_sources
from puna.cuda.swiglu import Swiglu, swiglu
from puna.cuda_memory import padded_rows
from puna.spec import ModelSpec

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")

# Chunks of columns that go round the ring; rows that end within a tile.
BIASED = ModelSpec(320, 448, 1, 4, 4, 64, 300, 512, mlp_bias=True)
PLAIN = ModelSpec(128, 128, 1, 4, 4, 64, 300, 512)


@pytest.mark.parametrize(
    ("spec", "dtype", "num_tokens", "num_multiprocessors"),
    [
        (BIASED, "float16", 300, 5),
        (BIASED, "bfloat16", 257, 2),
        (PLAIN, "float16", 128, 4),
        (PLAIN, "bfloat16", 1, 8),
    ],
)
def test_gate_up(
    tmp_path: Path,
    spec: ModelSpec,
    dtype: Literal["float16", "bfloat16"],
    num_tokens: int,
    num_multiprocessors: int,
) -> None:
    config, kind = cuda_config(spec, dtype), getattr(torch, dtype)
    sources = [it for it in cuda_sources(config) if it.name == "swiglu"]
    library, driver = EmulatedLibrary(sources, tmp_path), EmulatedDriver()
    given: Any = library, driver, num_multiprocessors
    ops = swiglu(config, *given)
    assert isinstance(ops, Swiglu)
    random = torch.Generator().manual_seed(num_tokens)
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    x_TK = torch.randn((num_tokens + 3, hidden), generator=random).to(kind)
    x_TK[num_tokens:] = float("nan")
    weight_XK = torch.zeros(2 * padded_rows(ffn), hidden, dtype=kind)
    for first in (0, padded_rows(ffn)):
        weight_NK = torch.randn((ffn, hidden), generator=random) / hidden**0.5
        weight_XK[first : first + ffn] = weight_NK.to(kind)
    bias_N = torch.randn(2 * ffn, generator=random) if spec.mlp_bias else None
    act_TF = torch.full((num_tokens + 1, ffn), float("nan"), dtype=kind)
    ops.gate_up(x_TK[:num_tokens], weight_XK, bias_N, act_TF[:num_tokens], True)
    y_TX = x_TK[:num_tokens].float() @ weight_XK.float().T
    gate_TF, up_TF = (y[:, :ffn] for y in y_TX.chunk(2, -1))
    if bias_N is not None:
        gate_TF, up_TF = gate_TF + bias_N[:ffn], up_TF + bias_N[ffn:]
    expected_TF = torch.nn.functional.silu(gate_TF) * up_TF
    rounded_TF = expected_TF.to(kind).float()
    error = (act_TF[:num_tokens].float() - expected_TF).norm()
    assert error < 1.1 * (rounded_TF - expected_TF).norm()
    assert act_TF[num_tokens].isnan().all()
