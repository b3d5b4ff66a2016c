"""Typed access to the metadata of checkpoints: JSON files and GGUF keys.

Decides how a missing, null, mistyped or absurd value is reported. Knows no key by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.errors import CheckpointError

_LARGEST_JSON = 64 << 20  # an index of 10,000 tensors is 1 MB


class Fields:
    """A mapping read key by key; `where` starts every message. null counts as absent.

    Every getter takes a default; without one the key is required. All raise CheckpointError.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def has(self, key: str) -> bool:
        return self.data.get(key) is not None

    def _get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is ...:
            raise CheckpointError(f"{self.where}: {key} is missing")
        return default

    def _wrong(self, key: str, value: Any, needed: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {brief(value)}; it must be {needed}")

    def whole(self, key: str, default: Any = ..., smallest: int = 0) -> Any:
        """An int of at least `smallest` (a float such as 4096.0 counts)."""
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value < 2**63:
            raise self._wrong(key, value, f"a whole number of at least {smallest}")
        return value

    def number(self, key: str, default: Any = ...) -> Any:
        """A finite float."""
        value = self._get(key, default)
        if value is default:
            return value
        try:
            number = math.nan if isinstance(value, (bool, str)) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self._wrong(key, value, "a finite number")
        return number

    def flag(self, key: str, default: Any = ...) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = ...) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def object(self, key: str) -> Fields:
        """A nested object, empty when absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Fields(value, f"{self.where}: {key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Zero or more token ids, written as one number or as a list."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**31:
                raise self._wrong(key, value, "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))


def brief(value: Any, limit: int = 60) -> str:
    """repr, cut to what fits in a one-line message."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python will print
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_json(path: Path) -> Fields:
    """The object in a JSON file; CheckpointError when it is missing, damaged or no object."""
    data = read_bytes(path)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({brief(str(error), 120)}); download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {brief(value)}; it must be a JSON object")
    return Fields(value, str(path))


def read_bytes(path: Path, largest: int = _LARGEST_JSON) -> bytes:
    """A small file, whole; CheckpointError when it cannot be read or is larger than `largest`."""
    try:
        size = path.stat().st_size
        if size > largest:
            raise CheckpointError(f"{path} has {size} bytes; at most {largest} make sense")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
