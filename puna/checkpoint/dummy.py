"""Dummy checkpoints: a spec and a seed instead of files. Values are made when a slice is loaded.

Decides the presets and how a shape is spelled on the command line. The values themselves are
`puna.dummy`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from puna.dummy import DummyWeights
from puna.errors import CheckpointError
from puna.spec import GenerationDefaults, ModelSpec, RopeSpec


def _llama3_rope(factor: float) -> RopeSpec:
    return RopeSpec(500000.0, "llama3", factor, original_max_position_embeddings=8192)


_THETA_3 = RopeSpec(theta=500000.0)

# hidden, ffn, layers, heads, kv_heads, head_dim, vocab, positions: as in the published config.json.
PRESETS: Mapping[str, ModelSpec] = MappingProxyType(
    {
        "llama-2-7b": ModelSpec(4096, 11008, 32, 32, 32, 128, 32000, 4096),
        "llama-2-13b": ModelSpec(5120, 13824, 40, 40, 40, 128, 32000, 4096),
        "llama-2-70b": ModelSpec(8192, 28672, 80, 64, 8, 128, 32000, 4096),
        "llama-3-8b": ModelSpec(4096, 14336, 32, 32, 8, 128, 128256, 8192, rope=_THETA_3),
        "llama-3-70b": ModelSpec(8192, 28672, 80, 64, 8, 128, 128256, 8192, rope=_THETA_3),
        "llama-3.1-8b": ModelSpec(
            4096, 14336, 32, 32, 8, 128, 128256, 131072, rope=_llama3_rope(8.0)
        ),
        "llama-3.1-70b": ModelSpec(
            8192, 28672, 80, 64, 8, 128, 128256, 131072, rope=_llama3_rope(8.0)
        ),
        "llama-3.2-1b": ModelSpec(
            2048, 8192, 16, 32, 8, 64, 128256, 131072,
            rope=_llama3_rope(32.0), tie_word_embeddings=True,
        ),
        "llama-3.2-3b": ModelSpec(
            3072, 8192, 28, 24, 8, 128, 128256, 131072,
            rope=_llama3_rope(32.0), tie_word_embeddings=True,
        ),
        "tinyllama-1.1b": ModelSpec(2048, 5632, 22, 32, 4, 64, 32000, 2048),
        "smollm2-135m": ModelSpec(
            576, 1536, 30, 9, 3, 64, 49152, 8192,
            rope=RopeSpec(theta=100000.0), tie_word_embeddings=True,
        ),
    }
)  # fmt: skip

_SHORT = MappingProxyType(
    {
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "layers": "num_layers",
        "heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "vocab": "vocab_size",
        "max_positions": "max_position_embeddings",
        "eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
        "theta": "rope_theta",
    }
)
_TYPES = MappingProxyType(
    {f.name: str(f.type) for f in fields(ModelSpec) if f.name != "rope"} | {"rope_theta": "float"}
)


def parse_preset(text: str) -> ModelSpec:
    """A preset by name, with changes, or a shape of its own. CheckpointError says what there is.

    >>> parse_preset("llama-3-8b,num_layers=2").num_layers
    2
    >>> parse_preset("hidden=64,layers=2,heads=4,kv_heads=2,ffn=172,vocab=500").head_dim
    16
    """
    name, *rest = [part.strip() for part in text.split(",")]
    if "=" in name:
        name, rest = "", [name, *rest]
    elif name not in PRESETS:
        raise CheckpointError(
            f"there is no preset {name!r}; there are {', '.join(PRESETS)}, each with changes such "
            "as ',num_layers=2', and free shapes: 'hidden=64,layers=2,heads=4,ffn=172,vocab=500'"
        )
    changes = dict(_parse_change(part) for part in rest if part)
    theta = changes.pop("rope_theta", None)
    if name:
        spec = PRESETS[name]
    else:
        needed = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "vocab_size")
        if missing := [key for key in needed if key not in changes]:
            raise CheckpointError(
                f"dummy shape {text!r} lacks {', '.join(missing)}; or name a preset: "
                f"{', '.join(PRESETS)}"
            )
        derived = {
            "num_kv_heads": changes["num_heads"],
            "head_dim": changes["hidden_size"] // max(1, changes["num_heads"]),
            "max_position_embeddings": 2048,
        }
        spec = ModelSpec(**{**derived, **changes})
    spec = replace(spec, **changes)
    return replace(spec, rope=replace(spec.rope, theta=theta)) if theta is not None else spec


def _parse_change(part: str) -> tuple[str, Any]:
    key, _, value = part.partition("=")
    name = _SHORT.get(key, key)
    if name not in _TYPES:
        raise CheckpointError(
            f"a dummy shape has no {key!r}; it has {', '.join((*_SHORT, 'head_dim'))} and the "
            "fields of ModelSpec"
        )
    kind = _TYPES[name]
    try:
        if kind == "bool":
            return name, {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return name, int(value) if kind == "int" else float(value)
    except (KeyError, ValueError):
        raise CheckpointError(f"dummy shape: {key} is {value!r}; it must be {kind}") from None


class DummyCheckpoint(DummyWeights):
    """A `Checkpoint` without files: `puna.dummy`'s weights under a name."""

    kind = "dummy"

    def __init__(self, spec: ModelSpec, seed: int = 0, source: str = "dummy") -> None:
        super().__init__(spec, seed)
        self.spec = spec
        self.source = source
        self.generation = GenerationDefaults()

    def names(self) -> frozenset[str]:
        return frozenset(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def notes(self) -> tuple[str, ...]:
        return (f"dummy weights, seed {self.seed}: a hash of names and indices, nothing learned",)

    def files(self) -> tuple[Path, ...]:
        return ()

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def close(self) -> None: ...
