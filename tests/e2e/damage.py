"""Ways to damage a directory, for tests of what is said about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]


def cut(name: str, keep: float | int) -> Damage:
    """Shorten a file to a number of bytes, or to a part of its size."""

    def damage(directory: Path) -> None:
        path = directory / name
        size = keep if isinstance(keep, int) else int(path.stat().st_size * keep)
        os.truncate(path, size)

    return damage


def write(name: str, text: str) -> Damage:
    return lambda directory: (directory / name).write_text(text)


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def edit_json(name: str, **changes: Any) -> Damage:
    def damage(directory: Path) -> None:
        data = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(data | changes))

    return damage
