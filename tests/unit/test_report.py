"""The report file: appended to, never lost, and honest about engines that were replaced."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from puna.errors import EngineError
from puna.report import Record, append_record, new_record, read_records, report_path


def record(kind: str = "latency", digest: str = "d1") -> Record:
    return new_record(kind, "puna bench", digest, {"tok_s": 1.5})


def append_some(engine: Path, worker: int) -> None:
    for i in range(8):
        append_record(engine, record(f"{worker}-{i}"))


@pytest.mark.parametrize("form", ["{}", "{}/", "{}//", "{}/../X", "{}/."])
def test_name(form: str, tmp_path: Path) -> None:
    assert report_path(form.format(tmp_path / "X")) == tmp_path / "X.report.json"


def test_name_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "X").mkdir()
    monkeypatch.chdir(tmp_path / "X")
    assert report_path(".") == tmp_path / "X.report.json"


def test_appended_in_order(tmp_path: Path) -> None:
    engine = tmp_path / "X"
    assert read_records(engine) == ()
    first, second = record("latency"), record("summarize", "d2")
    assert append_record(engine, first) == tmp_path / "X.report.json"
    append_record(f"{engine}/", second)
    assert read_records(engine) == (first, second)
    assert os.listdir(tmp_path) == ["X.report.json"]
    assert first.time.endswith("+00:00") and "CPUs" in first.machine and first.puna_version


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"records": []}',
        '{"format_version": 2, "records": []}',
        '{"format_version": 1, "records": 3}',
        '{"format_version": 1, "records": [{"kind": "latency"}]}',
        json.dumps(
            {
                "format_version": 1,
                "records": [
                    {name: "x" for name in Record.__dataclass_fields__ if name != "figures"}
                    | {"figures": [1]}
                ],
            }
        ),
        "[" * 100_000,
    ],
    ids=range(10),
)
def test_damaged_file_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "X.report.json"
    path.write_text(text)
    for use in (read_records, lambda engine: append_record(engine, record())):
        with pytest.raises(EngineError, match="move it away"):
            use(tmp_path / "X")
    assert path.read_text() == text and os.listdir(tmp_path) == [path.name]


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be written"):
        append_record(tmp_path / "nowhere" / "X", record())


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(tmp_path / "X", record("first"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        append_record(tmp_path / "X", record("second"))
    assert [r.kind for r in read_records(tmp_path / "X")] == ["first"]
    assert os.listdir(tmp_path) == ["X.report.json"]


def test_several_writers_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_some, args=(tmp_path / "X", n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    kinds = [r.kind for r in read_records(tmp_path / "X")]
    assert sorted(kinds) == sorted(f"{n}-{i}" for n in range(3) for i in range(8))
