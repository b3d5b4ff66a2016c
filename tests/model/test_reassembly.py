"""Engines split over ranks: their parts, put together again, are the checkpoint to the bit.

What each rank should hold is read from the extents of its schema; what it does hold, from its file
through the `safetensors` library. Padding must be zero, and copies of a KV head equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.builder import build
from puna.checkpoint import open_checkpoint
from puna.engine import EngineConfig, read_config
from puna.layout import pack_dense, pack_quantised, unpack_dense, unpack_quantised
from puna.plan import BuildConfig
from puna.quant import Format, QuantTensor, quantize, to_float32
from puna.rank_file import rank_file_name, rank_weights
from puna.weights import checkpoint_weights

Tensors = dict[str, np.ndarray]


def read_rank(engine: Path, rank: int) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(engine / rank_file_name(rank))


def reassemble(engine: Path) -> tuple[Tensors, dict[str, str]]:
    """Every canonical tensor as float32, from all ranks, and the format it was stored in."""
    config = read_config(engine)
    shapes = {weight.name: weight.shape for weight in checkpoint_weights(config.spec)}
    whole = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    formats: dict[str, str] = {}
    for rank in range(config.world_size):
        stored = read_rank(engine, rank)
        for weight in rank_weights(config, rank):
            values = stored_values(stored, weight)
            first = 0
            for part, rows in zip(weight.weight.parts, weight.rows, strict=True):
                held = values[first : first + rows.size]
                first += rows.size
                padding = [held[rows.num_source :]]
                at: tuple[slice, ...] = (rows.source,)
                held = held[: rows.num_source]
                if weight.weight.is_matrix:
                    padding.append(held[:, weight.cols.num_source :])
                    at = (rows.source, weight.cols.source)
                    held = held[:, : weight.cols.num_source]
                assert not any(zeros.any() for zeros in padding), f"{part.name}: padding"
                here = whole[part.name][at]
                assert (np.isnan(here) | (here == held)).all(), f"{part.name}: copies differ"
                whole[part.name][at] = held
                formats[part.name] = weight.format.name
            assert first == weight.num_rows
    return whole, formats


def stored_values(stored: Tensors, weight: Any) -> np.ndarray:
    if not weight.weight.is_matrix:
        return stored[weight.name]
    prefix = f"{weight.name}."
    arrays = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
    if weight.format.is_dense:
        x_NK = unpack_dense(weight.layout, arrays, *weight.shape)
        values_NK, again = to_float32(x_NK), pack_dense(weight.layout, x_NK)
    else:
        tensor = unpack_quantised(weight.layout, arrays, weight.format, *weight.shape)
        values_NK, again = tensor.dequantize(), pack_quantised(weight.layout, tensor)
    for suffix, array in arrays.items():  # what lies beyond the matrix is zero as well
        assert np.array_equal(array, again[suffix]), f"{prefix}{suffix}: padding of tiles"
    return values_NK


def published(checkpoint: Path) -> Tensors:
    opened = open_checkpoint(checkpoint)
    return {name: to_float32(opened.load(name)) for name in opened.names()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name


@pytest.mark.parametrize(
    ("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 5), (2, 2), (8, 5)]
)
def test_stories260k_over_ranks(tp: int, pp: int, stories: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    build(stories, engine, BuildConfig(tp_size=tp, pp_size=pp))
    found, formats = reassemble(engine)
    assert set(formats.values()) == {"float32"}
    assert_same(found, published(stories))
    if tp == 8:
        check_duplicated_kv_heads(engine, read_config(engine))


def check_duplicated_kv_heads(engine: Path, config: EngineConfig) -> None:
    """Four KV heads over eight ranks: ranks 2i and 2i + 1 hold KV head i, different query heads."""
    schema = {weight.name: weight for weight in rank_weights(config, 0)}
    stored = [read_rank(engine, rank) for rank in range(8)]
    for part in ("q", "k", "v"):
        weight = schema[f"layers.0.attn.{part}.weight"]
        held = [stored_values(tensors, weight) for tensors in stored]
        for i in range(0, 8, 2):
            assert held[i].shape == (config.spec.head_dim, config.spec.hidden_size)
            assert np.array_equal(held[i], held[i + 1]) == (part != "q")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_biases_are_added_by_one_rank_only(tp: int, random_llama: Any, tmp_path: Path) -> None:
    checkpoint = random_llama(attention_bias=True, mlp_bias=True, intermediate_size=98)
    engine = tmp_path / "engine"
    build(checkpoint, engine, BuildConfig(tp_size=tp))
    found, _ = reassemble(engine)
    assert_same(found, published(checkpoint))
    for rank in range(tp):
        stored = read_rank(engine, rank)
        for name in ("layers.1.attn.o.bias", "layers.1.mlp.down.bias"):
            assert stored[name].any() == (rank == 0), (name, rank)


# tp 4 and 8 pad the ffn: 172 into parts of whole groups.
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (8, 1), (4, 2)])
@pytest.mark.parametrize(
    ("quant", "group_size"), [("int8", None), ("int8", 32), ("int4", 32), ("int4", None)]
)
def test_quantised_from_floats(
    quant: Any, group_size: int | None, tp: int, pp: int, stories: Path, tmp_path: Path
) -> None:
    """A rank quantises what it holds: columns cut by tp have scales of their own, and where rows or
    whole groups are cut the integers are those of the whole matrix."""
    engine = tmp_path / "engine"
    build(stories, engine, BuildConfig(quant=quant, group_size=group_size, tp_size=tp, pp_size=pp))
    found, formats = reassemble(engine)
    for name, values in published(stories).items():
        fmt = Format.parse(formats[name])
        if values.ndim == 1:
            assert np.array_equal(found[name], values)
            continue
        assert not fmt.is_dense and fmt.group_size in (group_size or 0, 128)
        is_cut = tp > 1 and name.endswith(("attn.o.weight", "mlp.down.weight"))
        if is_cut:
            check_pieces(found[name], values, fmt)
        else:
            assert np.array_equal(found[name], quantize(values, fmt).dequantize()), name


def check_pieces(found: np.ndarray, values: np.ndarray, fmt: Format) -> None:
    """At most half a step of the whole row's scale away: a piece's scale is never larger."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    step = largest / (2 ** (fmt.bits - 1) - 1)
    assert (np.abs(found - values) <= step * (0.5 + 1e-3) + largest * 2.0**-11).all()
    assert not np.array_equal(found, values)


BLOCKS = {"Q4_0": "int4-g32", "Q4_1": "int4-g32-min", "Q8_0": "int8-g32", "Q5_1": "int8-g32-min"}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_blocks_are_kept(kind: str, tp: int, pp: int, tmp_path: Path) -> None:
    """Integers, scales and minima of the file, not merely their values, on every rank."""
    checkpoint = write_gguf(tmp_path / "model.gguf", kind)
    engine = tmp_path / "engine"
    build(checkpoint, engine, BuildConfig(tp_size=tp, pp_size=pp))
    found, formats = reassemble(engine)
    matrices = {name for name, values in found.items() if values.ndim == 2}
    assert {formats[name] for name in matrices} == {BLOCKS[kind]}
    assert_same(found, published(checkpoint))
    if (tp, pp) == (1, 1):
        check_integers(engine, checkpoint)


def write_gguf(path: Path, kind: str) -> Path:
    """Two layers with random weights in GGML blocks; heads of 32, so that tp 4 cuts no block."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    hidden, ffn, vocab, head_dim = 128, 192, 70, 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    for i in range(2):
        at = f"blk.{i}"
        shapes |= {
            f"{at}.attn_q": (128, hidden),
            f"{at}.attn_k": (64, hidden),
            f"{at}.attn_v": (64, hidden),
            f"{at}.attn_output": (hidden, 128),
            f"{at}.ffn_gate": (ffn, hidden),
            f"{at}.ffn_up": (ffn, hidden),
            f"{at}.ffn_down": (hidden, ffn),
        }
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{at}.{norm}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        ggml_type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, ggml_type), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_integers(engine: Path, checkpoint: Path) -> None:
    config, opened, stored = read_config(engine), open_checkpoint(checkpoint), read_rank(engine, 0)
    for weight in rank_weights(config, 0):
        if not weight.weight.is_matrix or weight.format.is_dense:
            continue
        prefix = f"{weight.name}."
        arrays = {n.removeprefix(prefix): stored[n] for n in stored if n.startswith(prefix)}
        unpacked = unpack_quantised(weight.layout, arrays, weight.format, *weight.shape)
        assert_same_blocks(unpacked, opened.load_quantized(weight.name))


def assert_same_blocks(found: QuantTensor, expected: QuantTensor) -> None:
    assert np.array_equal(found.q_NK, expected.q_NK)
    assert np.array_equal(found.scale_NG, expected.scale_NG)
    assert (found.min_NG is None) == (expected.min_NG is None)
    if found.min_NG is not None and expected.min_NG is not None:
        assert np.array_equal(found.min_NG, expected.min_NG)
