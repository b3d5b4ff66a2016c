"""The test split of CNN/DailyMail 3.0.0: where it is found, and its articles with their highlights.

Decides what a path may be (JSON lines, or what the `datasets` package writes) and what is tried
without one. Knows nothing of prompts or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from puna.errors import ConfigError

HUB_NAME, CONFIG_NAME, SPLIT = "abisee/cnn_dailymail", "3.0.0", "test"
LOCAL_FOLDER = "cnn_dailymail"
PASS_A_FILE = "pass --dataset-path FILE.jsonl, a line a sample with article and highlights"


@dataclass(frozen=True)
class Sample:
    """An article and what its editors made of it: highlights, one sentence a line."""

    article: str
    highlights: str


@dataclass(frozen=True)
class Dataset:
    """The samples that are used, in the split's order, and where they are from."""

    samples: tuple[Sample, ...]
    source: str
    note: str | None = None  # where the source was not asked for


def load_samples(
    dataset_path: str | Path | None, max_samples: int, working_dir: str | Path = "."
) -> Dataset:
    """Return the first `max_samples` samples, fewer if there are no more.

    From `dataset_path`: a JSONL file, a directory with such files (those with "test" in their name,
    if any), what `datasets` saved with save_to_disk, or a cache directory of `datasets`. Without
    it: from cnn_dailymail/ in `working_dir`, else downloaded. ConfigError says what was found.
    """
    if max_samples < 1:
        raise ConfigError(f"max_samples is {max_samples}; it must be at least 1: raise it")
    local, note = Path(working_dir) / LOCAL_FOLDER, None
    if dataset_path is None and local.is_dir():
        dataset_path, note = local, f"samples are from ./{LOCAL_FOLDER}/ (--dataset-path: others)"
    if dataset_path is None:
        rows, source = _downloaded(), f"{HUB_NAME} {CONFIG_NAME}"
    else:
        rows, source = _rows(Path(dataset_path)), str(dataset_path)
    samples = tuple(_sample(row, source) for row in islice(rows, max_samples))
    if not samples:
        raise ConfigError(f"{source} has no samples: {PASS_A_FILE}")
    return Dataset(samples, source, note)


def _rows(path: Path) -> Iterable[Any]:
    if path.is_file():
        return _json_lines([path])
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist: {PASS_A_FILE}")
    if files := sorted(path.glob("*.jsonl")):
        return _json_lines([file for file in files if SPLIT in file.name] or files)
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(path)
    # A cache has a folder for each dataset, configuration and version of its preparation.
    if files := sorted(path.rglob(f"{CONFIG_NAME}/**/cnn_dailymail-{SPLIT}*.arrow")):
        # Versions lie side by side; one is enough, and its parts are in one folder.
        return _arrow([file for file in files if file.parent == files[-1].parent])
    raise ConfigError(
        f"{path} has neither *.jsonl files nor a dataset of the datasets package: {PASS_A_FILE}"
    )


def _json_lines(files: list[Path]) -> Iterator[Any]:
    for file in files:
        num_read = 0
        try:
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    num_read += 1
                    if line.strip():
                        yield json.loads(line)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {num_read}: {error}: {PASS_A_FILE}") from error


def _saved(path: Path) -> Iterable[Any]:
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the package raises for damaged files
        raise ConfigError(f"{path} cannot be read ({error}): {PASS_A_FILE}") from error
    if not isinstance(found, dict):
        return found
    if SPLIT not in found:
        raise ConfigError(f"{path} has no {SPLIT} split but {', '.join(found)}: {PASS_A_FILE}")
    return found[SPLIT]


def _arrow(files: list[Path]) -> Iterable[Any]:
    datasets = _datasets()
    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    except Exception as error:  # the same
        raise ConfigError(f"{files[0]} cannot be read ({error}): {PASS_A_FILE}") from error


def _downloaded() -> Iterable[Any]:
    datasets = _datasets()
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are warnings; what comes of them is said below
    try:
        return datasets.load_dataset(HUB_NAME, CONFIG_NAME, split=SPLIT)
    except Exception as error:  # of three packages and the network, in more classes than are public
        raise ConfigError(
            f"{HUB_NAME} cannot be downloaded ({type(error).__name__}), and there is no "
            f"./{LOCAL_FOLDER}/: {PASS_A_FILE}"
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f'the datasets package is needed ({error}): pip install "puna[eval]", or {PASS_A_FILE}'
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _sample(row: Any, source: str) -> Sample:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{source}: a sample is a {type(row).__name__}: {PASS_A_FILE}")
    article, highlights = row.get("article"), row.get("highlights")
    if not isinstance(article, str) or not isinstance(highlights, str):
        raise ConfigError(
            f"{source}: a sample needs the texts article and highlights, it has "
            f"{', '.join(map(str, row)) or 'nothing'}: {PASS_A_FILE}"
        )
    return Sample(article, highlights)
