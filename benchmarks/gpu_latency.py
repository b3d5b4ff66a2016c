"""Latency of dummy models on this machine's GPU: what the README's table of a GPU says.

    python -m benchmarks.gpu_latency [--only llama-2-7b ...] [--out FILE]

Builds an engine of each model for this GPU, side by side, then runs `puna bench latency` once for
each row and prints the rows; with --out they are kept as JSON with machine, versions and commit.
About two minutes on an H200 with 16 CPU cores; needs 30 GB of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.record import about

PUNA = [sys.executable, "-m", "puna"]
MODELS = {  # dtype and longest context
    "llama-2-7b": ("float16", 4096),
    "llama-3-8b": ("bfloat16", 16384),
    "llama-3.2-1b": ("bfloat16", 8192),
    "llama-2-13b": ("float16", 4096),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement: sequences side by side, tokens of a prompt and of an answer."""

    model: str
    batch: int
    isl: int = 128
    osl: int = 128
    rounds: int = 2


ROWS = (
    Row("llama-2-7b", 1),
    *(Row("llama-2-7b", batch, rounds=1) for batch in (8, 16, 32, 64)),
    Row("llama-2-7b", 1, isl=2048, osl=8, rounds=3),
    Row("llama-3-8b", 1),
    Row("llama-3-8b", 1, isl=8192, osl=32, rounds=1),
    Row("llama-3.2-1b", 1),
    Row("llama-2-13b", 1),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Latency of dummy models on a GPU.")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the figures as JSON")
    args = parser.parse_args()
    import torch

    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        engines = built(args.only, target, Path(folder))
        print(f"{torch.cuda.get_device_name()}: ms to the first token, ms a step, of the roofline")
        for row in ROWS:
            if row.model in args.only:
                figures = measured(row, engines[row.model])
                found.append(figures)
                print(
                    f"{row.model:13} batch {row.batch:2}, {row.isl:4} + {row.osl:3}: "
                    f"{figures['ttft_ms']:7.2f} {figures['decode_ms']:7.3f} "
                    f"{figures['roofline']:6.1%}",
                    flush=True,
                )
    if args.out:
        record = about("gpu_latency")
        record["machine"]["gpu"] = torch.cuda.get_device_name()
        record["versions"] |= {name: version(name) for name in ("torch", "triton")}
        args.out.write_text(json.dumps({**record, "measurements": found}, indent=1) + "\n")
    return 0


def built(models: list[str], target: str, folder: Path) -> dict[str, Path]:
    """An engine of each model; all are built at once."""
    engines = {model: folder / model for model in models}
    builds = [
        subprocess.Popen([*PUNA, *build_arguments(model, target), "-o", str(engine)])
        for model, engine in engines.items()
    ]
    if any(build.wait() for build in builds):
        raise SystemExit("an engine could not be built: see above")
    return engines


def build_arguments(model: str, target: str) -> list[str]:
    dtype, longest = MODELS[model]
    words = f"build --dummy {model} --dtype {dtype} --max-seq-len {longest} --target {target}"
    return words.split()


def measured(row: Row, engine: Path) -> dict[str, Any]:
    words = f"--batch {row.batch} --isl {row.isl} --osl {row.osl} --rounds {row.rounds} --json"
    command = [*PUNA, "bench", "latency", str(engine), *words.split()]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stderr}")
    figures = json.loads(run.stdout)
    kept = ("batch", "isl", "ttft_ms", "decode_ms", "tok_s", "gb_s", "read_gb_s", "roofline")
    return {
        "model": row.model,
        "command": f"puna bench latency ENGINE {words}",
        **{name: figures[name] for name in kept},
    }


if __name__ == "__main__":
    sys.exit(main())
