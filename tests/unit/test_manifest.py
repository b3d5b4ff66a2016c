"""manifest.json has one spelling, and names every difference between it and the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import puna.manifest
from puna.errors import EngineError
from puna.manifest import Manifest, check_files, read_manifest, write_manifest
from puna.strict_json import canonical_json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for an engine's files, of one to four chunks of 100 bytes."""
    monkeypatch.setattr(puna.manifest, "CHUNK_BYTES", 100)
    monkeypatch.setattr(puna.manifest, "READ_BYTES", 30)
    (tmp_path / "tokenizer").mkdir()
    for name, size in (
        ("config.json", 10),
        ("rank0.safetensors", 350),
        ("rank1.safetensors", 300),
        ("tokenizer/tokenizer.model", 0),
    ):
        (tmp_path / name).write_bytes(bytes(i % 251 for i in range(size)))
    write_manifest(tmp_path, 2)
    return tmp_path


def problems(folder: Path, ranks: tuple[int, ...] = (0, 1)) -> str:
    with pytest.raises(EngineError, match=r"is damaged: .*: copy or build") as info:
        check_files(folder, read_manifest(folder), ranks, threads=2)
    return str(info.value)


def test_sizes_and_chunks(folder: Path) -> None:
    found = {file.path: (file.size, len(file.chunks)) for file in read_manifest(folder).files}
    assert found == {
        "config.json": (10, 1),
        "rank0.safetensors": (350, 4),
        "rank1.safetensors": (300, 3),
        "tokenizer/tokenizer.model": (0, 0),
    }


def test_chunks_are_sha256_of_the_bytes(folder: Path) -> None:
    import hashlib

    data = (folder / "rank0.safetensors").read_bytes()
    chunks = tuple(hashlib.sha256(data[at : at + 100]).hexdigest() for at in range(0, 350, 100))
    assert read_manifest(folder).files[1].chunks == chunks


def test_whole_files_pass_and_progress_adds_up(folder: Path) -> None:
    told: list[int] = []
    check_files(folder, read_manifest(folder), (0, 1), 2, told.append)
    assert sum(told) == 10 + 350 + 300


@pytest.mark.parametrize("at", [0, 29, 30, 99, 100, 299, 300, 349])
def test_changed_byte_in_any_chunk(folder: Path, at: int) -> None:
    data = bytearray((folder / "rank0.safetensors").read_bytes())
    data[at] ^= 128
    (folder / "rank0.safetensors").write_bytes(data)
    assert "rank0.safetensors was changed" in problems(folder)
    check_files(folder, read_manifest(folder), (1,), 2)  # the other rank does not read it


def test_every_problem_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "rank0.safetensors").write_bytes(b"x")
    (folder / "rank7.safetensors").touch()
    (folder / "tokenizer" / "added_tokens.json").touch()
    found = problems(folder, (0, 1, 2))
    for part in (
        "config.json is missing",
        "rank0.safetensors has 1 bytes instead of 350",
        "rank7.safetensors is not in the manifest",
        "tokenizer/added_tokens.json is not in the manifest",
        "rank2.safetensors is missing from the manifest",
    ):
        assert part in found


def test_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "config.json is missing" in problems(folder)


def test_every_change_of_its_own_bytes(folder: Path) -> None:
    path = folder / "manifest.json"
    data = path.read_bytes()
    assert Manifest.from_bytes(data, path).to_bytes() == data
    for at in range(len(data)):
        for changed in (data[:at] + data[at + 1 :], data[:at] + b" " + data[at:]):
            with pytest.raises(EngineError, match=r"manifest\.json is damaged"):
                Manifest.from_bytes(changed, path)
        flipped = bytearray(data)
        flipped[at] ^= 1
        with pytest.raises(EngineError, match=r"manifest\.json is damaged"):
            Manifest.from_bytes(bytes(flipped), path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../config.json", "tokenizer/../../x"])
def test_paths_that_leave_the_engine(path: str, folder: Path) -> None:
    file = {"path": path, "size": 1, "chunks": ["0"]}
    digest = puna.manifest.hashlib.sha256(canonical_json([file])).hexdigest()
    data = canonical_json({"files": [file], "digest": digest})
    with pytest.raises(EngineError, match="is damaged"):
        Manifest.from_bytes(data, folder / "manifest.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"files": [3]}'])
def test_no_manifest_at_all(data: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(EngineError, match="is damaged"):
        read_manifest(folder)


def test_it_does_not_list_itself(folder: Path) -> None:
    assert "manifest.json" not in json.dumps(read_manifest(folder).to_bytes().decode())
