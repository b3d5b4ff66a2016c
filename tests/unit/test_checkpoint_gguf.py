"""GGUF: blocks bit for bit, metadata, RoPE, refusals, damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import SPEC, tiny_weights, write_gguf

from puna.checkpoint import open_checkpoint
from puna.checkpoint.gguf_blocks import BLOCK_FORMATS, BlockFormat, unpack_rows
from puna.checkpoint.gguf_file import read_gguf
from puna.errors import CheckpointError
from puna.rope import inverse_frequencies
from puna.spec import RopeSpec

gguf = pytest.importorskip("gguf")

HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_rows(kind: BlockFormat, num_rows: int, blocks_a_row: int) -> np.ndarray[Any, Any]:
    """Random bytes, with finite float16 where the block keeps its scales."""
    rng = np.random.default_rng(len(kind.name))
    blocks = rng.integers(0, 256, (num_rows * blocks_a_row, kind.block_bytes), np.uint8)
    for at in HALVES.get(kind.name, (0,)):
        halves = rng.standard_normal((len(blocks), 1)).astype(np.float16)
        halves[:3] = [[0.0], [-0.0], [6e-8]]  # zeros and a subnormal
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(num_rows, -1)


def dequantized(rows: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("kind", [kind for _, kind in BLOCK_FORMATS], ids=lambda kind: kind.name)
def test_blocks_are_exact(kind: BlockFormat) -> None:
    rows = random_rows(kind, 40, 3)
    found = unpack_rows(rows, kind)
    assert found.format == kind.format
    low, high = kind.format.q_range
    assert low <= found.q_NK.min()
    assert found.q_NK.max() <= high
    values = found.dequantize()
    assert values.dtype == np.float32
    assert values.tobytes() == dequantized(rows, kind.name).tobytes()


def test_block_table_agrees_with_gguf() -> None:
    for number, kind in BLOCK_FORMATS:
        theirs = gguf.GGMLQuantizationType(number)
        assert theirs.name == kind.name
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block_size, kind.block_bytes)


def raw_gguf(path: Path, name: str, rows: np.ndarray[Any, Any], kind: Any) -> Path:
    """One matrix of raw blocks of GGML type `kind`, and the metadata that every file needs."""
    writer = gguf.GGUFWriter(path, "llama")
    keys = {"context_length": 64, "embedding_length": 64, "block_count": 1}
    keys |= {"feed_forward_length": 96, "attention.head_count": 8, "vocab_size": 9}
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [kind for _, kind in BLOCK_FORMATS], ids=lambda kind: kind.name)
def test_slices_of_blocks(tmp_path: Path, kind: BlockFormat) -> None:
    """q rows are un-permuted whole, and columns may begin inside a superblock."""
    rows = random_rows(kind, 32, 3)
    path = raw_gguf(
        tmp_path / "m.gguf", "blk.0.attn_q.weight", rows, kind=gguf.GGMLQuantizationType[kind.name]
    )
    found = open_checkpoint(str(path))
    name = "layers.0.attn.q.weight"
    whole = dequantized(rows, kind.name)
    halves = whole.reshape(4, 4, 2, -1).swapaxes(1, 2).reshape(whole.shape)
    assert found.format(name) == kind.format
    assert found.load(name).tobytes() == halves.tobytes()
    group, num_cols = kind.format.group_size, whole.shape[1]
    for part in ((0, 32), (3, 9), (9, 31), (4, 4)):
        for c, d in ((0, num_cols), (group, 2 * group), (num_cols - group, num_cols)):
            r, k = slice(*part), slice(c, d)
            blocks = found.load_quantized(name, r, k)
            assert blocks.dequantize().tobytes() == halves[r, k].tobytes()
            assert found.load(name, r, slice(c + 1, d)).tobytes() == halves[r, c + 1 : d].tobytes()


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "IQ4_XS", "IQ2_XXS", "IQ4_NL", "TQ1_0"])
def test_other_blocks_become_floats(tmp_path: Path, name: str) -> None:
    type_ = gguf.GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[type_][1]
    rows = np.random.default_rng(0).integers(0, 60, (8, 2 * size), np.uint8)
    found = open_checkpoint(
        str(raw_gguf(tmp_path / "m.gguf", "blk.0.attn_v.weight", rows, kind=type_))
    )
    assert found.format("layers.0.attn.v.weight").name == "float32"
    values = found.load("layers.0.attn.v.weight", slice(2, 5), slice(7, 40))
    assert values.tobytes() == dequantized(rows, name)[2:5, 7:40].tobytes()
    assert found.notes() == (f"{name} blocks have no exact form in puna: dequantised to float32",)


def test_types_that_nothing_dequantises(tmp_path: Path) -> None:
    path = raw_gguf(
        tmp_path / "m.gguf",
        "blk.0.attn_v.weight",
        np.zeros((8, 40), np.uint8),
        kind=gguf.GGMLQuantizationType.Q8_1,
    )
    with pytest.raises(CheckpointError, match="type Q8_1, which the gguf package cannot"):
        open_checkpoint(str(path))


def test_unknown_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"norm.weight": np.ones(64, np.float32)})
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    data[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"output_norm\.weight. has GGML type 99, which is unknown"
    ):
        open_checkpoint(str(path))


def opened(tmp_path: Path, **changes: Any) -> Any:
    weights = {"embed.weight": tiny_weights()["embed.weight"]}
    return open_checkpoint(str(write_gguf(tmp_path / "m.gguf", weights, **changes)))


def test_tied_when_there_is_no_output(tmp_path: Path) -> None:
    assert opened(tmp_path).spec.tie_word_embeddings


def test_vocab_size_from_the_tokens_or_the_embedding(tmp_path: Path) -> None:
    assert opened(tmp_path, vocab_size=None).spec.vocab_size == 80
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(70)]}
    assert opened(tmp_path, vocab_size=None, **tokens).spec.vocab_size == 70


def test_head_counts_by_layer(tmp_path: Path) -> None:
    assert opened(tmp_path, **{"attention.head_count_kv": [4, 4]}).spec.num_kv_heads == 4
    with pytest.raises(CheckpointError, match="head_count_kv differs from layer to layer"):
        opened(tmp_path, **{"llama.attention.head_count_kv": [4, 2]})


def test_ends_of_generation(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    assert opened(tmp_path, **ends).generation.eos_token_ids == (2, 5)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert opened(tmp_path).tokenizer_files() == {}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"type": "none"}, RopeSpec()),
        ({"type": "linear", "factor": 4.0}, RopeSpec(type="linear", factor=4.0)),
        ({"factor": 4.0}, RopeSpec(type="linear", factor=4.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 1024},
            RopeSpec(type="yarn", factor=4.0, original_max_position_embeddings=1024),
        ),
        (
            {"type": "yarn", "factor": 4.0},
            RopeSpec(type="yarn", factor=4.0, original_max_position_embeddings=4096),
        ),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 0.5},
            RopeSpec(
                type="yarn",
                factor=4.0,
                original_max_position_embeddings=4096,
                attention_factor=0.5 * (1 + 0.1 * np.log(4.0)),
            ),
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, Any], rope: RopeSpec) -> None:
    changes = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    assert opened(tmp_path, **changes).spec.rope == rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_from_its_divisors(tmp_path: Path, factor: float) -> None:
    rope = RopeSpec(500000.0, "llama3", factor, 8192, 1.0, 4.0)
    plain = inverse_frequencies(RopeSpec(500000.0), 64)
    divisors = (plain / inverse_frequencies(rope, 64)).astype(np.float32)
    keys: dict[str, Any] = {
        "rope.freq_base": 500000.0,
        "rope.dimension_count": 64,
        "attention.key_length": 64,
    }
    found = opened(tmp_path, extra={"rope_freqs.weight": divisors}, **keys)
    assert found.spec.rope == rope
    assert "rope_freqs.weight" not in found.names()
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    assert opened(tmp_path, extra=ones, **keys).spec.rope == RopeSpec(500000.0)
    for bad in (
        divisors * np.linspace(1, 1.1, 32, dtype=np.float32),
        divisors[:8],
        divisors * np.nan,
    ):
        with pytest.raises(CheckpointError, match="is not Llama 3's RoPE scaling"):
            opened(tmp_path, extra={"rope_freqs.weight": bad.astype(np.float32)}, **keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "holds 'qwen2'; puna reads GGUF files of llama only"),
        ({"split.count": 3}, "one of 3 parts; merge them first: `llama-gguf-split --merge"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope.dimension_count": 4}, r"dimension_count is 4 and the head size 8"),
        ({"attention.value_length": 16}, "value_length is 16"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1},
            "yarn_log_multiplier is not supported",
        ),
        ({"embedding_length": None}, "embedding_length is missing"),
        ({"context_length": "long"}, "context_length is 'long'"),
        ({"attention.head_count": 0}, "head_count is 0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"GGML", "is no GGUF file"),
        (4, struct.pack("<I", 1), "is GGUF version 1; puna reads"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**60), "cut short or damaged"),
        (16, struct.pack("<Q", 2**60), "cut short or damaged"),
        (24, struct.pack("<Q", 2**63), "cut short or damaged"),
    ],
)
def test_damaged_headers(tmp_path: Path, at: int, data: bytes, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_weights())
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(path))


def test_cut_short(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_weights())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(str(path))


def test_metadata_values(tmp_path: Path) -> None:
    changes = {
        "general.list": ["x", "é"],
        "general.ints": [1, 2],
        "general.flag": True,
        "general.real": 1e-5,
    }
    metadata = read_gguf(write_gguf(tmp_path / "m.gguf", {}, **changes)).metadata
    assert metadata["general.list"] == ["x", "é"]
    assert metadata["general.ints"].tolist() == [1, 2]
    assert metadata["general.flag"] is True
    assert metadata["general.real"] == 1e-5


def test_spec_equals_the_writers(tmp_path: Path) -> None:
    assert (
        open_checkpoint(str(write_gguf(tmp_path / "m.gguf", tiny_weights(), "Q8_0"))).spec == SPEC
    )
