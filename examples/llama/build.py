"""build.py: a checkpoint to an engine, with the flags of the LLaMA guide. The work is puna.build's.

Decides what the flags mean to puna; which there are is in build_flags.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from build_flags import DEFAULTS, NOTES, check_flags, parser
from flags import Flags, print_notes

from puna import build
from puna.builder import num_cpus, open_source
from puna.checkpoint import Checkpoint
from puna.checkpoint.dummy import DummyCheckpoint
from puna.checkpoint.hf import open_quantised
from puna.checkpoint.meta import open_meta
from puna.checkpoint.stored import FileCheckpoint
from puna.cli import exit_status
from puna.cli.build import print_plan
from puna.cli.progress import byte_bar
from puna.errors import ConfigError
from puna.memory import human_bytes
from puna.output import is_engine
from puna.plan import BuildConfig, Quant, warnings
from puna.spec import ModelSpec, RopeSpec

# The shape of a model without a checkpoint, by its name in ModelSpec.
SHAPE = {
    "vocab_size": "vocab_size", "n_layer": "num_layers", "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size", "n_head": "num_heads", "n_kv_head": "num_kv_heads",
    "inter_size": "intermediate_size", "rms_norm_eps": "rms_norm_eps",
}  # fmt: skip


def parallel(flags: Flags) -> tuple[int, int]:
    """(tp_size, pp_size); ConfigError unless their product is world_size."""
    world_size, tp_size, pp_size = flags["world_size"], flags["tp_size"], flags["pp_size"]
    if tp_size is None:
        tp_size = (world_size or pp_size) // max(1, pp_size)
    if world_size not in (None, tp_size * pp_size):
        raise ConfigError(
            f"--world_size {world_size} is not tp_size {tp_size} x pp_size {pp_size}: change one"
        )
    return tp_size, pp_size


def quantisation(flags: Flags) -> tuple[Quant, int | None]:
    """(quant, group_size). What a checkpoint holds in integers is kept: auto."""
    precision = flags["weight_only_precision"]
    if "use_weight_only" not in flags:
        return "auto", None
    if precision in ("int8", "int4"):
        return precision, flags["group_size"] if "per_group" in flags else 0
    has_checkpoint = "model_dir" in flags or "meta_ckpt_dir" in flags
    return ("auto", None) if has_checkpoint else ("int4", flags["group_size"])


def build_config(flags: Flags) -> BuildConfig:
    tp_size, pp_size = parallel(flags)
    quant, group_size = quantisation(flags)
    return BuildConfig(
        dtype=flags["dtype"],
        quant=quant,
        group_size=group_size,
        kv_dtype="int8" if "int8_kv_cache" in flags else "auto",
        tp_size=tp_size,
        pp_size=pp_size,
        target=flags["target"],
        max_seq_len=flags["max_input_len"] + flags["max_output_len"],
        # Each beam is a sequence.
        max_batch_size=flags["max_batch_size"] * flags["max_beam_width"],
        max_num_tokens=flags["max_num_tokens"],
    )


def dummy_spec(flags: Flags) -> ModelSpec:
    """The shape that the flags describe."""
    hidden_size, num_heads = flags["n_embd"], flags["n_head"]
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError(f"--n_embd {hidden_size} is not a multiple of --n_head {num_heads}")
    return ModelSpec(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size(flags, hidden_size),
        num_layers=flags["n_layer"],
        num_heads=num_heads,
        num_kv_heads=flags["n_kv_head"] or num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=flags["vocab_size"],
        max_position_embeddings=flags["n_positions"],
        rms_norm_eps=flags["rms_norm_eps"],
        rope=RopeSpec(theta=flags["rotary_base"]),
    )


def intermediate_size(flags: Flags, hidden_size: int) -> int:
    """inter_size, or what Meta's rule makes of the two multiples."""
    if "inter_size" in flags:
        return flags["inter_size"]
    multiple = flags["multiple_of"]
    if multiple < 1:
        raise ConfigError(f"--multiple_of is {multiple}; it must be at least 1: raise it")
    size = int(int(4 * hidden_size * 2 / 3) * flags["ffn_dim_multiplier"])
    return -(-size // multiple) * multiple


@contextmanager
def opened(flags: Flags) -> Iterator[Checkpoint]:
    """The checkpoint that the flags name, or dummy weights of the shape that they describe."""
    if "meta_ckpt_dir" in flags:
        path = Path(flags["meta_ckpt_dir"])
        if not (path / "params.json").is_file():
            raise ConfigError(
                f"--meta_ckpt_dir {path} has no params.json, so it is no Meta checkpoint: name the "
                "directory with params.json and consolidated.00.pth, or use --model_dir"
            )
        checkpoint: Checkpoint = open_meta(path, str(path))
    elif "quant_ckpt_path" in flags:
        path = flags["quant_ckpt_path"]
        checkpoint = open_quantised(Path(path), Path(flags["model_dir"]), path)
    elif "model_dir" in flags:
        checkpoint = open_source(flags["model_dir"])
    else:
        checkpoint = DummyCheckpoint(scaled(dummy_spec(flags), flags), source="dummy")
    with closing(checkpoint):
        if isinstance(checkpoint, FileCheckpoint):
            check_shape(flags, checkpoint.spec)
            checkpoint = replace(checkpoint, spec=scaled(checkpoint.spec, flags))
        yield checkpoint


def check_shape(flags: Flags, spec: ModelSpec) -> None:
    """ConfigError for a flag that contradicts what the checkpoint says."""
    found = {name: getattr(spec, field) for name, field in SHAPE.items()}
    asked = {name: flags[name] for name in SHAPE if name in flags}
    found["rotary_base"] = spec.rope.theta
    if "rotary_base" in flags:
        asked["rotary_base"] = flags["rotary_base"]
    for name in ("multiple_of", "ffn_dim_multiplier"):
        if name in flags:
            found[name] = spec.intermediate_size
            asked[name] = intermediate_size(flags, spec.hidden_size)
    for name, value in asked.items():
        if value != found[name]:
            raise ConfigError(
                f"--{name} makes it {value}, and the checkpoint says {found[name]}: leave --{name} "
                "out; it is for builds without a checkpoint"
            )


def scaled(spec: ModelSpec, flags: Flags) -> ModelSpec:
    """The spec with the RoPE scaling that is asked for."""
    if "rotary_scaling" not in flags:
        return spec
    kind, factor = flags["rotary_scaling"]
    try:
        is_legal = kind in ("linear", "dynamic") and float(factor) > 1
    except ValueError:
        is_legal = False
    if not is_legal:
        raise ConfigError(
            f"--rotary_scaling {kind} {factor}: needed linear or dynamic, and a factor above 1"
        )
    original = spec.max_position_embeddings if kind == "dynamic" else 0
    rope = replace(
        spec.rope,
        type=kind,
        factor=float(factor),
        original_max_position_embeddings=original,
    )
    if spec.rope.type != "default" and spec.rope != rope:
        raise ConfigError(
            f"--rotary_scaling {kind} {factor}, and the checkpoint has {spec.rope.type} scaling of "
            "its own: leave the flag out"
        )
    return replace(spec, rope=rope)


def check_kept(flags: Flags, checkpoint: Checkpoint) -> None:
    """ConfigError unless the checkpoint holds the integers that int4_awq or int4_gptq asks for."""
    if quantisation(flags) != ("auto", None) or "use_weight_only" not in flags:
        return
    found = checkpoint.format("layers.0.attn.q.weight")
    if found.is_dense or found.bits != 4:
        why = "".join(f" ({note})" for note in checkpoint.notes())
        raise ConfigError(
            f"--weight_only_precision {flags['weight_only_precision']}: the layers of "
            f"{checkpoint.source} are {found.name}{why}: name a GPTQ or AWQ checkpoint of 4 bits, "
            "or quantise with --weight_only_precision int4"
        )
    if "group_size" in flags and flags["group_size"] != found.group_size:
        raise ConfigError(
            f"--group_size {flags['group_size']}, and the checkpoint has {found.name}: leave it out"
        )


def run(flags: Flags) -> int:
    check_flags(flags)
    config, out = build_config(flags), Path(os.path.abspath(flags["output_dir"]))
    processes = num_cpus() if "parallel_build" in flags else 1
    replaced = [f"replaced the engine that was in {flags['output_dir']}"] if is_engine(out) else []
    bar = byte_bar("building") if flags.is_talkative else nullcontext()
    with opened(flags) as checkpoint, bar as progress:
        check_kept(flags, checkpoint)
        result = build(checkpoint, out, config, processes=processes, force=True, progress=progress)
    print_notes([*flags.notes(NOTES), *warnings(result.config), *replaced])
    if flags["log_level"] == "verbose":
        print_plan(result.config)
    if flags.is_talkative:
        size = human_bytes(sum(memory.weights for memory in result.config.memory))
        stored = "the recipe of dummy weights" if result.config.dummy else size
        print(f"{flags['output_dir']}: ranks: {result.config.world_size}, {stored}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(Flags(parser(), DEFAULTS))))
