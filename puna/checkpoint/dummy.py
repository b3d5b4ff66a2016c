"""Dummy checkpoints: a spec and a seed instead of files. Values are made when a slice is loaded.

Decides the presets and how a shape is spelled on the command line. The values themselves are
`puna.dummy_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from puna.checkpoint import FULL
from puna.dummy_values import dummy_values
from puna.errors import CheckpointError
from puna.quant import DTYPES, Array, Format, QuantTensor
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
_TYPES = {f.name: str(f.type) for f in fields(ModelSpec) if f.name != "rope"} | {
    "rope_theta": "float"
}


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


@dataclass(frozen=True)
class DummyCheckpoint:
    """A `Checkpoint` without files; `dtype` is what `load` returns ("float32", "float16", ...)."""

    spec: ModelSpec
    seed: int = 0
    dtype: str = "float16"
    source: str = "dummy"
    kind: str = "dummy"
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CheckpointError(f"dummy dtype is {self.dtype!r}; puna has {', '.join(DTYPES)}")

    def names(self) -> frozenset[str]:
        spec = self.spec
        names = ["embed.weight", "norm.weight"]
        if not spec.tie_word_embeddings:
            names.append("head.weight")
        for i in range(spec.num_layers):
            names += [f"layers.{i}.attn_norm.weight", f"layers.{i}.mlp_norm.weight"]
            for block, has_bias in (("attn", spec.attention_bias), ("mlp", spec.mlp_bias)):
                for matrix in "qkvo" if block == "attn" else ("gate", "up", "down"):
                    names.append(f"layers.{i}.{block}.{matrix}.weight")
                    if has_bias:
                        names.append(f"layers.{i}.{block}.{matrix}.bias")
        return frozenset(names)

    def shape(self, name: str) -> tuple[int, ...]:
        spec = self.spec
        tensor, _, kind = name.rpartition(".")
        last = tensor.rpartition(".")[2]
        if last in ("norm", "attn_norm", "mlp_norm"):
            return (spec.hidden_size,)
        num_rows, num_cols = {
            "embed": (spec.vocab_size, spec.hidden_size),
            "head": (spec.vocab_size, spec.hidden_size),
            "q": (spec.q_size, spec.hidden_size),
            "k": (spec.kv_size, spec.hidden_size),
            "v": (spec.kv_size, spec.hidden_size),
            "o": (spec.hidden_size, spec.q_size),
            "gate": (spec.intermediate_size, spec.hidden_size),
            "up": (spec.intermediate_size, spec.hidden_size),
            "down": (spec.hidden_size, spec.intermediate_size),
        }[last]
        return (num_rows,) if kind == "bias" else (num_rows, num_cols)

    def format(self, name: str) -> Format:
        return Format.dense(self.dtype)

    def load(self, name: str, rows: slice = FULL, cols: slice = FULL) -> Array:
        """Values of a slice, in `dtype`; norm weights are 1 + value, so activations stay sane."""
        shape = self.shape(name)
        start, stop, _ = rows.indices(shape[0])
        num_cols = shape[1] if len(shape) == 2 else 1
        values = dummy_values(
            self.seed, name, num_cols, slice(start, stop), cols if len(shape) == 2 else FULL
        )
        if len(shape) == 1:
            values = values[:, 0]
        if name.endswith("norm.weight"):
            values += np.float32(1)
        return values.astype(DTYPES[self.dtype], copy=False)

    def load_quantized(self, name: str, rows: slice = FULL, cols: slice = FULL) -> QuantTensor:
        raise AssertionError("dummy weights are floats; quantise what load returns")

    def notes(self) -> tuple[str, ...]:
        return (f"dummy weights, seed {self.seed}: a hash of names and indices, nothing learned",)

    def files(self) -> tuple[Path, ...]:
        return ()

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def close(self) -> None: ...
