"""The same weights give the same tensors, whatever form they were published in."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_writers import SPEC, tiny_weights, write_gguf, write_hf, write_meta

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.errors import CheckpointError

pytest.importorskip("torch")

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def assert_holds(checkpoint: Checkpoint, weights: dict[str, np.ndarray]) -> None:
    assert checkpoint.names() == set(weights)
    for name, expected in weights.items():
        found = checkpoint.load(name)
        assert checkpoint.shape(name) == expected.shape == found.shape
        assert found.flags.c_contiguous
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "num_files"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)]
)
def test_hf(tmp_path: Path, dtype: str, form: str, num_files: int) -> None:
    weights = tiny_weights(DTYPES[dtype])
    found = open_checkpoint(str(write_hf(tmp_path, weights, form, num_files)))
    assert (found.kind, found.spec, found.source) == ("hf", SPEC, str(tmp_path))
    assert found.format("layers.1.attn.q.weight").name == dtype
    assert_holds(found, weights)
    assert len(found.files()) == num_files + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("is_embed_by_rows", [False, True])
def test_meta(tmp_path: Path, dtype: str, num_shards: int, is_embed_by_rows: bool) -> None:
    weights = tiny_weights(DTYPES[dtype])
    found = open_checkpoint(str(write_meta(tmp_path, weights, num_shards, is_embed_by_rows)))
    assert (found.kind, found.spec) == ("meta", SPEC)
    assert_holds(found, weights)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_gguf(tmp_path: Path, kind: str, dtype: str) -> None:
    weights = {
        name: array.astype(DTYPES[dtype]) if array.ndim == 2 else array
        for name, array in tiny_weights().items()
    }
    write_gguf(tmp_path / "m.gguf", weights, kind)
    for path in (tmp_path, tmp_path / "m.gguf"):
        found = open_checkpoint(str(path))
        assert (found.kind, found.spec) == ("gguf", SPEC)
        assert (found.generation.eos_token_ids, found.generation.bos_token_id) == ((2,), 1)
        assert_holds(found, weights)


def test_biases(tmp_path: Path) -> None:
    weights = tiny_weights(has_bias=True)
    biased = {"attention_bias": True, "mlp_bias": True}
    hf = open_checkpoint(str(write_hf(tmp_path / "hf", weights, **biased)))
    gguf = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", weights)))
    assert hf.spec.attention_bias
    assert hf.spec == gguf.spec
    assert_holds(hf, weights)
    assert_holds(gguf, weights)


@pytest.mark.parametrize("form", ["hf", "bin", "meta1", "meta4", "gguf", "Q8_0"])
def test_slices_are_slices_of_the_whole(tmp_path: Path, form: str) -> None:
    weights = tiny_weights()
    if form in ("hf", "bin"):
        path = write_hf(tmp_path, weights, "safetensors" if form == "hf" else "bin")
    elif form.startswith("meta"):
        path = write_meta(tmp_path, weights, int(form[4:]))
    else:
        path = write_gguf(tmp_path / "m.gguf", weights, "F32" if form == "gguf" else form)
    found = open_checkpoint(str(path))
    rng = np.random.default_rng(1)
    for name in weights:
        whole = found.load(name)
        for _ in range(6):
            a, b = sorted(rng.integers(0, whole.shape[0] + 1, 2))
            c, d = sorted(rng.integers(0, whole.shape[-1] + 1, 2))
            if whole.ndim == 1:
                assert np.array_equal(found.load(name, slice(a, b)), whole[a:b])
            else:
                assert np.array_equal(
                    found.load(name, slice(a, b), slice(c, d)), whole[a:b, c:d]
                ), (name, a, b, c, d)
        assert np.array_equal(found.load(name, slice(5, None)), whole[5:])


def test_stories_in_two_forms(shared_data: Path) -> None:
    hf = open_checkpoint(str(shared_data / "stories260K" / "hf"))
    meta = open_checkpoint(str(shared_data / "stories260K" / "meta"))
    assert hf.spec.tie_word_embeddings
    assert meta.spec.tie_word_embeddings  # the Meta form stores the matrix twice
    assert hf.names() == meta.names()
    for name in hf.names():
        assert hf.load(name).tobytes() == meta.load(name).tobytes(), name
    assert set(meta.tokenizer_files()) == {"tokenizer.model"}
    assert hf.tokenizer_files() == {}
    assert hf.generation.eos_token_ids == (2,)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; needed a checkpoint directory"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; needed config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="is a file and no GGUF"):
        open_checkpoint(str(tmp_path / "weights.safetensors"))


def test_two_ggufs(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a\.gguf, b\.gguf\); name one"):
        open_checkpoint(str(tmp_path))


def test_unknown_tensor_name(tmp_path: Path) -> None:
    found = open_checkpoint(str(write_hf(tmp_path, tiny_weights())))
    with pytest.raises(CheckpointError, match=r"has no tensor layers\.9"):
        found.load("layers.9.attn.q.weight")
