"""Weights on their way to a GPU, here to torch on a CPU: the bytes of the file, or the recipe's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import puna.runtime.cuda_load  # noqa: E402
from puna.builder import build, plan_checkpoint  # noqa: E402
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset  # noqa: E402
from puna.engine import EngineConfig, read_config  # noqa: E402
from puna.errors import EngineError  # noqa: E402
from puna.manifest import CHUNK_BYTES, find_file, read_manifest  # noqa: E402
from puna.plan import BuildConfig  # noqa: E402
from puna.rank_file import rank_file, rank_file_name, rank_weights  # noqa: E402
from puna.runtime.cuda_load import generate_weights_on, reading, weight_views  # noqa: E402
from puna.runtime.limits import check_gpu_memory  # noqa: E402
from puna.runtime.load import generate_weights  # noqa: E402

# Odd sizes, so that every matrix has padding.
SHAPE = "hidden=72,layers=2,heads=4,kv_heads=2,head_dim=18,ffn=100,vocab=333,tied=false"


def planned(dtype: str = "float16", shape: str = SHAPE, **options) -> EngineConfig:
    checkpoint = DummyCheckpoint(parse_preset(shape), seed=3)
    return plan_checkpoint(checkpoint, BuildConfig(dtype=dtype, target="sm_90", **options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE + ",attention_bias=true,mlp_bias=true"])
def test_a_recipe_gives_the_bytes_that_a_build_would_write(dtype: str, shape: str) -> None:
    config = planned(dtype, shape)
    layout = rank_file(config, 0, "0" * 64)
    counted: list[int] = []
    expected = generate_weights(config, 0, layout, lambda more: None)
    data = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = weight_views(data, layout)
    generate_weights_on(config, 0, views, counted.append)
    assert list(views) == list(expected)
    for name, array in expected.items():
        assert views[name].shape == array.shape, name
        found = views[name].view(torch.uint8).numpy()
        np.testing.assert_array_equal(found, array.view(np.uint8), name)
    assert sum(counted) == sum(array.nbytes for array in expected.values())
    assert any(not weight.weight.is_matrix for weight in rank_weights(config, 0))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine of several chunks, the last of them short, read in pieces that do not fit them."""
    monkeypatch.setattr(puna.runtime.cuda_load, "_PIECE_BYTES", 3_000_017)
    shape = "hidden=512,layers=2,heads=8,kv_heads=4,ffn=1536,vocab=20000"
    path = build(
        DummyCheckpoint(parse_preset(shape)), tmp_path / "engine", BuildConfig(), materialize=True
    ).path
    assert (path / "rank0.safetensors").stat().st_size > 2 * CHUNK_BYTES
    return path


def read(engine: Path, threads: int = 3) -> tuple[torch.Tensor, list[int]]:
    config = read_config(engine)
    layout = rank_file(config, 0, config.digest())
    out = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    file = find_file(engine, read_manifest(engine), rank_file_name(0))
    counted: list[int] = []
    with reading(engine, file, layout, out, threads, counted.append) as wait:
        wait()
    return out, counted


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_a_file_arrives_as_it_is(engine: Path, threads: int) -> None:
    out, counted = read(engine, threads)
    expected = (engine / "rank0.safetensors").read_bytes()
    assert out.numpy().tobytes() == expected and sum(counted) == len(expected)


@pytest.mark.parametrize("at", [-1, 2 * CHUNK_BYTES, CHUNK_BYTES + 5])
def test_a_changed_byte_is_found(engine: Path, at: int) -> None:
    path = engine / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"damaged: rank0\.safetensors was changed: copy or"):
        read(engine)


def test_another_size_or_none_is_found(engine: Path) -> None:
    path = engine / "rank0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    message = f"rank0.safetensors has {len(whole) - 1:,} bytes instead of {len(whole):,}"
    with pytest.raises(EngineError, match=re.escape(message)):
        read(engine)
    path.unlink()
    with pytest.raises(EngineError, match=r"damaged: rank0\.safetensors is missing"):
        read(engine)


def test_a_file_that_shrinks_while_it_is_read(engine: Path) -> None:
    config = read_config(engine)
    layout = rank_file(config, 0, config.digest())
    out = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    file = find_file(engine, read_manifest(engine), rank_file_name(0))

    def shrink(more: int) -> None:
        with path.open("r+b") as opened:
            opened.truncate(CHUNK_BYTES + 100)

    path = engine / "rank0.safetensors"
    with (
        reading(engine, file, layout, out, 1, shrink) as wait,
        pytest.raises(EngineError, match=r"rank0\.safetensors was truncated"),
    ):
        wait()


def test_leaving_early_ends_the_threads(engine: Path) -> None:
    config = read_config(engine)
    layout = rank_file(config, 0, config.digest())
    out = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    file = find_file(engine, read_manifest(engine), rank_file_name(0))
    with (
        pytest.raises(KeyError),
        reading(engine, file, layout, out, 1, lambda more: None),
    ):
        raise KeyError("something else went wrong")


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    config = planned(shape="llama-2-7b", max_batch_size=8)
    needed = config.memory[0].total + 400 * 2**20
    blocks = config.limits.num_blocks
    check_gpu_memory(config, 0, blocks, "NVIDIA X", needed)
    with pytest.raises(EngineError) as caught:
        check_gpu_memory(config, 0, blocks, "NVIDIA X", needed - 1)
    message = str(caught.value)
    assert "of NVIDIA X's memory (13.5 GB weights" in message and "are free" in message
    suggested = re.search(r"lower --kv-cache-bytes to (\d+) or less", message)
    assert suggested
    block = config.memory[0].kv_cache // blocks
    assert int(suggested[1]) == (blocks - 1) * block
    check_gpu_memory(config, 0, int(suggested[1]) // block, "NVIDIA X", needed - 1)
    with pytest.raises(EngineError, match="use a GPU with more memory"):
        check_gpu_memory(config, 0, blocks, "NVIDIA X", config.memory[0].weights)
