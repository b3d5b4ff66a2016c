"""Dummy weights: the same bits whatever the slice, and shapes by name."""

from __future__ import annotations

import numpy as np
import pytest

from puna.checkpoint import Checkpoint
from puna.checkpoint.dummy import PRESETS, DummyCheckpoint, parse_preset
from puna.dummy_values import counter_bits, dummy_keys, dummy_values
from puna.errors import CheckpointError

TINY = "hidden=48,layers=2,heads=4,kv_heads=2,ffn=100,vocab=333"


def bits_by_hand(key0: int, key1: int, index: int) -> int:
    """The definition, in Python's integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    x = mix(index % 2**32 ^ key0)
    return mix(x ^ (index >> 32) * 0x9E3779B9 % 2**32 ^ key1)


def test_counter_bits_are_the_definition() -> None:
    index = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**64 - 1]
    found = counter_bits(0xDEADBEEF, 0x12345678, np.array(index, np.uint64))
    assert found.dtype == np.uint32
    assert found.tolist() == [bits_by_hand(0xDEADBEEF, 0x12345678, i) for i in index]


def test_values_are_the_definition() -> None:
    found = dummy_values(3, "x", 7, slice(2**33, 2**33 + 2), slice(2, 5))
    keys = dummy_keys(3, "x")
    for n in range(2):
        for k in range(3):
            bits = bits_by_hand(*keys, (2**33 + n) * 7 + k + 2)
            assert found[n, k] == (sum(bits.to_bytes(4, "little")) - 510) / 8192


def test_slices_are_slices_of_the_whole() -> None:
    whole = dummy_values(0, "w", 700, slice(0, 300), slice(None))
    assert whole.shape == (300, 700)
    rng = np.random.default_rng(0)
    for _ in range(20):
        (a, b), (c, d) = (sorted(rng.integers(0, n + 1, 2).tolist()) for n in whole.shape)
        assert np.array_equal(dummy_values(0, "w", 700, slice(a, b), slice(c, d)), whole[a:b, c:d])


def test_values_are_near_normal_and_exact_in_float16() -> None:
    x = dummy_values(0, "w", 1000, slice(0, 1000), slice(None))
    assert abs(x.mean()) < 1e-4
    assert 0.0179 < x.std() < 0.0182
    assert np.abs(x).max() <= 510 / 8192
    assert np.array_equal(x.astype(np.float16).astype(np.float32), x)
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 5e-3
    assert not np.array_equal(x, dummy_values(1, "w", 1000, slice(0, 1000), slice(None)))
    assert not np.array_equal(x, dummy_values(0, "v", 1000, slice(0, 1000), slice(None)))


def test_checkpoint() -> None:
    found: Checkpoint = DummyCheckpoint(parse_preset(TINY), seed=1)
    assert (found.kind, found.files(), found.tokenizer_files()) == ("dummy", (), {})
    for name in found.names():
        whole = found.load(name)
        assert whole.shape == found.shape(name)
        assert found.format(name).name == "float16"
        assert whole.dtype == np.float32
        if whole.ndim == 1:
            assert np.array_equal(found.load(name, slice(3, 9)), whole[3:9])
            assert 0.9 < whole.mean() < 1.1
        else:
            assert np.array_equal(found.load(name, slice(3, 9), slice(5, 7)), whole[3:9, 5:7])
            assert np.array_equal(whole.astype(np.float16).astype(np.float32), whole)


@pytest.mark.parametrize("text", [*PRESETS, TINY + ",attention_bias=true,mlp_bias=1,tied=true"])
def test_names_and_shapes_are_the_weight_table(text: str) -> None:
    weights = pytest.importorskip("puna.weights")
    spec = parse_preset(text)
    found = DummyCheckpoint(spec)
    table = {w.name: w.shape for w in weights.checkpoint_weights(spec)}
    assert {name: found.shape(name) for name in found.names()} == table


def num_parameters(name: str) -> float:
    found = DummyCheckpoint(PRESETS[name])
    return sum(int(np.prod(found.shape(n))) for n in found.names())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert num_parameters(name) == count


def test_preset_with_changes() -> None:
    spec = parse_preset("llama-3-8b, num_layers=2, theta=7")
    assert (spec.num_layers, spec.hidden_size, spec.rope.theta) == (2, 4096, 7.0)


def test_free_shape() -> None:
    spec = parse_preset(TINY)
    assert (spec.head_dim, spec.num_kv_heads, spec.max_position_embeddings) == (12, 2, 2048)
    assert parse_preset(TINY + ",head_dim=32,rope_theta=5e5").q_size == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-9", "there is no preset 'llama-9'; there are llama-2-7b, llama-2-13b"),
        ("", "there is no preset ''"),
        ("hidden=64", "lacks num_layers, num_heads.*or name a preset: llama-2-7b"),
        (TINY + ",colour=3", "has no 'colour'; it has hidden, ffn"),
        (TINY + ",layers=x", "layers is 'x'; it must be int"),
        (TINY + ",layers=0", "num_layers is 0"),
        (TINY + ",tied=maybe", "tied is 'maybe'; it must be bool"),
        (TINY + ",heads=0", "num_heads is 0"),
        (TINY + ",eps=nan", "rms_norm_eps is nan"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_preset(text)
