"""config.json and the rank file: one spelling, read strictly, laid out to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.builder import build
from puna.checkpoint.dummy import DummyCheckpoint
from puna.engine import EngineConfig, Limits, read_config
from puna.errors import EngineError
from puna.plan import BuildConfig
from puna.rank_file import ALIGNMENT, check_rank_file, rank_file, rank_file_name, rank_weights
from puna.spec import GenerationDefaults, ModelSpec, RopeSpec

PATH = Path("engine/config.json")
SPEC = ModelSpec(
    hidden_size=48,
    intermediate_size=70,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=53,
    max_position_embeddings=64,
    rope=RopeSpec(type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.5),
    mlp_bias=True,
)
GENERATION = GenerationDefaults((2, 7), 1, temperature=0.6, top_p=0.9)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "e"
    config = BuildConfig(quant="int4", group_size=32, tp_size=2)
    build(DummyCheckpoint(SPEC), out, config, materialize=True)
    return out


@pytest.fixture(scope="module")
def config(engine: Path) -> EngineConfig:
    return read_config(engine)


def test_round_trip(config: EngineConfig, engine: Path) -> None:
    assert (engine / "config.json").read_bytes() == config.to_bytes()
    assert config.spec == SPEC
    for known in (config, replace(config, generation=GENERATION)):
        again = EngineConfig.from_bytes(known.to_bytes(), PATH)
        assert again == known and again.to_bytes() == known.to_bytes()
        assert again.digest() == known.digest() != replace(known, dtype="bfloat16").digest()


def test_round_trip_of_a_dummy_recipe(tmp_path: Path) -> None:
    built = build(DummyCheckpoint(SPEC, seed=9), tmp_path / "e").config
    assert built.dummy is not None and built.dummy.seed == 9
    assert EngineConfig.from_bytes(built.to_bytes(), PATH) == built


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every object that has a fixed set of keys."""
    free = [("resolved",), ("weights",), ("provenance", "digests")]
    found = []
    if isinstance(value, dict):
        found += [] if at in free else [at]
        for key, inner in value.items():
            if at[:1] != ("resolved",):
                found += places(inner, (*at, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            found += places(inner, (*at, i))
    return found


def changed(config: EngineConfig, at: tuple[Any, ...], change: Callable[[Any], Any]) -> bytes:
    data = json.loads(config.to_bytes())
    inner = data
    for key in at:
        inner = inner[key]
    change(inner)
    return json.dumps(data).encode()


def test_unknown_keys_are_refused_everywhere(config: EngineConfig) -> None:
    found = places(config.to_json())
    for at in (("spec",), ("spec", "rope"), ("limits",), ("memory", 1), ("generation",)):
        assert at in found
    for at in found:
        data = changed(config, at, lambda inner: inner.update(colour="red"))
        with pytest.raises(EngineError, match=r"colour.*rebuild the engine"):
            EngineConfig.from_bytes(data, PATH)


def test_missing_keys_are_refused_everywhere(config: EngineConfig) -> None:
    for at in places(config.to_json()):
        inner = json.loads(config.to_bytes())
        for key in at:
            inner = inner[key]
        for key in inner:
            data = changed(config, at, lambda inner, key=key: inner.pop(key))
            with pytest.raises(EngineError, match=rf"(?i){key}|not the config of an engine"):
                EngineConfig.from_bytes(data, PATH)


@pytest.mark.parametrize("version", [0, 1, 2, 4, "3", 1.5])
def test_other_versions_say_what_was_found_and_needed(config: EngineConfig, version: Any) -> None:
    data = changed(config, (), lambda inner: inner.update(format_version=version))
    with pytest.raises(EngineError, match=r"found, this puna reads format 3: rebuild"):
        EngineConfig.from_bytes(data, PATH)


# Values of WRONG that are right after all.
LEGAL: dict[tuple[Any, ...], list[Any]] = {
    ("generation", "eos_token_ids"): [[], [3]],
    ("resolved",): [{}],
    ("provenance", "notes"): [[]],
    ("provenance", "digests"): [{}],
}
WRONG = [None, True, -1, 1.5, "x", [], {}, [3], {"a": 1}]


@pytest.mark.parametrize(
    "at",
    [
        *[("spec", key) for key in ("hidden_size", "num_layers", "rms_norm_eps", "rope")],
        *[("spec", "rope", key) for key in ("theta", "type", "factor")],
        *[("limits", key) for key in ("max_seq_len", "block_size", "num_blocks")],
        ("tp_size",),
        ("pp_size",),
        ("dtype",),
        ("kv_dtype",),
        ("ffn_multiple",),
        ("vocab_multiple",),
        ("weights",),
        ("weights", "embed.weight"),
        ("weights", "embed.weight", "format"),
        ("weights", "embed.weight", "layout"),
        ("memory",),
        ("memory", 0, "weights"),
        ("generation", "eos_token_ids"),
        ("resolved",),
        ("resolved", "dtype"),
        ("provenance", "notes"),
        ("provenance", "digests"),
        ("spec",),
        ("limits",),
        ("generation",),
        ("provenance",),
        ("target",),
        ("quant",),
        ("dummy",),
    ],
    ids=lambda at: ".".join(map(str, at)),
)
def test_wrong_types_are_refused(at: tuple[Any, ...], config: EngineConfig, tmp_path: Path) -> None:
    """With an EngineError, through the door that sessions use; never a traceback or a wrong run."""
    right = json.loads(config.to_bytes())
    for key in at:
        right = right[key]
    for wrong in WRONG:
        is_same = type(wrong) is type(right) and wrong == right
        if is_same or wrong in LEGAL.get(at, ()):
            continue
        if isinstance(right, (str, float)) and type(wrong) is type(right):
            continue  # another text or number may be legal
        data = changed(config, at[:-1], lambda inner, wrong=wrong: inner.update({at[-1]: wrong}))
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(EngineError, match=r"config\.json"):
            read_config(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"format_version": 3}'])
def test_damaged_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(EngineError, match=r"config\.json"):
        read_config(tmp_path)


def test_what_is_not_an_engine_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"nowhere.*build"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(EngineError, match=r"no config\.json, so it is not an engine"):
        read_config(tmp_path)


def test_limits_need_room_for_one_token_a_sequence() -> None:
    with pytest.raises(EngineError, match="below max_batch_size"):
        Limits(64, 8, 7, 16, 10)
    with pytest.raises(EngineError, match="block_size is 0"):
        Limits(64, 8, 8, 0, 10)


@pytest.mark.parametrize("rank", [0, 1])
def test_arrays_are_aligned_in_order_and_do_not_overlap(
    rank: int, config: EngineConfig, engine: Path
) -> None:
    layout = rank_file(config, rank, config.digest())
    end = len(layout.header)
    assert end % ALIGNMENT == 0
    for array in layout.arrays.values():
        assert array.offset % ALIGNMENT == 0
        assert end <= array.offset < end + ALIGNMENT
        end = array.offset + array.num_bytes
    assert end == layout.num_bytes == (engine / rank_file_name(rank)).stat().st_size
    declared = [name for weight in rank_weights(config, rank) for name in weight.array_specs()]
    assert list(layout.arrays) == declared


@pytest.mark.parametrize("rank", [0, 1])
def test_the_safetensors_library_reads_the_same_arrays(
    rank: int, config: EngineConfig, engine: Path
) -> None:
    from safetensors import safe_open

    path = engine / rank_file_name(rank)
    layout, data = rank_file(config, rank, config.digest()), path.read_bytes()
    assert data.startswith(layout.header)
    with safe_open(path, "np") as file:
        assert file.metadata() == {
            "config_digest": config.digest(),
            "format_version": "3",
            "rank": str(rank),
        }
        names = [name for name in file.keys() if not name.startswith("_pad.")]  # noqa: SIM118
        assert sorted(names) == sorted(layout.arrays)
        for name, array in layout.arrays.items():
            found = file.get_tensor(name)
            raw = np.frombuffer(data, array.dtype, int(np.prod(array.shape)), array.offset)
            assert found.dtype == array.dtype and np.array_equal(found, raw.reshape(array.shape))
        pads = [name for name in file.keys() if name.startswith("_pad.")]  # noqa: SIM118
        assert pads and not any(file.get_tensor(name).any() for name in pads)


def test_a_rank_file_of_another_engine_is_refused(
    config: EngineConfig, engine: Path, tmp_path: Path
) -> None:
    layouts = [rank_file(config, rank, config.digest()) for rank in (0, 1)]
    path = engine / rank_file_name(0)
    check_rank_file(path, layouts[0])
    with pytest.raises(EngineError, match=r"does not fit config\.json"):
        check_rank_file(path, layouts[1])
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match="build the engine again"):
        check_rank_file(tmp_path / "cut", layouts[0])


def test_a_weight_that_config_does_not_declare_is_named(config: EngineConfig) -> None:
    weights = {n: w for n, w in config.weights.items() if n != "layers.1.attn.o.weight"}
    with pytest.raises(EngineError, match=r"no weight layers\.1\.attn\.o\.weight"):
        rank_weights(replace(config, weights=weights), 0)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("dtype",), "float64"),
        (("dtype",), "int8"),
        (("kv_dtype",), "fp9"),
        (("tp_size",), 3),
        (("tp_size",), 4),  # legal for the model, but memory is that of two ranks
        (("pp_size",), 3),
        (("ffn_multiple",), 0),
        (("limits", "block_size"), 0),
        (("weights", "embed.weight", "format"), "int3"),
        (("weights", "embed.weight", "layout"), "rows"),
        (("spec", "rope", "type"), "su"),
        (("spec", "num_kv_heads"), 3),
    ],
)
def test_values_that_do_not_fit_are_refused(
    at: tuple[Any, ...], value: Any, config: EngineConfig
) -> None:
    data = changed(config, at[:-1], lambda inner: inner.update({at[-1]: value}))
    with pytest.raises(EngineError, match=r"config\.json.*rebuild"):
        EngineConfig.from_bytes(data, PATH)
