"""manifest.json: what an engine directory holds, to the byte, and the check of it.

Each file is listed with its size and the SHA-256 of every 16 MiB chunk, so that digests can be
checked in parallel and while a rank loads. The manifest has one spelling: re-encoding what was read
must give the same bytes, so no byte of it can change unnoticed either.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from puna.engine import CONFIG_FILE, KERNELS_DIR, TOKENIZER_DIR
from puna.errors import EngineError
from puna.huge_pages import populate
from puna.rank_file import rank_file_name
from puna.strict_json import canonical_json

MANIFEST_FILE = "manifest.json"
CHUNK_BYTES = 16 * 2**20
READ_BYTES = 2**20  # at once, in each thread


@dataclass(frozen=True)
class FileDigest:
    """One file of an engine: path relative to the engine, size, SHA-256 of each chunk."""

    path: str
    size: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All files of an engine but the manifest itself, in order of path."""

    files: tuple[FileDigest, ...]

    def to_bytes(self) -> bytes:
        files = [asdict(file) for file in self.files]
        digest = hashlib.sha256(canonical_json(files)).hexdigest()
        return canonical_json({"files": files, "digest": digest})

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Manifest:
        """EngineError unless `data` is exactly what `to_bytes` writes."""
        try:
            entries = json.loads(data)["files"]
            files = tuple(FileDigest(e["path"], e["size"], tuple(e["chunks"])) for e in entries)
            manifest = cls(files)
            if manifest.to_bytes() == data and all(map(_is_plausible, files)):
                return manifest
        except (ValueError, TypeError, KeyError, AttributeError):
            pass  # Whatever is wrong with it, it is not what was written.
        raise EngineError(f"{path} is damaged: copy or build the engine again")


def read_manifest(engine_dir: Path) -> Manifest:
    path = engine_dir / MANIFEST_FILE
    try:
        return Manifest.from_bytes(path.read_bytes(), path)
    except FileNotFoundError:
        raise EngineError(
            f"{engine_dir} has no {MANIFEST_FILE}, so it is not a whole engine: build it again"
        ) from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from error


def write_manifest(
    engine_dir: Path, threads: int, progress: Callable[[int], None] | None = None
) -> None:
    """Digest every file below `engine_dir` and write its manifest.

    `progress` is told the bytes digested, file by file.
    """
    paths = sorted(path for path in engine_dir.rglob("*") if path.is_file())
    with ThreadPoolExecutor(threads) as pool:
        files = []
        for path in paths:
            size = path.stat().st_size
            chunks = tuple(pool.map(lambda at, p=path: _digest(p, at), range(0, size, CHUNK_BYTES)))
            files.append(FileDigest(path.relative_to(engine_dir).as_posix(), size, chunks))
            if progress:
                progress(size)
    (engine_dir / MANIFEST_FILE).write_bytes(Manifest(tuple(files)).to_bytes())


def check_files(
    engine_dir: Path,
    manifest: Manifest,
    ranks: Iterable[int],
    threads: int,
    progress: Callable[[int], None] | None = None,
    maps: Mapping[str, mmap.mmap] | None = None,
) -> None:
    """Check presence, size and digests of what these ranks read, in parallel.

    Raises EngineError naming every file that is missing, truncated, changed, or not listed in a
    folder that is read whole. `progress` is told the bytes checked, chunk by chunk. Files that are
    in `maps` are brought into memory through them, which decides how they lie there.
    """
    ranks = list(ranks)
    listed = {file.path: file for file in manifest.files}
    problems = [f"{path} is not in the manifest" for path in _unlisted(engine_dir, set(listed))]
    needed = [CONFIG_FILE, *(rank_file_name(rank) for rank in ranks)]
    problems += [f"{path} is missing from the manifest" for path in needed if path not in listed]
    work: list[tuple[FileDigest, int]] = []
    for file in manifest.files:
        if is_rank_file(file.path) and file.path not in needed:
            continue
        if problem := _wrong_size(engine_dir, file):
            problems.append(problem)
        else:
            work += [(file, index) for index in range(len(file.chunks))]
    if not problems:
        try:
            problems = _changed(engine_dir, work, threads, progress, maps or {})
        except OSError as error:
            problems = [f"{error.filename or 'a file'} cannot be read ({error.strerror})"]
    if problems:
        raise damaged(engine_dir, problems)


def find_file(engine_dir: Path, manifest: Manifest, name: str) -> FileDigest:
    """What the manifest says of a file whose bytes someone else checks as they pass. EngineError if
    it is missing or has another size."""
    file = next((file for file in manifest.files if file.path == name), None)
    if file is None:
        raise damaged(engine_dir, [f"{name} is missing from the manifest"])
    if problem := _wrong_size(engine_dir, file):
        raise damaged(engine_dir, [problem])
    return file


def damaged(engine_dir: Path, problems: list[str]) -> EngineError:
    """The error that names what is wrong with an engine's files."""
    return EngineError(
        f"{engine_dir} is damaged: {'; '.join(problems)}: copy or build the engine again"
    )


def _wrong_size(engine_dir: Path, file: FileDigest) -> str | None:
    path = engine_dir / file.path
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return f"{file.path} is missing"
    if size != file.size:
        return f"{file.path} has {size:,} bytes instead of {file.size:,}"
    return None


def _changed(
    engine_dir: Path,
    work: list[tuple[FileDigest, int]],
    threads: int,
    progress: Callable[[int], None] | None,
    maps: Mapping[str, mmap.mmap],
) -> list[str]:
    def is_same(item: tuple[FileDigest, int]) -> bool:
        file, index = item
        if file.path in maps:
            populate(maps[file.path], index * CHUNK_BYTES, CHUNK_BYTES)
        return _digest(engine_dir / file.path, index * CHUNK_BYTES) == file.chunks[index]

    changed: dict[str, None] = {}
    with ThreadPoolExecutor(threads) as pool:
        for (file, index), same in zip(work, pool.map(is_same, work), strict=True):
            if not same:
                changed[file.path] = None
            if progress:
                progress(min(CHUNK_BYTES, file.size - index * CHUNK_BYTES))
    return [f"{path} was changed" for path in changed]


def _digest(path: Path, offset: int) -> str:
    hasher, stop = hashlib.sha256(), offset + CHUNK_BYTES
    with path.open("rb") as file:
        # Read in place of mapping: a file truncated meanwhile must not kill the process.
        while data := os.pread(file.fileno(), min(READ_BYTES, stop - offset), offset):
            hasher.update(data)
            offset += len(data)
    return hasher.hexdigest()


def _is_plausible(file: FileDigest) -> bool:
    """Whether the path stays inside the engine and there is a digest for every chunk."""
    path = PurePosixPath(file.path)
    is_inside = not path.is_absolute() and ".." not in path.parts
    return is_inside and len(file.chunks) == -(-file.size // CHUNK_BYTES)


def is_rank_file(path: str) -> bool:
    """Whether this is the name of some rank's file."""
    return path.startswith("rank") and path.endswith(".safetensors")


def _unlisted(engine_dir: Path, listed: set[str]) -> list[str]:
    """Files that a reader might pick up although the manifest does not know them."""
    candidates = list(engine_dir.glob("rank*.safetensors"))
    for folder in (TOKENIZER_DIR, KERNELS_DIR):
        candidates += (engine_dir / folder).rglob("*")
    names = (path.relative_to(engine_dir).as_posix() for path in candidates if path.is_file())
    return sorted(name for name in names if name not in listed)
