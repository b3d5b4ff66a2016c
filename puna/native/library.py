"""Finds the compiled library: beside this file, or in the installed puna when that is elsewhere.

A library that was built from other sources than the ones here is not used.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ctypes import CDLL

_HERE = Path(__file__).resolve().parent
_NAME = "libpuna.dylib" if sys.platform == "darwin" else "libpuna.so"
_NOT_HERE = (
    "the native CPU library is not in this installation: install a C++ compiler (apt install g++)"
    " and run pip install . again (-v shows what failed)"
)
_REBUILD = "run cmake -S . -B build && cmake --build build in the source tree, or pip install ."


def find_library(path: Path | None = None) -> CDLL | None:
    """The library, or None where there is none to use; `why_missing` says why.

    `path` names the file to take instead of searching for one.
    """
    return _search(path)[0]


def why_missing(path: Path | None = None) -> str:
    """One line: what keeps `find_library` from finding one, and what to do. Empty if it does."""
    return _search(path)[1]


@cache
def _search(path: Path | None) -> tuple[CDLL | None, str]:
    reasons = []
    for candidate in [path] if path else _candidates():
        if candidate.is_file():
            library, reason = _load(candidate)
            if library is not None:
                return library, ""
            reasons.append(reason)
    reasons.append(f"there is no {path}" if path else _NOT_HERE)
    return None, reasons[0]


def _candidates() -> Iterator[Path]:
    yield _HERE / _NAME
    # Imported from the current directory (pytest does) while a wheel is installed: the sources are
    # here, the library is there.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        yield Path(str(distribution("puna").locate_file(f"puna/native/{_NAME}")))
    except PackageNotFoundError:
        return


def _load(path: Path) -> tuple[CDLL | None, str]:
    """The library if it can be used, otherwise why not."""
    import ctypes

    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        words = " ".join(str(error).split())
        return None, (
            f"{path} cannot be loaded ({words}), perhaps since it was built for another machine:"
            f" {_REBUILD}"
        )
    sources = _sources_digest()
    if sources and sources != _built_from(library):
        return None, f"{path} was built from other sources than {_HERE / 'csrc'}: {_REBUILD}"
    return library, ""


def _built_from(library: CDLL) -> str:
    """The digest of the sources that a library was built from; empty if it does not tell."""
    import ctypes

    function = getattr(library, "puna_source_digest", None)
    if function is None:
        return ""
    function.argtypes, function.restype = [], ctypes.c_char_p
    return function().decode()


def _sources_digest() -> str:
    """The digest of the sources beside this file, as CMakeLists.txt computes it; empty if there are
    none (an installed puna)."""
    sources = sorted(path for path in (_HERE / "csrc").glob("*") if path.suffix in (".cpp", ".h"))
    if not sources:
        return ""
    from hashlib import sha256

    lines = [f"{path.name} {sha256(path.read_bytes()).hexdigest()}\n" for path in sources]
    return sha256("".join(lines).encode()).hexdigest()
