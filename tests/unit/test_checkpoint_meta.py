"""Meta's form: what params.json leaves open, shards, ties; and the restricted pickle reader."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import SPEC, tiny_weights, write_hf, write_meta

from puna.checkpoint import open_checkpoint
from puna.checkpoint.pickle_reader import read_torch_zip
from puna.errors import CheckpointError
from puna.spec import ModelSpec, RopeSpec

torch = pytest.importorskip("torch")


def spec_of(directory: Path, **changes: Any) -> ModelSpec:
    return open_checkpoint(str(write_meta(directory, tiny_weights(), **changes))).spec


def test_params_may_leave_things_open(tmp_path: Path) -> None:
    assert spec_of(tmp_path, vocab_size=-1, rope_theta=None) == SPEC


def test_missing_n_kv_heads(tmp_path: Path) -> None:
    weights = tiny_weights()
    for name in list(weights):
        if ".attn.k." in name or ".attn.v." in name:
            weights[name] = np.concatenate((weights[name],) * 2)
    assert (
        open_checkpoint(str(write_meta(tmp_path, weights, n_kv_heads=None))).spec.num_kv_heads == 8
    )


def test_context_length_is_inferred(tmp_path: Path) -> None:
    assert spec_of(tmp_path / "2").max_position_embeddings == 4096
    one = open_checkpoint(str(write_meta(tmp_path / "1", tiny_weights(), norm_eps=1e-6)))
    assert one.spec.max_position_embeddings == 2048
    assert one.notes()[0].startswith("params.json gives no context length: 2048")


@pytest.mark.parametrize(
    ("is_tied", "changes", "factor"),
    [(False, {}, 8.0), (True, {}, 32.0), (True, {"rope_scaling_factor": 16}, 16.0)],
)
def test_scaled_rope(tmp_path: Path, is_tied: bool, changes: dict[str, Any], factor: float) -> None:
    weights = tiny_weights()
    if is_tied:
        weights["head.weight"] = weights["embed.weight"]
    write_meta(tmp_path, weights, use_scaled_rope=True, **changes)
    found = open_checkpoint(str(tmp_path))
    assert found.spec.rope == RopeSpec(10000.0, "llama3", factor, 8192, 1.0, 4.0)
    assert found.spec.max_position_embeddings == 131072
    assert found.spec.tie_word_embeddings is is_tied
    assert any("scaling factor" in note for note in found.notes()) is not bool(changes)


def test_equal_matrices_are_tied(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["head.weight"] = weights["embed.weight"].copy()
    for shards in (1, 2):
        found = open_checkpoint(str(write_meta(tmp_path / str(shards), weights, shards)))
        assert found.spec.tie_word_embeddings
        assert "head.weight" not in found.names()
    weights["head.weight"][-1, -1] += 1
    assert not open_checkpoint(str(write_meta(tmp_path / "x", weights))).spec.tie_word_embeddings


def test_feed_forward_size_is_checked(tmp_path: Path) -> None:
    write_meta(tmp_path, tiny_weights(), multiple_of=256)
    assert (
        "gives a feed-forward size of 256, the tensors have 96"
        in open_checkpoint(str(tmp_path)).notes()[0]
    )


def test_tokenizer_one_folder_up(tmp_path: Path) -> None:
    write_meta(tmp_path / "7B", tiny_weights())
    (tmp_path / "tokenizer.model").write_bytes(b"above")
    found = open_checkpoint(str(tmp_path / "7B"))
    assert found.tokenizer_files() == {"tokenizer.model": b"above"}
    (tmp_path / "7B" / "tokenizer.model").write_bytes(b"beside")
    assert found.tokenizer_files() == {"tokenizer.model": b"beside"}


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("consolidated.03.pth", "has 3 shards, and its tensors were split in 4; download all"),
        ("consolidated.01.pth", r"has 3 shards and no consolidated\.01\.pth; download it"),
    ],
)
def test_missing_shards(tmp_path: Path, lost: str, message: str) -> None:
    write_meta(tmp_path, tiny_weights(), 4)
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


def test_no_shards(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no consolidated\.00\.pth"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"dim": -64}, "dim is -64"),
        ({"n_heads": 7}, "is not a multiple of n_heads"),
        ({"n_layers": "2"}, "n_layers is '2'"),
        ({"n_kv_heads": 3}, "is not a multiple of num_kv_heads"),
        ({"norm_eps": [1]}, r"norm_eps is \[1\]"),
        ({"dim": 128}, "has 1 shards, and its tensors were split in 2"),
    ],
)
def test_params_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_of(tmp_path, **changes)


# The pickle reader.


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def test_strides_offsets_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    state = OrderedDict(
        whole=base,
        transposed=base.t(),
        part=base[1:4, 2:9:3],
        parameter=torch.nn.Parameter(base.half()),
        scalar=torch.tensor(3.0),
        empty=torch.zeros(0, 4),
        ids=torch.arange(3),
    )
    found = read_torch_zip(save(tmp_path / "x.pth", state))
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert np.array_equal(found[name].parts[0], tensor.detach().numpy()), name
    every = slice(None)
    assert found["transposed"].load(slice(2, 5), every).flags.c_contiguous
    with pytest.raises(CheckpointError, match="weights of type LongStorage"):
        _ = found["ids"].format


def test_module_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    found = read_torch_zip(save(tmp_path / "x.pth", module.state_dict()))
    assert set(found) == {"weight", "bias"}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/puna_was_here",)


class Opener:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/etc/passwd",)


@pytest.mark.parametrize(("bad", "name"), [(Evil(), "posix.system"), (Opener(), "_?io.open")])
@pytest.mark.parametrize("protocol", [2, 4])
def test_calls_are_refused(tmp_path: Path, bad: object, name: str, protocol: int) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(2), "x": bad}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=f"wants to call '{name}'.*nothing was run"):
        read_torch_zip(path)
    assert not os.path.exists("/tmp/puna_was_here")


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"(cbuiltins\neval\nV1+1\no.",
        b"(V1+1\nibuiltins\neval\n.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01R.",
        b"\x82\x01.",
        b"\x80\x02X\xff\xff\xff\x7fab.",  # a string of 2 GB
        b"\x80\x02}(]]ss.",
        b"\x80\x02](K\x01e.",
        b"",
        b".",
        b"a.",
        b"\x80\x02K\x01.",
    ],
)  # fmt: skip
def test_strange_pickles(tmp_path: Path, program: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(CheckpointError) as caught:
        read_torch_zip(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_a_large_memo_index_costs_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    assert read_torch_zip(tmp_path / "x.pth") == {}


def rewritten(source: Path, target: Path, change: dict[str, bytes | None], method: int = 0) -> Path:
    """A copy of a zip file with records replaced (None: left out)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            data = change.get(info.filename.partition("/")[2], old.read(info.filename))
            if data is not None:
                new.writestr(info.filename, data)
    return target


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        ({"data/0": None}, 0, "record data/0 is missing"),
        ({"data/0": b"short"}, 0, "smaller than its 4 elements"),
        ({"data.pkl": None}, 0, r"holds 0 data\.pkl"),
        ({"byteorder": b"big"}, 0, "is big endian"),
        ({}, zipfile.ZIP_DEFLATED, "is compressed"),
    ],
)
def test_damaged_records(
    tmp_path: Path, change: dict[str, bytes | None], method: int, message: str
) -> None:
    source = save(tmp_path / "a.pth", {"w": torch.ones(4)})
    with pytest.raises(CheckpointError, match=message):
        read_torch_zip(rewritten(source, tmp_path / "b.pth", change, method))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4,), (2,), 0),
        ((2, 3), (1, 1), 0),
        ((4,), (1,), 1),
        ((2**40, 2**40), (0, 0), 0),
        ((-1,), (1,), 0),
    ],
)
def test_tensors_reach_no_further_than_their_storage(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    class Storage:
        def __reduce__(self) -> tuple[Any, ...]:
            raise AssertionError

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            arguments = (Storage(), offset, shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> Any:
            return (
                ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(obj, Storage) else None
            )

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Tensor()})
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("a/data.pkl", buffer.getvalue())
        archive.writestr("a/data/0", bytes(16))
    with pytest.raises(
        CheckpointError, match=r"reaches beyond|larger than its storage|negative size"
    ):
        read_torch_zip(tmp_path / "x.pth")


def test_old_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"from before 1\.6.*convert it with torch\.save"):
        read_torch_zip(path)


def test_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a dict of tensors"):
        read_torch_zip(save(tmp_path / "a.pth", [torch.ones(2)]))
    with pytest.raises(CheckpointError, match="'epoch' is no tensor; save the model's state_dict"):
        read_torch_zip(save(tmp_path / "b.pth", {"epoch": 3}))


def test_hf_bin_takes_the_same_reader(tmp_path: Path) -> None:
    write_hf(tmp_path, tiny_weights(), "bin")
    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"wants to call 'posix\.system'"):
        open_checkpoint(str(tmp_path))
