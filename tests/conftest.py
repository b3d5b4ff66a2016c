"""Fixtures that more than one test folder uses."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real tokenizers, weights and texts beside the repository; the test skips without them."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs {path}")
    return path
