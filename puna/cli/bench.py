"""`puna bench latency`: how fast an engine answers, and how near that is to what memory allows."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli.progress import token_bar
from puna.cli.run import add_device_options, open_llm

if TYPE_CHECKING:
    from puna.bench.latency import LatencyResult

HELP = """\
Measure an engine with random prompts; its tokenizer is not needed.

  puna bench latency engine                how long one prompt waits, token by token
"""
LATENCY_HELP = """\
Measure how long a prompt waits for its first token, and for each one after it.

  puna bench latency engine
  puna bench latency engine --isl 1024 --osl 64 --threads 8
  puna bench latency engine --batch 4 --json

Every round has fresh random prompts; the prefix cache is off and the end-of-text token is ignored.
One round more than --rounds is run first, to warm up. docs/benchmarks.md explains the figures.
"""


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure an engine",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = bench.add_subparsers(metavar="BENCHMARK", required=True)
    _add_latency(benches, parent)


def _add_latency(benches: Any, parent: argparse.ArgumentParser) -> None:
    parser: argparse.ArgumentParser = benches.add_parser(
        "latency",
        help="time to the first token and from token to token",
        description=LATENCY_HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("engine", metavar="DIR")
    add("--batch", type=int, default=1, metavar="N", help="prompts at once (default: %(default)s)")
    add("--isl", type=int, default=128, metavar="N", help="tokens a prompt (default: %(default)s)")
    add("--osl", type=int, default=128, metavar="N", help="new tokens each (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    add_device_options(parser)
    add("--kv-cache-bytes", type=int, metavar="N", help="default: what the engine planned")
    add("--record", action="store_true", help="keep the figures in ENGINE.report.json")
    add("--json", action="store_true", help="one JSON object")
    parser.set_defaults(handler=latency, tokenizer=None, chat_template=None)


def latency(args: argparse.Namespace) -> int:
    from puna.bench.latency import LatencyRun, check_run, measure_latency
    from puna.engine import read_config

    run = LatencyRun(batch=args.batch, isl=args.isl, osl=args.osl, rounds=args.rounds)
    config = read_config(Path(args.engine))
    check_run(run, config)
    with open_llm(args, prefix_cache=False) as llm, token_bar("measuring", args.quiet) as progress:
        result = measure_latency(llm, run, progress)
    figures = {name: _rounded(value) for name, value in asdict(result).items()}
    if args.json:
        print(json.dumps(figures))
    else:
        _print_latency(result)
    if args.record:
        from puna.report import append_record, new_record

        record = new_record("latency", args.command_line, config.digest(), figures)
        print(f"note: recorded in {append_record(args.engine, record)}", file=sys.stderr)
    return 0


def _rounded(value: object) -> object:
    """Six digits of a measurement, which is more than it has."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _print_latency(r: LatencyResult) -> None:
    from puna.memory import human_bytes

    sequences = "1 sequence" if r.batch == 1 else f"{r.batch} sequences"
    ranks = f", each of {r.ranks} ranks" if r.ranks > 1 else ""
    print(f"{r.engine} on {r.device}, threads: {r.threads}{ranks}")
    print(f"{sequences} of {r.isl} prompt tokens and {r.osl} new ones, rounds: {r.rounds}\n")
    together = ", all ranks together" if r.ranks > 1 else ""
    rows = [
        ("first token", f"{r.ttft_ms:,.2f} ms", "after the prompts were given"),
        ("prompt", f"{r.prefill_tok_s:,.1f} tok/s", "prompt tokens read until then"),
        ("each token", f"{r.decode_ms:,.2f} ms", "a step, one new token for each sequence"),
        ("output", f"{r.tok_s:,.1f} tok/s", "new tokens, all sequences together"),
        ("weights", human_bytes(r.weight_bytes), f"read by a step{together}"),
        ("KV cache", human_bytes(r.kv_bytes), "read by a step, halfway through the output"),
        ("memory reads", f"{r.gb_s:,.1f} GB/s", "both of these, in the time of a step"),
        ("read limit", f"{r.read_gb_s:,.1f} GB/s", "what memory allows, just measured"),
    ]
    width = max(len(value) for _, value, _ in rows)
    for name, value, meaning in rows:
        print(f"{name:<12}  {value:>{width}}  {meaning}")
    ideal_ms = r.decode_ms * r.roofline
    print(
        f"\nroofline {r.roofline:.0%}: reading those bytes alone would take {ideal_ms:,.2f} ms, "
        f"a step takes {r.decode_ms:,.2f} ms."
    )
