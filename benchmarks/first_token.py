"""From typing `puna run` to the first token on the screen, with SmolLM2-135M-Instruct.

    python -m benchmarks.first_token [--rounds 9] [--write]

The checkpoint is what `puna quickstart` fetches; its build is timed too. Each round is a process
of its own; the engine's files are in the system's cache, as they are after the build. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import about, write
from puna.builder import build
from puna.cli.quickstart import fetch_smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how soon the first token comes.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    args = parser.parse_args()
    checkpoint = fetch_smollm2(Path.home() / ".cache" / "puna")
    with tempfile.TemporaryDirectory() as folder:
        record = {**measure(checkpoint, Path(folder), args.rounds), **about("first_token")}
    print(json.dumps(record, indent=2))
    if args.write:
        write("first_token", record)


def measure(checkpoint: Path, folder: Path, num_rounds: int) -> dict[str, Any]:
    start = time.perf_counter()
    engine = build(checkpoint, folder / "engine").path
    build_s = time.perf_counter() - start
    seconds = [_first_token(engine) for _ in range(num_rounds)]
    return {
        "model": checkpoint.name,
        "rounds": num_rounds,
        "build_s": round(build_s, 2),
        "first_token_s": round(statistics.median(seconds), 3),
        "slowest_s": round(max(seconds), 3),
    }


def _first_token(engine: Path) -> float:
    command = [sys.executable, "-m", "puna", "run", str(engine), "--prompt", "Once upon a time"]
    start = time.perf_counter()
    with subprocess.Popen([*command, "--stream", "--max-new-tokens", "8"], stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.read(1), "no token came"
        first = time.perf_counter() - start
        process.stdout.read()
    return first


if __name__ == "__main__":
    main()
