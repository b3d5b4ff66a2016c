"""Memory errors and races in the GPU's kernels, as compute-sanitizer sees them.

    python -m benchmarks.gpu_sanitize [--sanitizer compute-sanitizer] [--tools memcheck racecheck]
                                      [--batches 0 1 ...] [--limit SECONDS] [--out FILE]

Builds an engine of two layers, wide enough for every kernel of its target, and generates from it
below each tool, greedily and with a temperature: prompts of few and many tokens, batches of 1 to
40, contexts of several parts; racecheck, which is slow, in a process for each batch, and from an
engine of one layer and few heads, which for more than 32 sequences is narrow too. Of what it says
those hazards count that are in puna's kernels; it takes the barriers of cuBLAS's (nvjet) for races.
Prints the reports; with --out they are kept, with machine, versions and commit. `--batches` are
some of BATCHES, by number. What takes longer than the limit is ended, which the report says. Needs
a GPU; memcheck takes a minute on an H200, racecheck half a minute for a batch and more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import about

SHAPE = "hidden=2048,layers=2,heads=32,kv_heads=8,head_dim=64,ffn=2816,vocab=4096"
NARROW = "hidden=2048,layers=1,heads=4,kv_heads=1,head_dim=64,ffn=512,vocab=256"
NARROWEST = "hidden=512,layers=1,heads=4,kv_heads=1,head_dim=64,ffn=256,vocab=256"
LIMITS = {"max_seq_len": 4096, "max_batch_size": 64, "max_num_tokens": 2048}
# Sequences side by side, and tokens of each prompt.
BATCHES = ((1, 5), (1, 100), (1, 700), (1, 2048), (2, 900), (5, 40), (13, 9), (20, 9))
BATCHES += ((40, 1), (40, 30))
REPORT_CHARS = 3000  # from its beginning, and from its end


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every kernel below compute-sanitizer.")
    parser.add_argument("--sanitizer", default="compute-sanitizer", metavar="PROGRAM")
    tools = ("memcheck", "racecheck")
    parser.add_argument("--tools", nargs="+", default=tools, choices=(*tools, "synccheck"))
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each process")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the reports as JSON")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)  # of the process below one
    every = range(len(BATCHES))
    which = "some of the batches, by number"
    parser.add_argument("--batches", type=int, nargs="+", default=every, choices=every, help=which)
    args = parser.parse_args()
    if args.engine:
        generate(args.engine, [BATCHES[i] for i in args.batches])
        return 0
    import torch

    from puna import BuildConfig, build
    from puna.checkpoint.dummy import DummyCheckpoint, parse_preset

    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    found: dict[str, Any] = about("gpu_sanitize")
    found |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "tools": {}}
    config = BuildConfig(dtype="float16", target=target, **LIMITS)
    with tempfile.TemporaryDirectory() as folder:
        for tool in args.tools:
            groups = [[i] for i in args.batches] if tool == "racecheck" else [[*args.batches]]
            found["tools"][tool] = []
            for group in groups:
                shape = SHAPE
                if tool == "racecheck":
                    shape = NARROWEST if BATCHES[group[0]][0] > 32 else NARROW
                path = Path(folder) / f"{tool} {group[0]}"
                engine = build(DummyCheckpoint(parse_preset(shape)), path, config).path
                report = checked(args.sanitizer, tool, engine, group, args.limit)
                found["tools"][tool].append({"model": shape, **report})
                if args.out:
                    args.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(it["status"] for runs in found["tools"].values() for it in runs))


def checked(
    sanitizer: str, tool: str, engine: Path, batches: list[int], limit: float | None
) -> dict[str, Any]:
    """Generate from some of BATCHES below a tool, and print what it says."""
    options = ["--tool", tool, "--error-exitcode", "9"]
    below = [sys.executable, "-m", "benchmarks.gpu_sanitize", "--engine", str(engine), "--batches"]
    run = subprocess.Popen(
        [sanitizer, *options, *below, *map(str, batches)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        report, _ = run.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # Python below it too, which would keep the GPU busy
        report, _ = run.communicate()
        report += f"\nended after {limit:g} s\n"
    hazards = [line for line in report.splitlines() if "Race reported between" in line]
    num_ours = sum("nvjet" not in line for line in hazards)
    others_alone = hazards and num_ours == 0 and "generated from" in report
    status = 0 if others_alone else run.returncode
    if len(report) > 2 * REPORT_CHARS:
        report = report[:REPORT_CHARS] + "\n...\n" + report[-REPORT_CHARS:]
    which = [BATCHES[i] for i in batches]
    counts = f"{num_ours} hazards of puna's kernels and {len(hazards) - num_ours} of cuBLAS's"
    print(f"{tool}, (sequences, tokens) {which}: {counts}, status {status}\n{report}", flush=True)
    return {"batches": which, "status": status, "hazards": counts, "report": report}


def generate(engine: Path, batches: list[tuple[int, int]]) -> None:
    from puna import LLM, SamplingParams

    with LLM(engine, prefix_cache=False) as llm:
        for temperature in (0.0, 0.8):
            params = SamplingParams(3, temperature=temperature, ignore_eos=True)
            for num_seqs, num_tokens in batches:
                prompts = [[1 + (i + j) % 250 for j in range(num_tokens)] for i in range(num_seqs)]
                llm.generate(prompts, params)
    print(f"generated from {len(batches)} batches, twice")


if __name__ == "__main__":
    sys.exit(main())
