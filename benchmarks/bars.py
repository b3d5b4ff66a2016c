"""What must hold of the guide, of several ranks, of beams and of summaries: the tests, timed.

    python -m benchmarks.bars [--write]

Runs the tests that hold these bars, one after the other, and keeps what each of them measured
(`record_property`): for a row of this table look into the test of its name. Takes about 15 minutes
on 2 CPUs; needs the extra [test], SmolLM2, mpirun of Open MPI, and root for the two hosts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, about, write

RESULTS = "bars"
TESTS = (
    "tests/e2e/test_guide.py",
    "tests/e2e/test_guide_flags.py",
    "tests/e2e/test_guide_run_flags.py",
    "tests/e2e/test_ranks.py",
    "tests/e2e/test_ranks_end.py",
    "tests/e2e/test_two_hosts.py",
    "tests/model/test_beam_search.py",
    "tests/model/test_summarize_smollm2.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"keep results/{RESULTS}.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", f"--junit-xml={report}"]
        subprocess.run([*pytest, *TESTS], cwd=ROOT, check=False)
        rows = [row(case) for case in ET.parse(report).iter("testcase")]
    for found in rows:
        print(f"{found['test']}: {found['outcome']}, {found['seconds']} s")
        for name, value in found.get("measured", {}).items():
            print(f"    {name}: {value}")
    if args.write:
        record = about(RESULTS)
        record["versions"] |= {name: version(name) for name in ("torch", "transformers")}
        write(RESULTS, {**record, "tests": rows})
    return int(any(found["outcome"] in ("failure", "error") for found in rows))


def row(case: ET.Element) -> dict[str, Any]:
    """A test's name, outcome, seconds and, if it has any, figures."""
    outcomes = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
    measured = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
    return {
        "test": f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}",
        "outcome": outcomes[0] if outcomes else "passed",
        "seconds": round(float(case.get("time", "0")), 1),
        **({"measured": measured} if measured else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
