"""The report file of an engine: what was measured with it, `X.report.json` beside the engine `X`.

It lies beside the engine, not in it, since an engine never changes after its build. Decides how
records are kept: appended under a lock, the file replaced as a whole, nothing that is there ever
dropped. Knows nothing of what was measured: figures are whatever a benchmark gives.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from puna.errors import EngineError
from puna.strict_json import canonical_json, check_json, exact_keys
from puna.version import puna_version

REPORT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One measurement. `time` is ISO 8601 in UTC; `engine_digest` is `EngineConfig.digest()`, which
    tells whether the engine beside the report is still the one that was measured."""

    kind: str
    time: str
    puna_version: str
    machine: str
    command: str
    engine_digest: str
    figures: dict[str, Any]


def new_record(kind: str, command: str, engine_digest: str, figures: dict[str, Any]) -> Record:
    """A record of now, of this puna and of this machine."""
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Record(kind, time, puna_version(), machine(), command, engine_digest, figures)


def report_path(engine_dir: str | Path) -> Path:
    """Where the records of an engine are.

    >>> report_path("/models/small/").as_posix()
    '/models/small.report.json'
    """
    path = Path(os.path.abspath(engine_dir))
    return path.with_name(f"{path.name}.report.json")


def read_records(engine_dir: str | Path) -> tuple[Record, ...]:
    """All records, oldest first; none where there is no file. EngineError for a damaged one."""
    path = report_path(engine_dir)
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or set(data) != {"format_version", "records"}:
            raise ValueError("it needs exactly format_version and records")
        if data["format_version"] != REPORT_VERSION:
            raise ValueError(f"format {data['format_version']!r}; this puna reads {REPORT_VERSION}")
        return tuple(Record(**_checked(record)) for record in data["records"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise EngineError(
            f"{path} cannot be read as a report ({error}): move it away, and a new one is begun"
        ) from error


def append_record(engine_dir: str | Path, record: Record) -> Path:
    """Add a record after those that are there, atomically; return the file.

    Raises EngineError, and changes nothing, where the file is damaged or cannot be written.
    """
    path = report_path(engine_dir)
    try:
        with _lock(path.parent):
            records = (*read_records(engine_dir), record)
            data = {"format_version": REPORT_VERSION, "records": [asdict(r) for r in records]}
            _replace(path, canonical_json(data))
    except OSError as error:
        raise EngineError(
            f"{path} cannot be written ({error.strerror}): make its folder writable"
        ) from error
    return path


def machine() -> str:
    """The processor's name, the number of CPUs, and the system."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()}"


def _checked(record: Any) -> dict[str, Any]:
    check_json(exact_keys(Record, record), Record, "record")
    if not isinstance(record["figures"], dict):
        raise ValueError("record.figures is no object")
    return record


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One writer at a time, by a lock on the folder: the file itself is replaced, and a lock file
    of its own would be left behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
