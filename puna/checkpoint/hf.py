"""Hugging Face checkpoints: config.json beside safetensors or PyTorch files, local or from the hub.

Decides which files hold the weights and what their tensors are called. The facts of the model are
read in `hf_config`, quantised layers in `hf_quant`, the containers in `safetensors_file` and
`pickle_reader`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from puna.checkpoint.fields import brief, read_bytes, read_json
from puna.checkpoint.hf_config import read_generation, read_spec
from puna.checkpoint.hf_quant import (
    guess_quantisation,
    inexact_notes,
    quantised_linear,
    take_layers,
)
from puna.checkpoint.hf_quant_config import Quantisation, find_quantisation
from puna.checkpoint.names import NameMap
from puna.checkpoint.packed_linear import PackedLinear
from puna.checkpoint.pickle_reader import read_torch_zip
from puna.checkpoint.safetensors_file import read_safetensors
from puna.checkpoint.stored import DenseTensor, FileCheckpoint, StoredTensor, require_readable
from puna.errors import CheckpointError
from puna.spec import ModelSpec
from puna.tokenizer import TOKENIZER_FILES
from puna.weights import checkpoint_weights

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
    return _open(directory, directory, source)


def open_quantised(weights: Path, model_dir: Path, source: str) -> FileCheckpoint:
    """Open `weights` with its quantised layers; what it lacks comes from `model_dir`.

    `weights` is a file (safetensors or PyTorch), or a directory of them, that a GPTQ or AWQ tool
    wrote for a model. How its layers are quantised is said by a config beside them or in
    `model_dir`, else by the tensors. `model_dir` has config.json, and may have the tokenizer and
    the weights that `weights` is without. `source` is what the user called it. Raises
    CheckpointError.
    """
    if not weights.exists():
        raise CheckpointError(f"{weights} does not exist; needed a file or directory of weights")
    found = _open(weights, model_dir, source)
    if not any(isinstance(tensor, PackedLinear) for tensor in found.tensors.values()):
        raise CheckpointError(
            f"{source} has no quantised layers; needed tensors named qweight (GPTQ, AWQ) or "
            "weight_packed (compressed-tensors): name the file that has them"
        )
    missing = {weight.name for weight in checkpoint_weights(found.spec)} - found.names()
    others = _find_weights(model_dir, False) if missing else []
    if not others:
        return found
    dense, _ = _canonical_tensors(others, found.spec, None, str(model_dir))
    filled = {name: dense[name] for name in sorted(missing & dense.keys())}
    files = dict.fromkeys((*found.weight_files, *others))
    return replace(found, tensors={**found.tensors, **filled}, weight_files=tuple(files))


def _open(weights: Path, model_dir: Path, source: str) -> FileCheckpoint:
    config = read_json(model_dir / "config.json")
    spec, notes = read_spec(config)
    beside = weights if weights.is_dir() else weights.parent
    quantisation, said_in = find_quantisation((beside, model_dir))
    files = [weights]
    if weights.is_dir() and not (files := _find_weights(weights, quantisation is not None)):
        raise CheckpointError(
            f"{weights} has a config.json and no weights; needed one of "
            f"{', '.join(name for pair in _WEIGHTS for name in pair)}"
        )
    tensors, more = _canonical_tensors(files, spec, quantisation, source)
    configs = [config_file for config_file in (model_dir / "config.json", said_in) if config_file]
    return FileCheckpoint(
        kind="hf",
        source=source,
        spec=spec,
        generation=read_generation(model_dir, config),
        tensors=tensors,
        read_tokenizer=lambda: read_tokenizer_files(model_dir, TOKENIZER_FILES),
        weight_files=tuple(dict.fromkeys((*configs, *files))),
        remarks=(*notes, *more),
    )


def _canonical_tensors(
    files: list[Path], spec: ModelSpec, quantisation: Quantisation | None, source: str
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors by canonical name (their own where they have none), and notes on them."""
    named = _read(files)
    layers = take_layers(named)
    notes = []
    if layers and quantisation is None:
        quantisation = guess_quantisation(layers)
        notes.append(
            f"no config says how {source} was quantised: {quantisation.method}, by its tensors"
        )
    linears: dict[str, PackedLinear] = {}
    for layer, parts in layers.items():
        if f"{layer}.weight" in named:
            raise CheckpointError(f"{source}: {layer} is there both quantised and not")
        assert quantisation is not None
        linears[f"{layer}.weight"] = quantised_linear(f"{source}: {layer}", parts, quantisation)
    tensors: dict[str, StoredTensor] = {}
    known = []
    expected = {weight.name for weight in checkpoint_weights(spec)}
    for file_name, tensor in (named | linears).items():
        name = NAMES.canonical(file_name)
        if file_name.endswith(".rotary_emb.inv_freq"):
            continue  # follows from rope_theta
        if name == "head.weight" and spec.tie_word_embeddings:
            continue  # a copy of the embedding
        layer, _, kind = file_name.rpartition(".")
        if kind == "bias" and f"{layer}.weight" in linears and name not in expected:
            assert isinstance(tensor, DenseTensor)
            if not any(part.any() for part in tensor.parts):
                continue  # AutoGPTQ gives every layer a bias, of zeros where the model has none
        if name:
            known.append(name)
        tensors[name or file_name] = tensor
    require_readable(tensors, source, sorted(known))
    return tensors, notes + inexact_notes(linears.values())


def _read(files: list[Path]) -> dict[str, DenseTensor]:
    """The tensors of all files by their own names."""
    named: dict[str, DenseTensor] = {}
    for path in files:
        read = read_safetensors if path.suffix == ".safetensors" else read_torch_zip
        for name, tensor in read(path).items():
            if name in named:
                raise CheckpointError(f"{path.parent}: {brief(name)} is in more than one file")
            named[name] = tensor
    return named


def read_tokenizer_files(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Those of `names` that lie in `directory`, by name."""
    paths = [directory / name for name in names]
    return {path.name: read_bytes(path, _LARGEST_TOKENIZER) for path in paths if path.is_file()}


def _find_weights(directory: Path, is_quantised: bool) -> list[Path]:
    """The files that hold a directory's weights; none if there are none."""
    for single, index in _WEIGHTS:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _indexed_files(directory / index)
    # Quantising tools had names of their own, such as gptq_model-4bit-128g.safetensors.
    alone = list(directory.glob("*.safetensors")) if is_quantised else []
    return alone if len(alone) == 1 else []


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
