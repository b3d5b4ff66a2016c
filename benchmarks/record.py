"""What a figure means nothing without: machine, versions, commit, date and command."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def about(module: str) -> dict[str, Any]:
    """The circumstances of this run of `python -m benchmarks.<module>`."""
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_name(),
            "num_cpus": os.cpu_count(),
            "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "ml_dtypes")},
        },
    }


def write(name: str, figures: dict[str, Any]) -> Path:
    """Keep figures as results/<name>.json and say where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {path.relative_to(ROOT)}")
    return path


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run(
        [*git, "status", "--porcelain", "puna"], capture_output=True, text=True
    )
    return commit.stdout.strip() + (" and changes" if changes.stdout.strip() else "")


def _cpu_name() -> str:
    """Name, family and model: virtual machines often hide the name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = {
        key: found[1]
        for key in ("model name", "cpu family", "model")
        if (found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.M))
    }
    if not fields:
        return platform.processor()
    return (
        f"{fields.get('model name', platform.processor())} "
        f"(family {fields.get('cpu family')}, model {fields.get('model')})"
    )
