"""Which puna this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def puna_version() -> str:
    """The installed version, or "source tree" when puna runs without being installed."""
    try:
        return version("puna")
    except PackageNotFoundError:
        return "source tree"
