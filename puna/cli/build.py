"""`puna build` and `puna plan`: the same arguments; the second says what the first would do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli.progress import byte_bar, kernel_bar
from puna.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    from puna.checkpoint import Checkpoint
    from puna.engine import EngineConfig
    from puna.plan import BuildConfig

BUILD_HELP = """\
Turn a checkpoint into an engine.

  puna build ./Llama-3.2-1B-Instruct -o llama-1b           as the checkpoint is
  puna build ./Llama-3.2-1B-Instruct -o llama-1b-int8 --quant int8
  puna build model.Q4_1.gguf -o small                      GGUF blocks are kept as they are
  puna build ./llama-2-70b -o 70b --tp 8                   for 8 ranks: puna launch -n 8 -- run 70b
  puna build ./Llama-3.2-1B-Instruct -o h200 --target sm_90   for H100 and H200, built anywhere
  puna build --dummy llama-3-8b -o dummy                   no weights: for measuring

Targets: cpu, and by compute capability the NVIDIA GPUs sm_80 (A100), sm_86 (A10, RTX 30),
sm_89 (L4, L40, RTX 40), sm_90 (H100, H200), sm_100 (B200), sm_120 (RTX 50). auto is the GPU of this
machine, and cpu where there is none. For a GPU the engine's kernels are compiled here, which needs
pip install "puna[cuda]".
"""
PLAN_HELP = """\
Say what `puna build` would make of the same arguments: every option with its reason, and the
memory of each rank to the byte. Reads headers only.

  puna plan ./Llama-3.2-1B-Instruct --quant int8
  puna plan --dummy llama-3-70b --tp 4 --json
"""


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    build = _add(commands, "build", "turn a checkpoint into an engine", BUILD_HELP, parent)
    build.add_argument("-o", "--output", required=True, metavar="DIR", help="the engine to make")
    build.add_argument("--force", action="store_true", help="replace an engine that is there")
    build.add_argument(
        "--workers", type=int, metavar="N", help="threads, over all ranks (default: CPUs, up to 4)"
    )
    build.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="ranks built side by side, each by a process of its own (default: 1, threads only)",
    )
    build.add_argument(
        "--tokenizer", metavar="DIR", help="take the tokenizer from there, not from the checkpoint"
    )
    build.set_defaults(handler=run_build)
    plan = _add(commands, "plan", "what build would make, without weights", PLAN_HELP, parent)
    plan.add_argument("--json", action="store_true", help="one JSON object")
    plan.set_defaults(handler=run_plan)


def _add(
    commands: Any, name: str, short: str, text: str, parent: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=text,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="directory, .gguf file or hub id")
    add(
        "--dummy",
        metavar="PRESET",
        help="random weights of a known shape (llama-2-7b, llama-3-8b, ...) or a free one "
        "(hidden_size=64,num_layers=2,...); a wrong name lists them all",
    )
    add("--seed", type=int, metavar="N", help="of dummy weights (default: 0)")
    add("--materialize", action="store_true", help="store dummy weights, not their recipe")
    add(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="of weights that are not quantised, and of the KV cache (default: the checkpoint's)",
    )
    add(
        "--quant",
        choices=("auto", "none", "int8", "int4"),
        default="auto",
        help="auto keeps what the checkpoint has (on a GPU it dequantises, for now); none "
        "dequantises; int8 is per output channel, int4 in groups of 128, unless --group-size "
        "(default: auto)",
    )
    add("--group-size", type=int, metavar="N", help="weights that share a scale; 0: a whole row")
    add(
        "--kv-dtype",
        choices=("auto", "float32", "float16", "bfloat16", "fp8", "int8"),
        default="auto",
        help="of the KV cache (default: as --dtype, and on a CPU float16 for bfloat16)",
    )
    add("--tp", type=int, default=1, metavar="N", help="split each layer over N ranks (default: 1)")
    add("--pp", type=int, default=1, metavar="N", help="deal the layers to N stages (default: 1)")
    add(
        "--target",
        default="auto",
        metavar="NAME",
        help="what the engine is for: auto (this machine's GPU, or cpu where there is none), cpu, "
        "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (default: auto)",
    )
    add("--max-seq-len", type=int, metavar="N", help="longest sequence (default: the model's)")
    add(
        "--max-batch-size",
        type=int,
        metavar="N",
        help="most sequences at once (default: 8, on a GPU 64)",
    )
    add(
        "--max-num-tokens",
        type=int,
        metavar="N",
        help="most tokens a step (default: 512, on a GPU 2048)",
    )
    return parser


def run_build(args: argparse.Namespace) -> int:
    from puna.builder import build
    from puna.engine import TOKENIZER_DIR
    from puna.memory import human_bytes
    from puna.plan import warnings

    tokenizer = _tokenizer_files(args.tokenizer)
    with (
        _open(args) as checkpoint,
        byte_bar("building") as progress,
        kernel_bar("compiling kernels") as kernel_progress,
    ):
        result = build(
            checkpoint,
            args.output,
            _config(args),
            workers=args.workers,
            processes=args.processes,
            force=args.force,
            materialize=args.materialize,
            tokenizer=tokenizer,
            progress=progress,
            kernel_progress=kernel_progress,
        )
    config = result.config
    for line in warnings(config):
        print(f"note: {line}", file=sys.stderr)
    has_tokenizer = (result.path / TOKENIZER_DIR).is_dir()
    if not has_tokenizer:
        print("note: the engine has no tokenizer; text needs --tokenizer DIR", file=sys.stderr)
    if config.dummy is not None:
        print(f"{result.path}: the recipe of dummy weights; --materialize stores the weights")
        return 0
    total = sum(memory.weights for memory in config.memory)
    label = config.dtype if config.quant == "none" else config.quant
    ranks = f" in {config.world_size} ranks" if config.world_size > 1 else ""
    print(f"{result.path}: {label} for {config.target}, {human_bytes(total)}{ranks}")
    if has_tokenizer:
        launch = f"launch -n {config.world_size} -- " if config.world_size > 1 else ""
        print(f'try: puna {launch}run {args.output} --prompt "Once upon a time"')
    return 0


def run_plan(args: argparse.Namespace) -> int:
    from puna.builder import plan_checkpoint
    from puna.plan import warnings

    with _open(args) as checkpoint:
        config = plan_checkpoint(checkpoint, _config(args), args.materialize)
    if args.json:
        ranks = [memory.to_json() for memory in config.memory]
        print(json.dumps({"ranks": ranks, "resolved": config.resolved}))
        return 0
    print_plan(config)
    for line in warnings(config):
        print(f"note: {line}", file=sys.stderr)
    return 0


def print_plan(config: EngineConfig) -> None:
    """Options with reasons, then bytes a rank."""
    width = max(map(len, config.resolved))
    for name, (value, reason) in config.resolved.items():
        print(f"{name:<{width}}  {value}  ({reason})")
    print(f"\n{'rank':<6}{'weights':>18}{'KV cache':>18}{'workspace':>18}{'total':>18}  bytes")
    for rank, memory in enumerate(config.memory):
        print(
            f"{rank:<6}{memory.weights:>18,}{memory.kv_cache:>18,}{memory.workspace:>18,}"
            f"{memory.total:>18,}"
        )


@contextmanager
def _open(args: argparse.Namespace) -> Iterator[Checkpoint]:
    from puna.builder import open_source
    from puna.checkpoint.dummy import DummyCheckpoint, parse_preset

    if (args.checkpoint is None) == (args.dummy is None):
        raise ConfigError("name either a checkpoint or --dummy PRESET (puna build --help)")
    if args.dummy is None:
        if args.seed is not None or args.materialize:
            option = "--materialize" if args.materialize else "--seed"
            raise ConfigError(f"{option} needs --dummy PRESET")
        checkpoint = open_source(args.checkpoint)
    else:
        checkpoint = DummyCheckpoint(parse_preset(args.dummy), args.seed or 0, args.dummy)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def _config(args: argparse.Namespace) -> BuildConfig:
    from puna.plan import BuildConfig

    return BuildConfig(
        dtype=args.dtype,
        quant=args.quant,
        group_size=args.group_size,
        kv_dtype=args.kv_dtype,
        tp_size=args.tp,
        pp_size=args.pp,
        target=args.target,
        max_seq_len=args.max_seq_len,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
    )


def _tokenizer_files(directory: str | None) -> dict[str, bytes] | None:
    if directory is None:
        return None
    from puna.tokenizer import TOKENIZER_FILES, load_tokenizer

    path = Path(directory)
    load_tokenizer(path)
    try:
        paths = [path / name for name in TOKENIZER_FILES]
        return {found.name: found.read_bytes() for found in paths if found.is_file()}
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
