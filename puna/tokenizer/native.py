"""The border to native tokenizer libraries: what they throw becomes one TokenizerError.

Also the one place that reads tokenizer files, so that no size goes unchecked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError

# The largest known files are tokenizer.json of 250k-entry vocabularies, about 35 MB (2025).
MAX_FILE_BYTES = 256 * 2**20


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def native_errors(message: str) -> Iterator[None]:
    """Raise TokenizerError(`message`: cause) for whatever the block throws.

    A panic of a Rust library arrives as PanicException, which derives from BaseException alone and
    is exported by none of them; it is known by its name. Ctrl-C and exit pass through.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{message}: {one_line(error)}") from error


def read_file(path: Path) -> bytes:
    """Return the bytes of a tokenizer file; TokenizerError if it is unreadable or too large."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TokenizerError(
                f"{path} has {size} bytes; a tokenizer file has at most {MAX_FILE_BYTES}, "
                "so get it again from the checkpoint's source"
            )
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error
    if not data:
        raise TokenizerError(f"{path} is empty; get it again from the checkpoint's source")
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull`")
    return data


def read_text(path: Path) -> str:
    """Return a UTF-8 file as text."""
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path} is not UTF-8 (byte {error.start}); get it again from the checkpoint's source"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is no file."""
    if not path.exists():
        return {}
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path} is not valid JSON ({one_line(error)}); get it again from its source"
        ) from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds a {type(data).__name__}; it must be a JSON object")
    return data
