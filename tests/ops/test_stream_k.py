"""The stream-K products of sm_90: how they are cut, and the kernel, emulated on the CPU."""

from __future__ import annotations

from typing import Any

import emulator
import pytest
import torch
from cuda_configs import cuda_config
from emulator import EmulatedDriver, EmulatedLibrary

from puna.cuda.source_table import cuda_sources
from puna.cuda.stream_k import StreamK
from puna.cuda.stream_k_plan import MAX_CTAS, PART_TOKENS, Cut, part_numbers, stream_k_cuts
from puna.engine import EngineConfig
from puna.spec import ModelSpec

Tensor = Any
# Rows of qkv and of the vocabulary end within a block; biased.
SPEC = ModelSpec(1024, 1408, 2, 16, 4, 64, 1001, 512, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[EngineConfig, Any]]:
    found = {}
    for dtype in ("float16", "bfloat16"):
        config = cuda_config(SPEC, dtype, max_batch_size=64)
        sources = [it for it in cuda_sources(config) if it.name.startswith("stream_k")]
        found[dtype] = config, EmulatedLibrary(sources, tmp_path_factory.mktemp(dtype))
    return found


def products(config: EngineConfig, library: Any, num_ctas: int) -> StreamK:
    parts = torch.full((part_numbers(config),), float("nan"))
    driver: Any = EmulatedDriver()
    return StreamK(config, library, driver, parts, num_ctas)


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    ("dtype", "role", "num_tokens", "num_ctas"),
    [
        ("float16", "qkv", 17, 3),
        ("bfloat16", "o", 32, 7),
        ("float16", "down", 33, 6),
        ("bfloat16", "gate_up", 64, 5),
        ("float16", "down", 64, 3),
        ("bfloat16", "qkv", 50, 10),
    ],
)
def test_parts(
    made: dict[str, tuple[EngineConfig, Any]],
    dtype: str,
    role: str,
    num_tokens: int,
    num_ctas: int,
) -> None:
    config, library = made[dtype]
    cut = stream_k_cuts(config)[role]
    random = torch.Generator().manual_seed(num_tokens)
    kind = getattr(torch, dtype)
    # Tokens beyond those asked for are there, and no numbers.
    x_MK = torch.randn((num_tokens + 5, cut.num_cols), generator=random).to(kind)
    x_MK[num_tokens:] = float("nan")
    w_NK = torch.randn((cut.num_rows, cut.num_cols), generator=random).to(kind)
    bias_N = torch.randn(cut.num_rows, generator=random) * 10 if role != "qkv" else None
    stream_k = products(config, library, num_ctas)
    stream_k.product(role, x_MK[:num_tokens], w_NK, bias_N, True)
    assert stream_k.cut(role)[0] == num_ctas
    y_MN = whole(stream_k, cut, num_tokens, num_ctas)
    expected_MN = x_MK[:num_tokens].float() @ w_NK.float().T
    if bias_N is not None:
        expected_MN += bias_N
    error = (y_MN - expected_MN).norm() / expected_MN.norm()
    assert error < 1e-5, error


def whole(stream_k: StreamK, cut: Cut, num_tokens: int, num_ctas: int) -> Tensor:
    """The parts of a product, added as its readers do; no others may have been written."""
    size = PART_TOKENS * cut.num_rows
    parts_PMN = stream_k.parts[: cut.most_parts * size].view(-1, PART_TOKENS, cut.num_rows)
    y_MN = torch.zeros(num_tokens, cut.num_rows)
    for block in range(cut.num_blocks):
        rows = slice(block * 256, (block + 1) * 256)
        num_parts = cut.num_parts(block, num_ctas)
        assert parts_PMN[num_parts:, :, rows].isnan().all()
        assert parts_PMN[:, num_tokens:, rows].isnan().all()
        y_MN[:, rows] = parts_PMN[:num_parts, :num_tokens, rows].sum(0)
    return y_MN


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("num_rows", "num_ctas"), [(1, 2), (20, 3), (40, 8)])
def test_logits(made: dict[str, tuple[EngineConfig, Any]], num_rows: int, num_ctas: int) -> None:
    config, library = made["float16"]
    random = torch.Generator().manual_seed(num_rows)
    x_LK = torch.randn((num_rows, SPEC.hidden_size), generator=random).half()
    w_NK = torch.randn((1008, SPEC.hidden_size), generator=random).half()
    vocab = stream_k_cuts(config)["head"].num_rows
    logits_LV = torch.full((num_rows + 1, vocab), float("nan"))
    products(config, library, num_ctas).logits(x_LK, w_NK, logits_LV, True)
    expected_LV = x_LK.float() @ w_NK[:vocab].float().T
    assert (logits_LV[:-1] - expected_LV).norm() < 1e-5 * expected_LV.norm()
    assert logits_LV[-1].isnan().all()


@pytest.mark.parametrize(
    "cut",
    [
        Cut(12288, 4096),
        Cut(4096, 4096),
        Cut(22016, 4096),
        Cut(4096, 11008),
        Cut(3072, 2048),
        Cut(1024, 1024),
    ],
    ids=lambda cut: f"{cut.num_rows}x{cut.num_cols}",
)
def test_every_chunk_is_in_one_part(cut: Cut) -> None:
    """For every number of CTAs: who has which chunks, and how many parts readers are told of."""
    all_chunks = cut.num_blocks * cut.num_chunks
    for num_ctas in range(1, cut.num_ctas(MAX_CTAS) + 1):
        bounds = [all_chunks * cta // num_ctas for cta in range(num_ctas + 1)]
        for block in range(cut.num_blocks):
            first, last = block * cut.num_chunks, (block + 1) * cut.num_chunks
            holders = [
                cta
                for cta in range(num_ctas)
                if max(bounds[cta], first) < min(bounds[cta + 1], last)
            ]
            assert len(holders) == cut.num_parts(block, num_ctas) <= cut.most_parts
            assert holders == list(range(holders[0], holders[-1] + 1))
