"""Checkpoint: published weights, in any format, seen as canonical tensors.

`open_checkpoint` looks at a path and picks the reader. Each reader adapts its format to puna's
names (`puna.weights`), puna's half-split RoPE, and `ModelSpec`; nothing above this package knows
which format the weights came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping as MappingABC
from pathlib import Path
from typing import Protocol

from puna.errors import CheckpointError
from puna.quant import Array, Format, QuantTensor
from puna.spec import GenerationDefaults, ModelSpec

FULL = slice(None)


class Checkpoint(Protocol):
    """Weights that can be read by canonical name, a slice at a time.

    Tensors are [N, K] matrices (output rows first) or [N] vectors. A reader opens lazily: opening
    reads headers only, and `load` reads (from a memory map where it can) only the rows asked for.
    """

    @property
    def kind(self) -> str:
        """ "hf", "meta", "gguf" or "dummy"."""
        ...

    @property
    def source(self) -> str:
        """What the user named: a path or a hub id."""
        ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def generation(self) -> GenerationDefaults: ...

    def names(self) -> frozenset[str]:
        """Canonical names of all tensors held, buffers that follow from the config left out."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers."""
        ...

    def format(self, name: str) -> Format:
        """The dense dtype, or the format that holds the checkpoint's quantised blocks exactly.

        What no puna format holds exactly is given as dense: float32, or what its scales have.
        """
        ...

    def load(self, name: str, rows: slice = FULL, cols: slice = FULL) -> Array:
        """Floats of a slice: the stored dtype, or float32 where blocks were dequantised."""
        ...

    def load_quantized(self, name: str, rows: slice = FULL, cols: slice = FULL) -> QuantTensor:
        """The blocks of a slice, not requantised. `cols` must begin and end at group boundaries."""
        ...

    def notes(self) -> tuple[str, ...]:
        """One line each on what the reader decided (shown by `puna plan`, kept in the engine)."""
        ...

    def files(self) -> tuple[Path, ...]:
        """Files whose digests identify the weights (empty for dummy weights)."""
        ...

    def tokenizer_files(self) -> MappingABC[str, bytes]:
        """What belongs in the engine's tokenizer/ directory, by file name; empty without one."""
        ...

    def close(self) -> None: ...


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Open a directory, a GGUF file, or a hub id such as `TinyLlama/TinyLlama-1.1B-Chat-v1.0`.

    A directory that holds both forms is read as Hugging Face's. Reads headers only. Raises
    CheckpointError: nothing there, a kind puna does not read, damage.
    """
    # Each reader is imported when it is needed: together they take longer than reading a header.
    source = str(path_or_id)
    path = Path(os.path.expanduser(source))
    try:
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {source!r}: {error}") from None
    if is_dir:
        return _open_directory(path, source)
    if exists:
        return _open_file(path, source)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source):
        from puna.checkpoint.hf import download

        return _open_directory(download(source), source)
    raise CheckpointError(
        f"{source} does not exist; needed a checkpoint directory, a .gguf file, or a hub id "
        "(org/name)"
    )


def _open_directory(path: Path, source: str) -> Checkpoint:
    has_config, has_params = (path / "config.json").is_file(), (path / "params.json").is_file()
    ggufs = sorted(path.glob("*.gguf"))
    if has_params and not (has_config and _has_hf_weights(path)):
        from puna.checkpoint.meta import open_meta

        return open_meta(path, source)
    if len(ggufs) == 1 and not (has_config and _has_hf_weights(path)):
        from puna.checkpoint.gguf import open_gguf

        return open_gguf(ggufs[0], source)
    if has_config:
        from puna.checkpoint.hf import open_hf

        return open_hf(path, source)
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{source} holds {len(ggufs)} GGUF files ({names}); name one of them")
    raise CheckpointError(
        f"{source} holds no checkpoint; needed config.json (Hugging Face), params.json (Meta) or "
        "one .gguf file"
    )


def _has_hf_weights(path: Path) -> bool:
    return any(any(path.glob(f"{stem}*")) for stem in ("model.safetensors", "pytorch_model.bin"))


def _open_file(path: Path, source: str) -> Checkpoint:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror or error}") from None
    if magic == b"GGUF" or path.suffix == ".gguf":
        from puna.checkpoint.gguf import open_gguf

        return open_gguf(path, source)
    raise CheckpointError(
        f"{source} is a file and no GGUF; for the Hugging Face and Meta forms name their directory "
        f"({path.parent})"
    )
