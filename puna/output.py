"""How an engine reaches its name on disk: whole, or not at all.

A build works in a locked folder beside its output and renames it at the end. Decides what may be
replaced (puna engines, with --force) and when a folder of a build that was killed is removed. Knows
nothing of what is in the files.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from puna.engine import CONFIG_FILE, KERNELS_DIR, TOKENIZER_DIR
from puna.errors import ConfigError
from puna.manifest import MANIFEST_FILE, is_rank_file


def check_output(out: Path, force: bool) -> None:
    """Raise ConfigError if something is at `out` that this build must not replace.

    An empty directory may be replaced, and with `force` a puna engine.
    """
    if not os.path.lexists(out) or _is_empty(out):
        return
    if not force:
        raise ConfigError(f"{out} exists already: choose another -o, or replace it with --force")
    if reason := _why_kept(out):
        raise ConfigError(
            f"{out} {reason}, and --force replaces puna engines only: remove it yourself, or "
            "choose another -o"
        )


def _why_kept(out: Path) -> str | None:
    """Why --force must not replace `out`; None for an engine, whole or damaged, of any version."""
    if out.is_symlink():
        return "is a link"
    if not out.is_dir():
        return "is a file"
    if not is_engine(out):
        return "is not a puna engine"
    own = (CONFIG_FILE, MANIFEST_FILE, TOKENIZER_DIR, KERNELS_DIR)
    others = sorted(p.name for p in out.iterdir() if p.name not in own and not is_rank_file(p.name))
    return f"holds {others[0]}, which is no part of an engine" if others else None


def _is_empty(out: Path) -> bool:
    """Whether `out` is a directory that was made beforehand, with nothing in it."""
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


def is_engine(path: Path) -> bool:
    """Whether config.json or manifest.json is one that a puna of some version wrote."""
    marks = ((CONFIG_FILE, {"format_version", "spec"}), (MANIFEST_FILE, {"files", "digest"}))
    for name, keys in marks:
        try:
            found = json.loads((path / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and keys <= found.keys():
            return True
    return False


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that is removed unless it was renamed, and by the next build at
    the latest: a lock on the folder tells which builds are still alive."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.iterdir():
            if stale.name.startswith(f"{out.name}.tmp-") and _is_workspace(stale, out):
                _remove_if_dead(stale)
        folder, lock = _locked_folder(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror}: choose another -o"
        ) from error
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _is_workspace(path: Path, out: Path) -> bool:
    """Whether a build made this folder: a user's own `engine.tmp-notes` stays."""
    suffix = path.name.removeprefix(f"{out.name}.tmp-")
    is_ours = len(suffix) == 8 and set(suffix) <= set("0123456789abcdef")
    return is_ours and path.is_dir() and not path.is_symlink()


def _locked_folder(out: Path) -> tuple[Path, int]:
    while True:
        folder = out.parent / f"{out.name}.tmp-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # Another build took it for a dead one before it was locked.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # The same, a moment later.


def _remove_if_dead(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return  # Its build has just ended.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return  # Another build is writing it now.
    finally:
        os.close(lock)


def finish(folder: Path, out: Path, force: bool) -> None:
    """Make everything durable, then give the folder its name, atomically."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not _renamed(folder, out):
        check_output(out, force)  # It may have come into being during the build.
        if not _exchange(folder, out):
            # Between the two renames there is no engine: the price where names cannot be exchanged.
            old = out.parent / f"{out.name}.tmp-{secrets.token_hex(4)}"
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old)
    descriptor = os.open(out.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _renamed(folder: Path, out: Path) -> bool:
    """Give the folder its name; False where that is taken."""
    if os.path.lexists(out) and not _is_empty(out):
        return False
    try:
        folder.rename(out)  # also onto an empty directory
    except OSError:
        if os.path.lexists(out) and not _is_empty(out):  # Another build has just finished.
            return False
        raise
    return True


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically (Linux's renameat2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    if renameat2 is None:
        return False
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
