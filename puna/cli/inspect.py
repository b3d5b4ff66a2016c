"""`puna inspect` and `puna verify`: what an engine is, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli.build import print_plan
from puna.cli.progress import byte_bar
from puna.errors import EngineError

if TYPE_CHECKING:
    from puna.report import Record

INSPECT_HELP = """\
Say what an engine is: model, formats, limits, memory, where it came from.

  puna inspect engine
  puna inspect engine --json               config.json of the engine, its kernels.json as "kernels"
                                           (null on a CPU) and its records as "reports"

Records are what --record of puna bench and puna summarize kept in ENGINE.report.json.
"""
VERIFY_HELP = """\
Check that every file of an engine, of all ranks, is what the build wrote.

  puna verify engine
"""


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what an engine is",
        description=INSPECT_HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("engine", metavar="DIR")
    inspect.add_argument("--json", action="store_true", help="one JSON object")
    inspect.set_defaults(handler=run_inspect)
    verify = commands.add_parser(
        "verify",
        help="check every byte of an engine",
        description=VERIFY_HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("engine", metavar="DIR")
    verify.set_defaults(handler=run_verify)


def run_inspect(args: argparse.Namespace) -> int:
    from puna.engine import read_config
    from puna.targets import TARGETS

    path = Path(args.engine)
    config = read_config(path)
    kernels = read_kernel_table(path) if TARGETS[config.target].is_gpu else None
    if args.json:
        records = _records(args.engine)
        reports = None if records is None else [asdict(record) for record in records]
        print(json.dumps({**config.to_json(), "kernels": kernels, "reports": reports}))
        return 0
    spec, provenance = config.spec, config.provenance
    print(f"{path}: engine format {config.format_version}, built by puna {provenance.puna_version}")
    print(f"source  {provenance.source} ({provenance.kind})")
    print(
        f"model   {spec.num_layers} layers, hidden {spec.hidden_size}, {spec.num_heads} heads, "
        f"{spec.num_kv_heads} KV heads of {spec.head_dim}, ffn {spec.intermediate_size}, "
        f"vocabulary {spec.vocab_size}"
    )
    counts: dict[str, int] = {}
    for weight in config.weights.values():
        counts[weight.format] = counts.get(weight.format, 0) + 1
    formats = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"tensors {formats}")
    print(f"ranks   {config.world_size} (tp {config.tp_size}, pp {config.pp_size})")
    if config.dummy is not None:
        print(f"weights generated when loaded (dummy, seed {config.dummy.seed})")
    for note in provenance.notes:
        print(f"note    {note}")
    print()
    print_plan(config)
    if kernels is not None:
        _print_kernels(kernels)
    _print_records(_records(args.engine) or (), config.digest())
    return 0


def read_kernel_table(engine: Path) -> dict[str, Any]:
    """kernels.json of an engine for a GPU. EngineError where it is missing or damaged."""
    from puna.cuda.kernel_table import KERNELS_FILE
    from puna.engine import KERNELS_DIR

    path = engine / KERNELS_DIR / KERNELS_FILE
    try:
        table = json.loads(path.read_bytes())
        if {"target", "compilers", "kernels"} <= table.keys():
            return table
    except (OSError, ValueError, AttributeError) as error:
        raise EngineError(f"{path} cannot be read ({error}): build the engine again") from error
    raise EngineError(f"{path} is damaged: copy or build the engine again")


def _print_kernels(table: dict[str, Any]) -> None:
    compilers = ", ".join(f"{name} {version}" for name, version in table["compilers"].items())
    print(f"\n{len(table['kernels'])} kernels for {table['target']}, compiled by {compilers}:")
    print(textwrap.fill(" ".join(table["kernels"]), 100, break_on_hyphens=False))


def _records(engine: str) -> tuple[Record, ...] | None:
    """All records; None where the file is damaged, which says nothing about the engine."""
    from puna.report import read_records

    try:
        return read_records(engine)
    except EngineError as error:
        print(f"note: {error}", file=sys.stderr)
        return None


def _print_records(records: tuple[Record, ...], digest: str) -> None:
    """Those of this engine; of one that it replaced, how many there are."""
    mine = [record for record in records if record.engine_digest == digest]
    if mine:
        print("\nrecord     date        figures")
    for record in mine:
        figures = ", ".join(_main_figures(record))
        print(f"{record.kind:<9}  {record.time[:10]}  {figures}; {record.machine}")
    if len(mine) < len(records):
        print(f"\nrecords of engines that this one replaced: {len(records) - len(mine)}")


def _main_figures(record: Record) -> list[str]:
    """What a reader compares; the rest is in the file."""
    names = ("ttft_ms", "decode_ms", "roofline", "tok_s", "rouge1", "rouge2", "rougeL")
    figures = record.figures
    systems = figures.get("systems")
    own = systems.get("puna") if isinstance(systems, dict) else None
    if isinstance(own, dict):
        figures = own
    return [f"{name} {figures[name]:.4g}" for name in names if isinstance(figures.get(name), float)]


def run_verify(args: argparse.Namespace) -> int:
    from puna.engine import read_config
    from puna.manifest import check_files, read_manifest
    from puna.rank_file import check_rank_file, rank_file, rank_file_name

    path = Path(args.engine)
    config = read_config(path)
    manifest = read_manifest(path)
    total = sum(file.size for file in manifest.files)
    ranks = range(0 if config.dummy else config.world_size)
    with byte_bar("verifying") as progress:
        done = 0

        def report(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress(done, total)

        check_files(path, manifest, ranks, os.cpu_count() or 1, report)
    for rank in ranks:
        layout = rank_file(config, rank, config.digest())
        check_rank_file(path / rank_file_name(rank), layout)
    print(f"{path}: {len(manifest.files)} files, {total:,} bytes, all as built")
    return 0
