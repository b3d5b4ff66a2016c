"""How a rank ends when another was lost; the rest of ranks is in tests/e2e/test_ranks.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from small_models import ROOT

PROGRAM = "from puna.runtime.ranks import _end; _end('rank 1 is lost', 7)"


@pytest.mark.parametrize("reader", ["there", "gone", "asleep"])
def test_a_rank_ends_whether_or_not_anyone_reads_what_it_says(reader: str) -> None:
    """A launcher that was killed has closed its end; one that was stopped does not read."""
    read_end, write_end = os.pipe()
    if reader == "gone":
        os.close(read_end)
    if reader == "asleep":
        os.set_blocking(write_end, False)
        with suppress(BlockingIOError):
            while os.write(write_end, bytes(4096)):
                pass  # until it is full
        os.set_blocking(write_end, True)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=write_end, timeout=30)
    os.close(write_end)
    assert done.returncode == 7 and time.monotonic() - start < 10
    if reader == "there":
        assert os.read(read_end, 100) == b"puna: rank 1 is lost\n"
    if reader != "gone":
        os.close(read_end)
