"""plan: every choice that makes an engine, resolved with its reason. Pure: reads no weights, needs
no GPU.

Input: the facts of the checkpoint and the user's `BuildConfig`; output: the `EngineConfig` that
will be config.json, memory plan included. This file decides formats, padding, limits and defaults;
it does not know how weights are read or written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from puna.engine import (
    FORMAT_VERSION,
    DummyRecipe,
    EngineConfig,
    Limits,
    Provenance,
    StoredWeight,
)
from puna.errors import ConfigError
from puna.mapping import check_parallel
from puna.memory import rank_memory
from puna.quant import DTYPES, KV_DTYPES, Format
from puna.spec import GenerationDefaults, ModelSpec
from puna.weights import checkpoint_weights, engine_weights

Quant = Literal["auto", "none", "int8", "int4"]
Resolved = dict[str, tuple[Any, str]]

DEFAULT_BATCH_SIZE = 8
DEFAULT_NUM_TOKENS = 512
DEFAULT_INT4_GROUP = 128
BLOCK_SIZE = 16
# KV cache by default: one long sequence, and this many tokens for each of the others.
LONG_SEQUENCE = 32768
TOKENS_A_SEQUENCE = 1024


@dataclass(frozen=True)
class BuildConfig:
    """The user's choices; None and "auto" are resolved by `plan`, each with a reason."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quant: Quant = "auto"
    group_size: int | None = None
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16", "fp8", "int8"] = "auto"
    tp_size: int = 1
    pp_size: int = 1
    target: str = "auto"
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError(f"dtype {self.dtype!r}: use one of auto, {', '.join(DTYPES)}")
        if self.quant not in get_args(Quant):
            raise ConfigError(f"quant {self.quant!r}: use one of {', '.join(get_args(Quant))}")
        if self.kv_dtype not in ("auto", "fp8", *KV_DTYPES):
            known = ", ".join(("auto", "fp8", *KV_DTYPES))
            raise ConfigError(f"kv_dtype {self.kv_dtype!r}: use one of {known}")
        for name in ("max_seq_len", "max_batch_size", "max_num_tokens", "tp_size", "pp_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 < value < 2**31):
                raise ConfigError(f"{name} is {value!r}; it must be a positive whole number")
        if self.group_size is not None:
            if self.quant not in ("int8", "int4"):
                raise ConfigError(
                    f"group_size {self.group_size} needs --quant int8 or int4, found {self.quant}"
                )
            if type(self.group_size) is not int or self.group_size < 0 or self.group_size % 16:
                raise ConfigError(
                    f"group_size is {self.group_size!r}; use a multiple of 16, or 0 for one group "
                    "per output channel"
                )


@dataclass(frozen=True)
class CheckpointFacts:
    """What `plan` knows of a checkpoint: no weights, only their formats."""

    spec: ModelSpec
    formats: MappingABC[str, Format]  # by canonical name, matrices at least
    generation: GenerationDefaults
    provenance: Provenance
    dummy: DummyRecipe | None = None


def plan(facts: CheckpointFacts, config: BuildConfig) -> EngineConfig:
    """Resolve every choice. Raises ConfigError for what contradicts the model or this version."""
    spec = facts.spec
    check_parallel(spec, config.tp_size, config.pp_size)
    resolved: Resolved = {"target": _target(config)}
    resolved["dtype"] = _dtype(facts, config)
    dtype: str = resolved["dtype"][0]
    weights = _weight_formats(facts, config, dtype)
    resolved["quant"] = _quant(facts, config, weights)
    resolved["kv_dtype"] = _kv_dtype(config, dtype, weights)
    resolved["ffn_multiple"] = _ffn_multiple(config, weights)
    _check_groups(facts, config)
    limits = _limits(spec, config, resolved)
    planned = EngineConfig(
        format_version=FORMAT_VERSION,
        spec=spec,
        target=resolved["target"][0],
        tp_size=config.tp_size,
        pp_size=config.pp_size,
        dtype=dtype,
        quant=resolved["quant"][0],
        kv_dtype=resolved["kv_dtype"][0],
        ffn_multiple=resolved["ffn_multiple"][0],
        vocab_multiple=1,
        limits=limits,
        weights={name: StoredWeight(fmt.name, "tiles") for name, fmt in weights.items()},
        memory=(),
        resolved=resolved,
        generation=facts.generation,
        dummy=facts.dummy,
        provenance=facts.provenance,
    )
    memory = tuple(rank_memory(planned, rank, "cpu") for rank in range(planned.world_size))
    return replace(planned, memory=memory)


def _target(config: BuildConfig) -> tuple[str, str]:
    if config.target == "auto":
        return "cpu", "the only target of this version"
    if config.target != "cpu":
        raise ConfigError(
            f"target {config.target!r} is not built by this version of puna, which has: cpu"
        )
    return "cpu", "as asked"


def _dtype(facts: CheckpointFacts, config: BuildConfig) -> tuple[str, str]:
    if config.dtype != "auto":
        return config.dtype, "as asked"
    counts = Counter(fmt.dtype for fmt in facts.formats.values() if fmt.is_dense)
    kept = [fmt for fmt in facts.formats.values() if not fmt.is_dense]
    if counts and not kept:
        return counts.most_common(1)[0][0], "what the checkpoint holds"
    return "float16", "the checkpoint is quantised; float16 is the finest half precision"


def _weight_formats(facts: CheckpointFacts, config: BuildConfig, dtype: str) -> dict[str, Format]:
    """Format of every stored tensor."""
    return {
        weight.name: _matrix_format(weight.name, facts, config, dtype)
        if weight.is_matrix
        else Format.dense("float32")
        for weight in engine_weights(facts.spec)
    }


def _matrix_format(name: str, facts: CheckpointFacts, config: BuildConfig, dtype: str) -> Format:
    if config.quant == "none":
        return Format.dense(dtype)
    if config.quant == "auto":
        found = facts.formats.get(name, Format.dense(dtype))
        return Format.dense(dtype) if found.is_dense else found
    group_size = config.group_size
    if group_size is None:
        group_size = DEFAULT_INT4_GROUP if config.quant == "int4" else 0
    # Four bits cost the vocabulary matrices too much accuracy; GGUF files keep them finer as well.
    is_vocab = name in ("embed.weight", "head.weight")
    return Format.quantised(8 if is_vocab or config.quant == "int8" else 4, group_size)


def _quant(
    facts: CheckpointFacts, config: BuildConfig, weights: dict[str, Format]
) -> tuple[str, str]:
    counts: Counter[str] = Counter()
    for weight in checkpoint_weights(facts.spec):
        if weight.is_matrix:
            counts[weights[weight.name].name] += math.prod(weight.shape)
    total = sum(counts.values())
    shares = ", ".join(f"{n / total:.0%} {name}" for name, n in counts.most_common())
    most = Format.parse(counts.most_common(1)[0][0])
    label = "none" if most.is_dense else most.name
    if config.quant == "auto":
        return label, f"what the checkpoint holds: {shares}"
    return label, f"as asked: {shares}"


def _kv_dtype(config: BuildConfig, dtype: str, weights: dict[str, Format]) -> tuple[str, str]:
    if config.kv_dtype == "fp8":
        raise ConfigError(
            "kv-dtype fp8 is not available on target cpu in this version: use auto or int8"
        )
    if config.kv_dtype != "auto":
        return config.kv_dtype, "as asked"
    if dtype == "float32":
        return "float32", "the same as dtype"
    # Not beside weights that are rounded here: what is left of the accuracy is worth more than a
    # few per cent of the speed (WikiText-2 perplexity of SmolLM2 in int8: 0.55 % up with bfloat16,
    # 0.37 % with float16).
    if config.quant == "auto" and not all(fmt.is_dense for fmt in weights.values()):
        return "bfloat16", (
            "as small as float16 and faster to multiply; the rounding of activations to int8 "
            "outweighs its own"
        )
    if dtype == "bfloat16":
        return "float16", "as small as bfloat16 and finer; keys and values are far within its range"
    return dtype, "the same as dtype"


def _ffn_multiple(config: BuildConfig, weights: dict[str, Format]) -> tuple[int, str]:
    if config.tp_size == 1:
        return 1, "one rank holds all of the ffn"
    groups = [fmt.group_size for name, fmt in weights.items() if name.endswith("mlp.down.weight")]
    multiple = math.lcm(*(group for group in groups if group)) if any(groups) else 1
    return multiple, "a rank's part of the ffn is whole quantisation groups"


def _check_groups(facts: CheckpointFacts, config: BuildConfig) -> None:
    """Blocks that are kept cannot be cut: a rank's part of o_proj's inputs must be whole groups."""
    if config.quant != "auto":
        return
    part = facts.spec.q_size // config.tp_size
    for layer in range(facts.spec.num_layers):
        fmt = facts.formats.get(f"layers.{layer}.attn.o.weight")
        if fmt and fmt.group_size and part % fmt.group_size:
            raise ConfigError(
                f"tp {config.tp_size} cuts the checkpoint's {fmt.name} blocks: a rank has {part} "
                f"attention columns, not a multiple of {fmt.group_size}: use another --tp, or "
                "--quant int8, int4 or none"
            )


def _limits(spec: ModelSpec, config: BuildConfig, resolved: Resolved) -> Limits:
    """Also records each limit in `resolved`."""

    def choose(name: str, asked: int | None, default: int, why: str) -> int:
        resolved[name] = (asked, "as asked") if asked is not None else (default, why)
        return resolved[name][0]

    positions = spec.max_position_embeddings
    max_seq_len = choose(
        "max_seq_len", config.max_seq_len, positions, "the model's max_position_embeddings"
    )
    batch = choose("max_batch_size", config.max_batch_size, DEFAULT_BATCH_SIZE, "default")
    num_tokens = choose(
        "max_num_tokens", config.max_num_tokens, max(DEFAULT_NUM_TOKENS, batch), "default"
    )
    if num_tokens < batch:
        raise ConfigError(
            f"max_num_tokens {num_tokens} is below max_batch_size {batch}: a step must have room "
            "for one token of each sequence"
        )
    tokens = [min(max_seq_len, LONG_SEQUENCE)] + [min(max_seq_len, TOKENS_A_SEQUENCE)] * (batch - 1)
    num_blocks = 1 + sum(-(-n // BLOCK_SIZE) for n in tokens)
    resolved["kv_cache_tokens"] = (
        (num_blocks - 1) * BLOCK_SIZE,
        f"one sequence of {tokens[0]:,} tokens and {batch - 1} of {min(tokens):,}; change it when "
        "the engine is run",
    )
    return Limits(max_seq_len, batch, num_tokens, BLOCK_SIZE, num_blocks)


def warnings(config: EngineConfig) -> list[str]:
    """One line each on what a user may not expect."""
    found = list(config.provenance.notes)
    positions = config.spec.max_position_embeddings
    if config.limits.max_seq_len > positions:
        found.append(
            f"max_seq_len {config.limits.max_seq_len} exceeds the model's {positions} positions; "
            "text beyond them may be poor"
        )
    return found
