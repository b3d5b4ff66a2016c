"""GGUF checkpoints of architecture `llama`: names, spec and RoPE from the metadata.

Decides what llama.cpp's keys mean for puna. The container is read in `gguf_file`, tensors in
`gguf_tensor`; tokenizers are rebuilt in `puna.tokenizer.gguf`.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from puna.checkpoint.fields import Fields, brief
from puna.checkpoint.gguf_file import GgufFile, check_spans, read_gguf
from puna.checkpoint.gguf_tensor import BlockTensor, num_bytes, stored_tensor
from puna.checkpoint.names import NameMap
from puna.checkpoint.stored import DenseTensor, FileCheckpoint, StoredTensor, require_readable
from puna.errors import CheckpointError
from puna.quant import Array
from puna.spec import GenerationDefaults, ModelSpec, RopeSpec

NAMES = NameMap(
    MappingProxyType(
        {
            "token_embd.weight": "embed.weight",
            "output_norm.weight": "norm.weight",
            "output.weight": "head.weight",
        }
    ),
    "blk",
    MappingProxyType(
        {
            "attn_norm": "attn_norm",
            "ffn_norm": "mlp_norm",
            "attn_q": "attn.q",
            "attn_k": "attn.k",
            "attn_v": "attn.v",
            "attn_output": "attn.o",
            "ffn_gate": "mlp.gate",
            "ffn_up": "mlp.up",
            "ffn_down": "mlp.down",
        }
    ),
)
_ROPE_FREQS = "rope_freqs.weight"
_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0  # of all Llama 3.1, 3.2 and 3.3 models


def open_gguf(path: Path, source: str) -> FileCheckpoint:
    """Open one file; `source` is what the user called it. Raises CheckpointError."""
    gguf = read_gguf(path)
    meta = Fields(gguf.metadata, str(path))
    _refuse_other_models(path, meta)
    check_spans(gguf, {name: num_bytes(path, t) for name, t in gguf.tensors.items()})
    spec = read_spec(gguf, meta)
    tensors: dict[str, StoredTensor] = {}
    canonical, dequantised = [], set()
    for file_name, described in gguf.tensors.items():
        if file_name == _ROPE_FREQS:
            continue  # read with the spec
        name = NAMES.canonical(file_name)
        is_rotary = bool(name) and name.rpartition(".")[0].endswith((".attn.q", ".attn.k"))
        if is_rotary and described.shape[0] % spec.head_dim:
            raise CheckpointError(
                f"{path}: {brief(file_name)} has {described.shape[0]} rows; needed a multiple "
                f"of the head size {spec.head_dim}"
            )
        if (name or file_name) in tensors:
            raise gguf.file.damaged(f"{brief(file_name)} occurs twice")
        tensor = stored_tensor(gguf, described, spec.head_dim if is_rotary else 0)
        tensors[name or file_name] = tensor
        if name:
            canonical.append(name)
        if isinstance(tensor, BlockTensor) and tensor.kind is None:
            dequantised.add(tensor.name)
    require_readable(tensors, source, sorted(canonical))
    notes = []
    if dequantised:
        types = ", ".join(sorted(dequantised))
        notes.append(f"{types} blocks have no exact form in puna: dequantised to float32")
    return FileCheckpoint(
        kind="gguf",
        source=source,
        spec=spec,
        generation=_generation(meta),
        tensors=tensors,
        read_tokenizer=lambda: _tokenizer(gguf.metadata),
        weight_files=(path,),
        remarks=tuple(notes),
    )


def _refuse_other_models(path: Path, meta: Fields) -> None:
    architecture = meta.text("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path} holds {brief(architecture)}; puna reads GGUF files of llama only"
        )
    if (num_files := meta.whole("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path} is one of {num_files} parts; merge them first: `llama-gguf-split --merge "
            "FIRST_PART OUT.gguf`"
        )
    if meta.whole("llama.expert_count", 0) > 0:
        raise CheckpointError(f"{path} is a mixture of experts; puna reads dense models only")


def read_spec(gguf: GgufFile, meta: Fields) -> ModelSpec:
    """The spec from the `llama.*` keys."""
    hidden_size = meta.whole("llama.embedding_length", smallest=1)
    num_heads = _one_for_all_layers(meta, "llama.attention.head_count", None)
    num_kv_heads = _one_for_all_layers(meta, "llama.attention.head_count_kv", num_heads)
    head_dim = meta.whole("llama.attention.key_length", hidden_size // num_heads, smallest=1)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (found := meta.whole(key, head_dim)) != head_dim:
            raise CheckpointError(
                f"{meta.where}: {key} is {found} and the head size {head_dim}; puna needs them "
                "equal"
            )
    max_position_embeddings = meta.whole("llama.context_length", smallest=1)
    vocab_size = meta.whole("llama.vocab_size", None, smallest=1)
    if vocab_size is None:
        tokens = meta.data.get("tokenizer.ggml.tokens")
        embed = gguf.tensors.get("token_embd.weight")
        if not isinstance(tokens, list) and embed is None:
            raise CheckpointError(f"{meta.where}: llama.vocab_size is missing")
        vocab_size = len(tokens) if isinstance(tokens, list) else embed.shape[0]  # type: ignore
    try:
        return ModelSpec(
            hidden_size=hidden_size,
            intermediate_size=_one_for_all_layers(meta, "llama.feed_forward_length", None),
            num_layers=meta.whole("llama.block_count", smallest=1),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=meta.number("llama.attention.layer_norm_rms_epsilon"),
            rope=_rope(gguf, meta, head_dim, max_position_embeddings),
            tie_word_embeddings="output.weight" not in gguf.tensors,
            attention_bias="blk.0.attn_q.bias" in gguf.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in gguf.tensors,
        )
    except CheckpointError as error:
        where = "" if str(error).startswith(meta.where) else f"{meta.where}: "
        raise CheckpointError(f"{where}{error}") from None


def _one_for_all_layers(meta: Fields, key: str, default: int | None) -> int:
    """A number that newer files may give layer by layer."""
    value = meta.data.get(key)
    if isinstance(value, np.ndarray) and value.size:
        if len(set(value.tolist())) > 1:
            raise CheckpointError(
                f"{meta.where}: {key} differs from layer to layer; puna needs it equal"
            )
        return Fields({key: value[0].item()}, meta.where).whole(key, smallest=1)
    return meta.whole(key, *(() if default is None else (default,)), smallest=1)


def _rope(gguf: GgufFile, meta: Fields, head_dim: int, max_positions: int) -> RopeSpec:
    theta = meta.number("llama.rope.freq_base", 10000.0)
    prefix = "llama.rope.scaling."
    factor = meta.number(prefix + "factor", meta.number("llama.rope.scale_linear", 1.0))
    # Files from before `type` existed have a bare factor, which is linear.
    kind = meta.text(prefix + "type", "none" if factor in (0.0, 1.0) else "linear")
    if _ROPE_FREQS in gguf.tensors:
        if kind not in ("none", "linear") or factor not in (0.0, 1.0):
            raise CheckpointError(
                f"{meta.where} has both {_ROPE_FREQS} and RoPE scaling {brief(kind)}"
            )
        return _llama3(gguf, theta, head_dim)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, type="linear", factor=factor)
    if kind != "yarn":
        raise CheckpointError(
            f"{meta.where}: RoPE scaling {brief(kind)} is not supported in a GGUF file"
        )
    known = ("type", "factor", "original_context_length", "finetuned", "attn_factor")
    known += ("yarn_beta_fast", "yarn_beta_slow")
    if other := sorted(
        k for k in meta.data if k.startswith(prefix) and k[len(prefix) :] not in known
    ):
        raise CheckpointError(f"{meta.where}: {other[0]} is not supported")
    # llama.cpp multiplies attn_factor into the usual 1 + 0.1 ln(factor); puna's replaces it.
    attention = meta.number(prefix + "attn_factor", 1.0)
    usual = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
    return RopeSpec(
        theta=theta,
        type="yarn",
        factor=factor,
        original_max_position_embeddings=meta.whole(
            prefix + "original_context_length", max_positions, smallest=1
        ),
        beta_fast=meta.number(prefix + "yarn_beta_fast", 32.0),
        beta_slow=meta.number(prefix + "yarn_beta_slow", 1.0),
        attention_factor=None if attention == 1.0 else attention * usual,
    )


def _llama3(gguf: GgufFile, theta: float, head_dim: int) -> RopeSpec:
    """Llama 3.1's scaling, which llama.cpp's converter stores as a divisor for each frequency.

    Its other parameters are the same in all models, and the factor is the largest divisor; the
    divisors that follow must be those in the file.
    """
    stored = stored_tensor(gguf, gguf.tensors[_ROPE_FREQS], 0)
    refused = CheckpointError(
        f"{gguf.file.path}: {_ROPE_FREQS} is not Llama 3's RoPE scaling (low 1, high 4, original "
        f"length {_LLAMA3_LENGTH}); use the Hugging Face form of the model"
    )
    if not isinstance(stored, DenseTensor) or stored.shape != (head_dim // 2,):
        raise refused
    found = stored.load(slice(None), slice(None)).astype(np.float64)
    if not np.isfinite(found).all():
        raise refused
    if (found == 1).all():
        return RopeSpec(theta=theta)
    rope = RopeSpec(theta, "llama3", float(found.max()), _LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH)
    if not np.allclose(found, _llama3_divisors(rope, head_dim), rtol=1e-4, atol=0):
        raise refused
    return rope


def _llama3_divisors(rope: RopeSpec, head_dim: int) -> Array:
    """What the llama3 scaling divides each frequency by: float64 [head_dim / 2]."""
    frequency = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    # Clipped to 0 (slow frequencies: the full factor) and 1 (fast ones: none).
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / rope.factor + smooth)


def _generation(meta: Fields) -> GenerationDefaults:
    ends = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    found = [i for key in ends for i in meta.token_ids(key)]
    bos = meta.token_ids("tokenizer.ggml.bos_token_id")
    return GenerationDefaults(tuple(dict.fromkeys(found)), bos[0] if bos else None)


def _tokenizer(metadata: dict[str, Any]) -> dict[str, bytes]:
    if "tokenizer.ggml.model" not in metadata:
        return {}
    from puna.tokenizer.gguf import tokenizer_files_from_gguf

    return tokenizer_files_from_gguf(metadata)
