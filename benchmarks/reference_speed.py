"""How long SmolLM2-135M-Instruct takes on the reference ops: build, load, first token, decode.

    python -m benchmarks.reference_speed [--rounds 5] [--write]

The checkpoint is what `puna quickstart` fetches. Prompts are fresh random tokens each round, with
the prefix cache off. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import about, write
from puna.builder import build
from puna.cli.quickstart import fetch_smollm2
from puna.llm import LLM
from puna.runtime.request import SamplingParams

PROMPT_LEN, NEW_TOKENS = 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the reference ops.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    args = parser.parse_args()
    checkpoint = fetch_smollm2(Path.home() / ".cache" / "puna")
    with tempfile.TemporaryDirectory() as folder:
        record = {**measure(checkpoint, Path(folder), args.rounds), **about("reference_speed")}
    print(json.dumps(record, indent=2))
    if args.write:
        write("reference_speed", record)


def measure(checkpoint: Path, folder: Path, num_rounds: int) -> dict[str, Any]:
    builds, loads, firsts, decodes = [], [], [], []
    rng = np.random.default_rng()
    for i in range(num_rounds):
        start = time.perf_counter()
        engine = build(checkpoint, folder / f"engine{i}").path
        builds.append(time.perf_counter() - start)
        start = time.perf_counter()
        with LLM(engine, prefix_cache=False) as llm:
            loads.append(time.perf_counter() - start)
            prompt = rng.integers(0, llm.config.spec.vocab_size, PROMPT_LEN).tolist()
            first, decode = _generate(llm, prompt)
        firsts.append(first)
        decodes.append(decode)
    return {
        "model": checkpoint.name,
        "rounds": num_rounds,
        "build_s": round(statistics.median(builds), 2),
        "load_s": round(statistics.median(loads), 2),
        "isl": PROMPT_LEN,
        "osl": NEW_TOKENS,
        "ttft_ms": round(statistics.median(firsts) * 1e3),
        "decode_ms": round(statistics.median(decodes) * 1e3, 1),
        "tok_s": round(1 / statistics.median(decodes), 2),
    }


def _generate(llm: LLM, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and the median of the steps after it."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    times = [time.perf_counter() for _ in llm.stream(prompt, params)]
    return times[0] - start, statistics.median(np.diff(times))


if __name__ == "__main__":
    main()
