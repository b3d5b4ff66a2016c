"""Decode speed against llama.cpp at the same speed of memory, on a machine where that changes.

    python -m benchmarks.decode_pairs MODEL.gguf --peer-python PYTHON [--pairs 60] [--write NAME]

Both models stay loaded, and take turns of a few tokens: short enough that memory, measured before,
between and after, is mostly as fast for the one as for the other. All pairs together are reported,
and, by memory's speed, those in which it did not change. PYTHON is as in benchmarks.llamacpp.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Threads of whoever was last have gone to sleep by then.
PAUSE_S = 0.1
# A pair counts as "full" or "low" memory if all three readings are above, or below, this share of
# --full.
FULL, LOW = 0.85, 0.70


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isl", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=8, help="in a turn")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument(
        "--full",
        type=float,
        metavar="GB_S",
        help="what this machine reads at its best (default: the best reading of the run)",
    )
    parser.add_argument("--write", metavar="NAME", help="keep results/NAME.json")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        serve_as_peer(args)
        return
    found = compare(args)
    print(json.dumps(found, indent=2))
    if args.write:
        from benchmarks.record import about, write

        write(args.write, {**about("decode_pairs"), **found})


def compare(args: argparse.Namespace) -> dict[str, Any]:
    from puna.llm import LLM
    from puna.native.bandwidth import read_bandwidth

    command = [args.peer_python, __file__, str(args.gguf), "--as-peer"]
    for name in ("threads", "isl", "tokens"):
        command += [f"--{name}", str(getattr(args, name))]
    pairs = []
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer,
    ):
        engine = Path(folder) / "engine"
        build = [sys.executable, "-m", "puna", "build", str(args.gguf), "-o", str(engine)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        with LLM(engine, threads=args.threads, prefix_cache=False) as llm:
            assert peer.stdin and peer.stdout and llm.session
            vocab_size = llm.session.config.spec.vocab_size
            version = json.loads(peer.stdout.readline())

            def memory() -> float:
                time.sleep(PAUSE_S)
                found = read_bandwidth(args.threads, 400_000_000)
                time.sleep(PAUSE_S)
                return found

            ours(llm.executor, vocab_size, args)
            reads = [memory()]
            for _ in range(args.pairs):
                peer.stdin.write("go\n")
                peer.stdin.flush()
                theirs = json.loads(peer.stdout.readline())
                reads.append(memory())
                pairs.append((theirs, ours(llm.executor, vocab_size, args)))
                reads.append(memory())
            peer.stdin.close()
    best = args.full or max(reads)
    by_speed: dict[str, list[int]] = {"all": list(range(args.pairs)), "full": [], "low": []}
    for i in range(args.pairs):
        here = reads[2 * i : 2 * i + 3]
        if min(here) >= FULL * best:
            by_speed["full"].append(i)
        elif max(here) <= LOW * best:
            by_speed["low"].append(i)
    return {
        "model": args.gguf.name,
        "threads": args.threads,
        "isl": args.isl,
        "tokens_a_turn": args.tokens,
        "pairs": args.pairs,
        "peer": f"llama-cpp-python {version}",
        "memory": {
            speed: _summary([pairs[i] for i in chosen], [reads[2 * i + 1] for i in chosen])
            for speed, chosen in by_speed.items()
        },
    }


def _summary(pairs: list[tuple[float, float]], reads: list[float]) -> dict[str, Any]:
    if not pairs:
        return {"pairs": 0}
    theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "pairs": len(pairs),
        "read_gb_s": round(statistics.median(reads), 1),
        "llama.cpp_tok_s": round(theirs, 1),
        "puna_tok_s": round(ours, 1),
        "ratio": round(statistics.median(ours / theirs for theirs, ours in pairs), 2),
    }


def ours(executor: Any, vocab_size: int, args: argparse.Namespace) -> float:
    """Tokens a second: the median step of one request, its prompt apart."""
    from puna.bench.latency import run_round

    rng = random.Random(0)
    prompt = [rng.randrange(vocab_size) for _ in range(args.isl)]
    _, steps = run_round(executor, [prompt], 1 + args.tokens, lambda num_tokens: None)
    return 1 / statistics.median(steps)


def serve_as_peer(args: argparse.Namespace) -> None:
    """llama.cpp's side: a turn for each line of input, its tokens a second for each answer."""
    from peer import Peer  # beside this file, which that interpreter runs as a script

    peer = Peer(args.gguf, args.threads)
    print(json.dumps(peer.version), flush=True)
    peer.run(args.isl, args.tokens)
    for _ in sys.stdin:
        _, steps = peer.run(args.isl, args.tokens)
        print(json.dumps(1 / statistics.median(steps)), flush=True)


if __name__ == "__main__":
    main()
