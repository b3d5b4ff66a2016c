"""The engine directory: the waist between build and runtime, which share nothing else.

`EngineConfig` is `config.json`. From it and the weight table follows the schema of every rank's
file (`puna.rank_file`). This file decides the format (docs/engine-format.md describes it) and knows
neither how weights were obtained nor what runs them. Digests are in `puna.manifest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puna.errors import EngineError, PunaError
from puna.layout import check_layout
from puna.mapping import Mapping, check_parallel
from puna.quant import DTYPES, KV_DTYPES, Format
from puna.spec import GenerationDefaults, ModelSpec
from puna.strict_json import canonical_json, check_json, exact_keys
from puna.targets import TARGETS

FORMAT_VERSION = 3
CONFIG_FILE = "config.json"
TOKENIZER_DIR = "tokenizer"
KERNELS_DIR = "kernels"


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
        for name, legal in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {', '.join(legal)}")
        check_parallel(self.spec, self.tp_size, self.pp_size)
        if len(self.memory) != self.world_size:
            raise ValueError(f"memory of {len(self.memory)} ranks, needed {self.world_size}")
        if "embed.weight" not in self.weights:
            raise ValueError("no weights are declared")
        target = TARGETS.get(self.target)  # None: of a newer puna perhaps; opening it will say
        for name, weight in self.weights.items():
            Format.parse(weight.format)
            layout = check_layout(weight.layout)
            if target is not None and layout != target.layout:
                raise ValueError(
                    f"{name} lies in {layout}, target {self.target} needs {target.layout}"
                )

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
