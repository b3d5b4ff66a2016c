"""What a newcomer waits for: a fresh clone, a fresh environment, and the README's first command.

    python -m benchmarks.newcomer [--write]

Needs the network (the package index). Times `pip install .` and `puna quickstart` with an empty
cache, checks the answer and that torch did not come along, and times `import puna`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, about, write

LIMIT_SECONDS = 180
IMPORT_LIMIT_SECONDS = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a newcomer's first minutes.")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = {**measure(Path(folder)), **about("newcomer")}
    print(json.dumps(record, indent=2))
    if args.write:
        write("newcomer", record)
    if record["total_s"] > LIMIT_SECONDS or record["import_s"] > IMPORT_LIMIT_SECONDS:
        raise SystemExit("too slow")


def measure(folder: Path) -> dict[str, Any]:
    clone, environment = folder / "puna", folder / "venv"
    _run(["git", "clone", "--quiet", str(ROOT), str(clone)])
    _run([sys.executable, "-m", "venv", str(environment)])
    python, puna = (str(environment / "bin" / name) for name in ("python", "puna"))
    start = time.perf_counter()
    _run([python, "-m", "pip", "install", "--quiet", "."], clone)
    installed = time.perf_counter()
    answer = _run([puna, "quickstart", "--cache", str(folder / "cache")], folder)
    done = time.perf_counter()
    packages = _run([python, "-m", "pip", "list", "--format=freeze"])
    return {
        "install_s": round(installed - start, 1),
        "quickstart_s": round(done - installed, 1),
        "total_s": round(done - start, 1),
        "answers_tokyo": "Tokyo" in answer,
        "has_torch": bool(re.search(r"^torch==", packages, re.M)),
        "import_s": _import_seconds(python, folder),
    }


def _import_seconds(python: str, folder: Path) -> float:
    """The cumulative time that `-X importtime` gives for puna; best of five."""
    found = []
    for _ in range(5):
        command = [python, "-X", "importtime", "-c", "import puna"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        line = next(line for line in done.stderr.splitlines() if line.endswith("| puna"))
        found.append(int(line.split("|")[1]) / 1e6)
    return round(min(found), 4)


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
