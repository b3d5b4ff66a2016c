"""Hugging Face checkpoints: config.json beside safetensors or PyTorch files, local or from the hub.

Decides which files hold the weights and what their tensors are called. The facts of the model are
read in `hf_config`, the containers in `safetensors_file` and `pickle_reader`.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

from puna.checkpoint.fields import brief, read_bytes, read_json
from puna.checkpoint.hf_config import read_generation, read_spec
from puna.checkpoint.names import NameMap
from puna.checkpoint.pickle_reader import read_torch_zip
from puna.checkpoint.safetensors_file import read_safetensors
from puna.checkpoint.stored import DenseTensor, FileCheckpoint, require_readable
from puna.errors import CheckpointError
from puna.tokenizer import TOKENIZER_FILES

NAMES = NameMap(
    MappingProxyType(
        {
            "model.embed_tokens.weight": "embed.weight",
            "model.norm.weight": "norm.weight",
            "lm_head.weight": "head.weight",
        }
    ),
    "model.layers",
    MappingProxyType(
        {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "mlp_norm",
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.o_proj": "attn.o",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
        }
    ),
)
_WEIGHTS = (  # in order of preference: the single file, and the index of several
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_HUB_FILES = ("*.json", "*.model", "*.jinja", "*.safetensors")
_LARGEST_TOKENIZER = 256 << 20


def open_hf(directory: Path, source: str) -> FileCheckpoint:
    """Open a local directory; `source` is what the user called it. Raises CheckpointError."""
    config = read_json(directory / "config.json")
    spec, notes = read_spec(config)
    files = _weight_files(directory)
    tensors: dict[str, DenseTensor] = {}
    unknown = []
    for path in files:
        read = read_safetensors if path.suffix == ".safetensors" else read_torch_zip
        for file_name, tensor in read(path).items():
            name = NAMES.canonical(file_name)
            if file_name.endswith(".rotary_emb.inv_freq"):
                continue  # follows from rope_theta
            if name == "head.weight" and spec.tie_word_embeddings:
                continue  # a copy of the embedding
            if name is None:
                unknown.append(file_name)
            if (name or file_name) in tensors:
                raise CheckpointError(f"{directory}: {brief(file_name)} is in more than one file")
            tensors[name or file_name] = tensor
    require_readable(tensors, source, sorted(tensors.keys() - set(unknown)))
    return FileCheckpoint(
        kind="hf",
        source=source,
        spec=spec,
        generation=read_generation(directory, config),
        tensors=tensors,
        read_tokenizer=lambda: read_tokenizer_files(directory, TOKENIZER_FILES),
        weight_files=(directory / "config.json", *files),
        remarks=tuple(notes),
    )


def read_tokenizer_files(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Those of `names` that lie in `directory`, by name."""
    paths = [directory / name for name in names]
    return {path.name: read_bytes(path, _LARGEST_TOKENIZER) for path in paths if path.is_file()}


def _weight_files(directory: Path) -> list[Path]:
    for single, index in _WEIGHTS:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed_files(directory / index)
    raise CheckpointError(
        f"{directory} has a config.json and no weights; needed one of "
        f"{', '.join(name for pair in _WEIGHTS for name in pair)}"
    )


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).object("weight_map").data
    names = {str(name) for name in weight_map.values()}
    if not names:
        raise CheckpointError(f"{index}: weight_map is empty; download it again")
    # A name with a folder in it could point anywhere on the machine.
    if strange := sorted(n for n in names if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", n)):
        raise CheckpointError(f"{index} names {brief(strange[0])}; needed a file beside it")
    paths = [index.parent / name for name in sorted(names)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(paths)} weight files "
            f"({', '.join(missing)}); download them"
        )
    return paths


def download(hub_id: str) -> Path:
    """The local snapshot of a hub repository, downloaded if need be. Raises CheckpointError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{hub_id} is no local path, and huggingface_hub is not installed; pip install "
            "huggingface_hub, or pass a directory"
        ) from None
    try:
        path = Path(
            snapshot_download(hub_id, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"])
        )
        if not any(path.glob("*.safetensors")):
            patterns = [*_HUB_FILES, "*.bin"]
            path = Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # its HTTP stack has no common base class
        raise CheckpointError(_why_not(hub_id, error)) from None
    return path


def _why_not(hub_id: str, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    found = f"{hub_id} is no local path, and the hub"
    if "GatedRepoError" in kinds:
        return (
            f"{found} asks for a login: accept its licence on its page there, then `hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds:
        return f"{found} has no such repository (or it is private: `hf auth login`)"
    return (
        f"{found} could not be read ({type(error).__name__}); on a machine with access run "
        f"`hf download {hub_id} --local-dir DIR`, and pass DIR"
    )
