"""Against llama.cpp on the same GGUF file: prompt and decode speed, in turns, and the ratios.

    python -m benchmarks.llamacpp MODEL.gguf --peer-python PYTHON [--turns 5] [--write NAME]

PYTHON is an interpreter with llama-cpp-python, built from source for this machine
(`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`); it may be
the one that runs this. Each turn runs llama.cpp and then `puna bench latency`, each in a process of
its own on an otherwise idle machine; the figures are medians over the turns. How fast memory can be
read is measured before, between and after the two: on a rented machine it may halve for minutes,
and who is at its limit then loses more than who is not. benchmarks.decode_pairs compares decoding
at one speed of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# (name, prompt tokens, new tokens): the prompt's speed, or the new tokens', is what is measured.
RUNS = (
    ("prefill_128", 128, 2),
    ("prefill_512", 512, 2),
    ("decode", 16, 48),
    ("decode_900", 900, 32),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="in a turn")
    parser.add_argument("--runs", default=",".join(name for name, _, _ in RUNS), help="which")
    parser.add_argument("--write", metavar="NAME", help="keep results/NAME.json")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        print(json.dumps(peer(args.gguf, args.threads, args.rounds, _runs(args))))
        return
    found = compare(args)
    print(table(found))
    if args.write:
        from benchmarks.record import about, write

        write(args.write, {**about("llamacpp"), **found})


def _runs(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    return [run for run in RUNS if run[0] in args.runs.split(",")]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    from puna.native.bandwidth import read_bandwidth  # the peer's interpreter has no puna

    rows: dict[str, dict[str, list[Any]]] = {
        name: {"llama.cpp": [], "puna": [], "roofline": [], "memory": []}
        for name, _, _ in _runs(args)
    }
    version = ""
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "engine"
        subprocess.run(
            [sys.executable, "-m", "puna", "build", str(args.gguf), "-o", str(engine)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for turn in range(args.turns):
            for name, isl, osl in _runs(args):
                before = read_bandwidth(args.threads)
                theirs = _json(_peer(args, name))
                version = theirs["version"]
                between = read_bandwidth(args.threads)
                ours = _json(_puna(engine, args, isl, osl))
                key = "prefill_tok_s" if name.startswith("prefill") else "tok_s"
                row = rows[name]
                row["llama.cpp"].append(theirs[name])
                row["puna"].append(ours[key])
                row["roofline"].append(ours["roofline"])
                row["memory"].append([round(x) for x in (before, between, ours["read_gb_s"])])
            print(f"turn {turn + 1} of {args.turns}", file=sys.stderr)
    return {
        "model": args.gguf.name,
        "threads": args.threads,
        "turns": args.turns,
        "peer": f"llama-cpp-python {version}",
        "tok_s": {
            name: {
                "llama.cpp": round(statistics.median(row["llama.cpp"]), 1),
                "puna": round(statistics.median(row["puna"]), 1),
                "ratio": round(
                    statistics.median(row["puna"]) / statistics.median(row["llama.cpp"]), 2
                ),
                "ratio_by_turn": [
                    round(ours / theirs, 2)
                    for ours, theirs in zip(row["puna"], row["llama.cpp"], strict=True)
                ],
                "roofline": round(statistics.median(row["roofline"]), 2),
                "read_gb_s_by_turn": row["memory"],
            }
            for name, row in rows.items()
        },
    }


def _peer(args: argparse.Namespace, run: str) -> list[str]:
    command = [args.peer_python, __file__, str(args.gguf), "--as-peer", "--runs", run]
    return [*command, "--rounds", str(args.rounds), "--threads", str(args.threads)]


def _puna(engine: Path, args: argparse.Namespace, isl: int, osl: int) -> list[str]:
    command = [sys.executable, "-m", "puna", "bench", "latency", str(engine), "--json"]
    command += ["--isl", str(isl), "--osl", str(osl)]
    return [*command, "--rounds", str(args.rounds), "--threads", str(args.threads)]


def _json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['model']}, {found['threads']} threads, against {found['peer']}", ""]
    heads = f"{'tok/s':<12} {'llama.cpp':>10} {'puna':>10} {'ratio':>7}"
    lines.append(f"{heads}   by turn (memory, GB/s)")
    for name, row in found["tok_s"].items():
        turns = " ".join(
            f"{ratio:.2f} ({min(reads)}-{max(reads)})"
            for ratio, reads in zip(row["ratio_by_turn"], row["read_gb_s_by_turn"], strict=True)
        )
        figures = f"{row['llama.cpp']:>10,.1f} {row['puna']:>10,.1f} {row['ratio']:>7.2f}"
        lines.append(f"{name:<12} {figures}   {turns}")
    return "\n".join(lines)


def peer(gguf: Path, threads: int, rounds: int, runs: list[tuple[str, int, int]]) -> dict[str, Any]:
    """llama.cpp's side of RUNS: medians over the rounds, after one that does not count."""
    from peer import Peer  # beside this file, which that interpreter runs as a script

    model = Peer(gguf, threads)
    rates: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    for i in range(1 + rounds):
        for name, isl, osl in runs:
            prompt, steps = model.run(isl, osl - 1)
            if i > 0:
                rates[name] += (
                    [isl / prompt] if name.startswith("prefill") else [1 / s for s in steps]
                )
    return {"version": model.version, **{name: statistics.median(r) for name, r in rates.items()}}


if __name__ == "__main__":
    main()
