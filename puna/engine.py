"""The engine directory: the waist between build and runtime, which share nothing else.

`EngineConfig` is `config.json`; from it and the weight table follows the schema of every rank's
file, to the byte. This file decides the format (docs/engine-format.md describes it) and knows
neither how weights were obtained nor what runs them. Digests are in `puna.manifest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from puna.errors import EngineError, PunaError
from puna.layout import ArraySpec, array_specs, check_layout
from puna.mapping import Mapping, check_parallel
from puna.quant import DTYPES, Format
from puna.spec import GenerationDefaults, ModelSpec, exact_keys
from puna.weights import EngineWeight, Extent, engine_weights, extent, on_rank, split

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TOKENIZER_DIR = "tokenizer"
# Every array starts at a multiple of this many bytes of its file, so that a memory map can be read
# with aligned vector loads.
ALIGNMENT = 64

_SAFETENSORS_DTYPES = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": DTYPES["bfloat16"],
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
    }
)


@dataclass(frozen=True)
class Limits:
    """What sessions of this engine are laid out for.

    `max_num_tokens` is the token budget of a step; `num_blocks` KV blocks of `block_size` tokens
    include block 0, which is never used.
    """

    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    block_size: int
    num_blocks: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise EngineError(f"{name} is {value!r}; it must be a positive whole number")
        if self.max_num_tokens < self.max_batch_size:
            raise EngineError(
                f"max_num_tokens ({self.max_num_tokens}) is below max_batch_size "
                f"({self.max_batch_size}): a step must have room for one token a sequence"
            )


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank needs: its file mapped, its KV cache, and everything else it
    allocates."""

    weights: int
    kv_cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class StoredWeight:
    """Number format and layout of one engine tensor."""

    format: str
    layout: str


@dataclass(frozen=True)
class DummyRecipe:
    """How a dummy engine's weights are generated instead of stored."""

    seed: int


@dataclass(frozen=True)
class Provenance:
    """Where the engine came from: source, SHA-256 of its files, and what the reader had to
    decide."""

    source: str
    kind: str
    digests: dict[str, str]
    puna_version: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EngineConfig:
    """All that a session must know; `config.json` is exactly this.

    `weights` names every tensor that some rank stores. `ffn_multiple` and `vocab_multiple` are what
    a rank's part of the ffn and of the vocabulary is padded to. `resolved` keeps each option's
    value and why it was chosen.
    """

    format_version: int
    spec: ModelSpec
    target: str
    tp_size: int
    pp_size: int
    dtype: str
    quant: str
    kv_dtype: str
    ffn_multiple: int
    vocab_multiple: int
    limits: Limits
    weights: dict[str, StoredWeight]
    memory: tuple[RankMemory, ...]
    resolved: dict[str, tuple[Any, str]]
    generation: GenerationDefaults
    dummy: DummyRecipe | None
    provenance: Provenance

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def mapping(self, rank: int) -> Mapping:
        return Mapping(rank, self.tp_size, self.pp_size)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "generation": self.generation.to_json(),
            "memory": [memory.to_json() for memory in self.memory],
            "resolved": {key: list(value) for key, value in self.resolved.items()},
        }

    def to_bytes(self) -> bytes:
        """The canonical bytes of config.json."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> EngineConfig:
        """Read config.json strictly: EngineError for another version, unknown or missing keys."""
        try:
            found = json.loads(data)
            version = found.get("format_version") if isinstance(found, dict) else None
            if version is None:
                raise EngineError(
                    f"{path} is not the config of an engine (a checkpoint's, perhaps): build one "
                    f"with puna build {path.parent} -o ENGINE"
                )
            if version != FORMAT_VERSION:
                raise EngineError(
                    f"{path}: engine format {version!r} found, this puna reads format "
                    f"{FORMAT_VERSION}: rebuild the engine with puna build"
                )
            check_json(exact_keys(cls, found), cls, "config")
            config = cls._from_json(found)
            config._check()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise EngineError(f"{path}: {error}: rebuild the engine with puna build") from error
        except PunaError as error:
            if str(error).startswith(str(path)):
                raise
            raise EngineError(f"{path}: {error}: rebuild the engine with puna build") from error
        return config

    def _check(self) -> None:
        """What types alone do not say. Raises ValueError or PunaError."""
        for name in ("ffn_multiple", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("dtype", "kv_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {', '.join(DTYPES)}")
        check_parallel(self.spec, self.tp_size, self.pp_size)
        if len(self.memory) != self.world_size:
            raise ValueError(f"memory of {len(self.memory)} ranks, needed {self.world_size}")
        if "embed.weight" not in self.weights:
            raise ValueError("no weights are declared")
        for weight in self.weights.values():
            Format.parse(weight.format)
            check_layout(weight.layout)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> EngineConfig:
        memory = []
        for rank in data["memory"]:
            fields = {key: value for key, value in rank.items() if key != "total"}
            memory.append(RankMemory(**exact_keys(RankMemory, fields)))
            if memory[-1].total != rank["total"]:
                raise ValueError("memory: total is not the sum of its parts")
        dummy, provenance = data["dummy"], exact_keys(Provenance, data["provenance"])
        provenance = Provenance(**{**provenance, "notes": tuple(provenance["notes"])})
        return cls(
            **{
                **data,
                "spec": ModelSpec.from_json(data["spec"]),
                "limits": Limits(**exact_keys(Limits, data["limits"])),
                "weights": {
                    name: StoredWeight(**exact_keys(StoredWeight, weight))
                    for name, weight in data["weights"].items()
                },
                "memory": tuple(memory),
                "resolved": {k: (value, why) for k, (value, why) in data["resolved"].items()},
                "generation": GenerationDefaults.from_json(data["generation"]),
                "dummy": None if dummy is None else DummyRecipe(**exact_keys(DummyRecipe, dummy)),
                "provenance": provenance,
            }
        )

    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


def check_json(value: Any, hint: Any, where: str) -> None:
    """Raise ValueError unless `value`, read from JSON, is what the annotation `hint` stands for.

    A dataclass is an object (its keys are checked by `exact_keys`) and a tuple a list.
    """
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        for name, field_hint in get_type_hints(hint).items():
            if name in value:
                check_json(value[name], field_hint, f"{where}.{name}")
    elif origin is tuple and isinstance(value, list):
        hints = args[:1] * len(value) if ... in args else args
        if len(hints) != len(value):
            raise ValueError(f"{where} has {len(value)} items, needed {len(hints)}")
        for i, (item, item_hint) in enumerate(zip(value, hints, strict=True)):
            check_json(item, item_hint, f"{where}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            check_json(item, args[1], f"{where}.{name}")
    elif origin is UnionType:
        if value is not None or NoneType not in args:
            check_json(value, args[0], where)
    elif origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(args)}")
    elif hint is not Any:
        kinds = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}.get(hint, ())
        if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
            name = getattr(hint, "__name__", hint)
            raise ValueError(f"{where} is {value!r}; it must be {name}")


def canonical_json(data: Any) -> bytes:
    """One spelling for one value: sorted keys, two spaces, a newline at the end."""
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


@dataclass(frozen=True)
class RankWeight:
    """One engine tensor as a rank holds it: padded size, and where each part's rows come from."""

    weight: EngineWeight
    format: Format
    layout: str
    rows: tuple[Extent, ...]  # one a part, stacked in this order
    cols: Extent

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def num_rows(self) -> int:
        return sum(rows.size for rows in self.rows)

    @property
    def num_cols(self) -> int:
        return self.cols.size

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, self.num_cols) if self.weight.is_matrix else (self.num_rows,)

    def array_specs(self) -> dict[str, ArraySpec]:
        """Stored arrays by full name. Vectors are one float32 array."""
        if not self.weight.is_matrix:
            return {self.name: (np.dtype(np.float32), self.shape)}
        specs = array_specs(self.format, self.num_rows, self.num_cols)
        return {f"{self.name}.{suffix}": spec for suffix, spec in specs.items()}


def rank_weights(config: EngineConfig, rank: int) -> list[RankWeight]:
    """The schema of one rank: its tensors in the order of execution, which is also file order."""
    return list(_rank_weights(config, rank))


def _rank_weights(config: EngineConfig, rank: int) -> Iterator[RankWeight]:
    spec, mapping = config.spec, config.mapping(rank)
    multiples = {"ffn": config.ffn_multiple, "vocab": config.vocab_multiple}

    def held(axis: Any, size: int) -> Extent:
        return extent(axis, size, spec, mapping, multiples.get(axis, 1))

    for fused in on_rank(engine_weights(spec), spec, mapping):
        for weight in (fused,) if fused.name in config.weights else split(fused):
            stored = config.weights.get(weight.name)
            if stored is None:
                raise EngineError(
                    f"config.json declares no weight {weight.name}: rebuild the engine"
                )
            rows = tuple(held(part.axes[0], part.shape[0]) for part in weight.parts)
            first = weight.parts[0]
            cols = held(first.axes[1], first.shape[1]) if weight.is_matrix else Extent(0, 1, 1)
            yield RankWeight(weight, Format.parse(stored.format), stored.layout, rows, cols)


def rank_file_name(rank: int) -> str:
    return f"rank{rank}.safetensors"


@dataclass(frozen=True)
class StoredArray:
    """Where one array lies in a rank's file, in bytes from its start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class RankFile:
    """The exact bytes of a rank's file but for the arrays: header and offsets."""

    header: bytes
    arrays: dict[str, StoredArray]
    num_bytes: int


def rank_file(config: EngineConfig, rank: int, config_digest: str) -> RankFile:
    """Lay out a rank's safetensors file. Pure: the digest has a fixed length, so sizes never
    change.

    Gaps before aligned arrays are declared as U8 tensors named `_pad.N`, since safetensors allows
    none.
    """
    entries: dict[str, Any] = {
        "__metadata__": {
            "config_digest": config_digest,
            "format_version": str(config.format_version),
            "rank": str(rank),
        }
    }
    names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
    relative: dict[str, StoredArray] = {}
    end = 0
    for weight in rank_weights(config, rank):
        for name, (dtype, shape) in weight.array_specs().items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if start > end:
                pad = {"dtype": "U8", "shape": [start - end], "data_offsets": [end, start]}
                entries[f"_pad.{len(entries)}"] = pad
            relative[name] = array = StoredArray(dtype, shape, start)
            end = start + array.num_bytes
            offsets = [start, end]
            entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % ALIGNMENT)
    base = 8 + len(header)
    arrays = {
        name: StoredArray(array.dtype, array.shape, base + array.offset)
        for name, array in relative.items()
    }
    return RankFile(len(header).to_bytes(8, "little") + header, arrays, base + end)


def read_config(engine_dir: Path) -> EngineConfig:
    """Read and check config.json; EngineError says what is wrong and what to do."""
    path = engine_dir / CONFIG_FILE
    if not os.path.isdir(engine_dir):
        what = "is not a directory" if os.path.exists(engine_dir) else "does not exist"
        raise EngineError(
            f"{engine_dir} {what}; an engine is the directory that puna build makes: build one"
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise EngineError(
            f"{engine_dir} has no {CONFIG_FILE}, so it is not an engine: build one with puna build"
        ) from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return EngineConfig.from_bytes(data, path)
    except EngineError:
        raise
    except PunaError as error:
        raise EngineError(f"{path}: {error}: rebuild the engine") from error


def check_rank_file(path: Path, layout: RankFile) -> None:
    """Raise EngineError unless the file has the size and the header that its config asks for."""
    with path.open("rb") as file:
        is_right = file.read(len(layout.header)) == layout.header
    size = path.stat().st_size
    if not is_right or size != layout.num_bytes:
        raise EngineError(
            f"{path} ({size:,} bytes) does not fit {CONFIG_FILE} beside it, which asks for "
            f"{layout.num_bytes:,} bytes: build the engine again"
        )
