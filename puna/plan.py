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
from puna.memory import human_bytes, kv_block_bytes, planned_device, rank_memory
from puna.quant import DTYPES, KV_DTYPES, Format
from puna.spec import GenerationDefaults, ModelSpec
from puna.targets import TARGETS, Target
from puna.weights import checkpoint_weights, engine_weights

Quant = Literal["auto", "none", "int8", "int4"]
Resolved = dict[str, tuple[Any, str]]

DEFAULT_BATCH_SIZE = 8
DEFAULT_NUM_TOKENS = 512
# A GPU reads the weights once for all sequences of a step, and has the room for more of them.
GPU_BATCH_SIZE = 64
GPU_NUM_TOKENS = 2048
DEFAULT_INT4_GROUP = 128
# KV cache by default: one long sequence, and this many tokens for each of the others.
LONG_SEQUENCE = 32768
TOKENS_A_SEQUENCE = 1024
# But on a GPU, whose memory is not known when its target is named, no more bytes than the weights
# take, or these, so that an engine runs where its weights fit twice.
GPU_KV_BYTES = 4 * 2**30


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


def plan(
    facts: CheckpointFacts,
    config: BuildConfig,
    auto_target: tuple[str, str] = ("cpu", "no GPU was looked for"),
) -> EngineConfig:
    """Resolve every choice. `auto_target` is what target "auto" means on this machine, and why.

    Raises ConfigError for what contradicts the model, the target or this version.
    """
    spec = facts.spec
    check_parallel(spec, config.tp_size, config.pp_size)
    resolved: Resolved = {"target": _target(config, auto_target)}
    target = TARGETS[resolved["target"][0]]
    _check_target(config, target)
    resolved["dtype"] = _dtype(facts, config, target)
    dtype: str = resolved["dtype"][0]
    weights = _weight_formats(facts, config, dtype, target)
    resolved["quant"] = _quant(facts, config, weights, target)
    resolved["kv_dtype"] = _kv_dtype(config, dtype, weights, target)
    resolved["ffn_multiple"] = _ffn_multiple(config, weights)
    if target.has_quantised:
        _check_groups(facts, config)
    limits = _limits(spec, config, target, resolved)
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
        weights={name: StoredWeight(fmt.name, target.layout) for name, fmt in weights.items()},
        memory=(),
        resolved=resolved,
        generation=facts.generation,
        dummy=facts.dummy,
        provenance=facts.provenance,
    )
    planned = _with_kv_cache(planned, target)
    device = planned_device(planned)
    memory = tuple(rank_memory(planned, rank, device) for rank in range(planned.world_size))
    return replace(planned, memory=memory)


def _target(config: BuildConfig, auto_target: tuple[str, str]) -> tuple[str, str]:
    if config.target == "auto":
        return auto_target
    if config.target not in TARGETS:
        raise ConfigError(
            f"target {config.target!r} is not built by this version of puna: use one of auto, "
            f"{', '.join(TARGETS)}"
        )
    return config.target, "as asked"


def _check_target(config: BuildConfig, target: Target) -> None:
    """Refuse what was asked for and the target does not have."""
    for option, asked, legal in (
        ("dtype", config.dtype, ("auto", *target.dtypes)),
        ("kv-dtype", config.kv_dtype, ("auto", *target.kv_dtypes)),
        ("quant", config.quant, get_args(Quant) if target.has_quantised else ("auto", "none")),
    ):
        if asked not in legal:
            other = " (or --target cpu)" if target.is_gpu and asked != "fp8" else ""
            raise ConfigError(
                f"{option} {asked} is not available on target {target.name} in this version: use "
                f"{', '.join(legal[:-1])} or {legal[-1]}{other}"
            )
    if not target.has_ranks and config.tp_size * config.pp_size > 1:
        raise ConfigError(
            f"tp {config.tp_size} and pp {config.pp_size}: several ranks are not available on "
            f"target {target.name} in this version: leave --tp and --pp at 1 (or --target cpu)"
        )


def _dtype(facts: CheckpointFacts, config: BuildConfig, target: Target) -> tuple[str, str]:
    if config.dtype != "auto":
        return config.dtype, "as asked"
    counts = Counter(fmt.dtype for fmt in facts.formats.values() if fmt.is_dense)
    kept = [fmt for fmt in facts.formats.values() if not fmt.is_dense]
    if counts and not kept:
        found = counts.most_common(1)[0][0]
        if found in target.dtypes:
            return found, "what the checkpoint holds"
        return "float16", (
            f"the checkpoint holds {found}, which target {target.name} does not have; float16 is "
            "the finest half precision"
        )
    return "float16", "the checkpoint is quantised; float16 is the finest half precision"


def _weight_formats(
    facts: CheckpointFacts, config: BuildConfig, dtype: str, target: Target
) -> dict[str, Format]:
    """Format of every stored tensor."""
    if not target.has_quantised:
        config = replace(config, quant="none")
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
    facts: CheckpointFacts, config: BuildConfig, weights: dict[str, Format], target: Target
) -> tuple[str, str]:
    quantised = sorted({fmt.name for fmt in facts.formats.values() if not fmt.is_dense})
    if config.quant == "auto" and quantised and not target.has_quantised:
        return "none", (
            f"the checkpoint's {', '.join(quantised)} are dequantised: target {target.name} has no "
            "quantised weights in this version"
        )
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


def _kv_dtype(
    config: BuildConfig, dtype: str, weights: dict[str, Format], target: Target
) -> tuple[str, str]:
    if target.is_gpu and config.kv_dtype not in ("auto", dtype):
        raise ConfigError(
            f"kv-dtype {config.kv_dtype} beside dtype {dtype} is not available on target "
            f"{target.name} in this version: use auto, or the same --dtype (or --target cpu)"
        )
    if config.kv_dtype != "auto":
        return config.kv_dtype, "as asked"
    if target.is_gpu or dtype == "float32":
        return dtype, "the same as dtype"
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


def _limits(spec: ModelSpec, config: BuildConfig, target: Target, resolved: Resolved) -> Limits:
    """All but the number of KV blocks. Also records each limit in `resolved`."""

    def choose(name: str, asked: int | None, default: int, why: str) -> int:
        resolved[name] = (asked, "as asked") if asked is not None else (default, why)
        return resolved[name][0]

    positions = spec.max_position_embeddings
    max_seq_len = choose(
        "max_seq_len", config.max_seq_len, positions, "the model's max_position_embeddings"
    )
    why = "default of a GPU" if target.is_gpu else "default"
    usual = GPU_BATCH_SIZE if target.is_gpu else DEFAULT_BATCH_SIZE
    batch = choose("max_batch_size", config.max_batch_size, usual, why)
    usual = GPU_NUM_TOKENS if target.is_gpu else DEFAULT_NUM_TOKENS
    num_tokens = choose("max_num_tokens", config.max_num_tokens, max(usual, batch), why)
    if num_tokens < batch:
        raise ConfigError(
            f"max_num_tokens {num_tokens} is below max_batch_size {batch}: a step must have room "
            "for one token of each sequence"
        )
    return Limits(max_seq_len, batch, num_tokens, target.block_size, 1)


def _with_kv_cache(planned: EngineConfig, target: Target) -> EngineConfig:
    """The engine with a KV cache; how large it is, is also recorded in `resolved`."""
    limits = planned.limits
    size, batch, longest = limits.block_size, limits.max_batch_size, limits.max_seq_len
    tokens = [min(longest, LONG_SEQUENCE)] + [min(longest, TOKENS_A_SEQUENCE)] * (batch - 1)
    first, *others = (-(-n // size) for n in tokens)
    num_blocks = first + sum(others)
    why = f"one sequence of {tokens[0]:,} tokens and {batch - 1} of {min(tokens):,}"
    if target.is_gpu:
        room = max(rank_memory(planned, 0, "cuda").weights, GPU_KV_BYTES)
        most = room // kv_block_bytes(planned, 0)
        if num_blocks > max(most, first):
            num_blocks = max(most, first)
            why = f"one sequence of {tokens[0]:,} tokens"
            if first < most:
                why = f"what {human_bytes(room)} hold, the larger of the weights and 4 GiB"
    why += "; change it when the engine is run"
    return replace(
        planned,
        limits=replace(limits, num_blocks=1 + num_blocks),
        resolved={**planned.resolved, "kv_cache_tokens": (num_blocks * size, why)},
    )


def warnings(config: EngineConfig) -> list[str]:
    """One line each on what a user may not expect."""
    found = list(config.provenance.notes)
    positions = config.spec.max_position_embeddings
    if config.limits.max_seq_len > positions:
        found.append(
            f"max_seq_len {config.limits.max_seq_len} exceeds the model's {positions} positions; "
            "text beyond them may be poor"
        )
    quant, reason = config.resolved.get("quant", ("", ""))
    if quant == "none" and "are dequantised" in reason:
        found.append(reason)
    return found
