"""Writes one tiny model in every published form, for the tests of the readers.

Knows the formats from the writers' side (torch.save, safetensors, gguf.GGUFWriter), never through
puna.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from puna.spec import ModelSpec

SPEC = ModelSpec(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=80,
    max_position_embeddings=4096,
)
Weights = dict[str, np.ndarray[Any, Any]]

_HF = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_META = {
    "embed": "tok_embeddings",
    "norm": "norm",
    "head": "output",
    "attn_norm": "attention_norm",
    "mlp_norm": "ffn_norm",
    "attn.q": "attention.wq",
    "attn.k": "attention.wk",
    "attn.v": "attention.wv",
    "attn.o": "attention.wo",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}
_GGUF = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def tiny_weights(dtype: Any = np.float32, has_bias: bool = False) -> Weights:
    """Random weights of SPEC by canonical name."""
    s, rng = SPEC, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (s.vocab_size, s.hidden_size),
        "norm.weight": (s.hidden_size,),
        "head.weight": (s.vocab_size, s.hidden_size),
    }
    for i in range(s.num_layers):
        at = f"layers.{i}."
        for name, rows, cols in (
            ("attn.q", s.q_size, s.hidden_size),
            ("attn.k", s.kv_size, s.hidden_size),
            ("attn.v", s.kv_size, s.hidden_size),
            ("attn.o", s.hidden_size, s.q_size),
            ("mlp.gate", s.intermediate_size, s.hidden_size),
            ("mlp.up", s.intermediate_size, s.hidden_size),
            ("mlp.down", s.hidden_size, s.intermediate_size),
        ):
            shapes[f"{at}{name}.weight"] = (rows, cols)
            if has_bias:
                shapes[f"{at}{name}.bias"] = (rows,)
        shapes[f"{at}attn_norm.weight"] = shapes[f"{at}mlp_norm.weight"] = (s.hidden_size,)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def renamed(name: str, words: Mapping[str, str], layer: str) -> str:
    """A canonical name in another form's words."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("layers."):
        return f"{words[stem]}.{kind}"
    _, i, rest = stem.split(".", 2)
    return f"{layer}.{i}.{words[rest]}.{kind}"


def hf_name(name: str) -> str:
    return renamed(name, _HF, "model.layers")


def interleaved(w: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """q or k rows as Meta and GGUF store them: halves of a head become pairs."""
    halves = w.reshape(num_heads, 2, w.shape[0] // num_heads // 2, *w.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w.shape)


def rotary_heads(name: str) -> int:
    return {"attn.q": SPEC.num_heads, "attn.k": SPEC.num_kv_heads}.get(
        ".".join(name.split(".")[2:4]), 0
    )


def hf_config(**changes: Any) -> dict[str, Any]:
    """config.json of SPEC; a change to None removes the key."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": SPEC.hidden_size,
        "intermediate_size": SPEC.intermediate_size,
        "num_hidden_layers": SPEC.num_layers,
        "num_attention_heads": SPEC.num_heads,
        "num_key_value_heads": SPEC.num_kv_heads,
        "vocab_size": SPEC.vocab_size,
        "max_position_embeddings": SPEC.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {k: v for k, v in {**config, **changes}.items() if v is not None}


def to_torch(array: np.ndarray[Any, Any]) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def write_hf(
    directory: Path,
    weights: Weights,
    form: str = "safetensors",
    num_files: int = 1,
    extra: Weights | None = None,
    **changes: Any,
) -> Path:
    """`extra` tensors go in under their own names; `changes` go to config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(**changes)))
    stem = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    named = {hf_name(name): array for name, array in weights.items()} | (extra or {})
    names = sorted(named)
    base, suffix = stem.split(".")
    weight_map = {}
    for i in range(num_files):
        mine = names[i::num_files]
        file = stem if num_files == 1 else f"{base}-{i + 1:05}-of-{num_files:05}.{suffix}"
        weight_map |= dict.fromkeys(mine, file)
        _write_tensors(directory / file, form, {name: named[name] for name in mine})
    if num_files > 1:
        (directory / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _write_tensors(path: Path, form: str, tensors: Weights) -> None:
    if form == "safetensors":
        from safetensors.numpy import save_file

        save_file(tensors, path)
    else:
        import torch

        torch.save({name: to_torch(array) for name, array in tensors.items()}, path)


def write_meta(
    directory: Path,
    weights: Weights,
    num_shards: int = 1,
    is_embed_by_rows: bool = False,
    **changes: Any,
) -> Path:
    """`changes` go to params.json; None removes a key."""
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    params = {
        "dim": SPEC.hidden_size,
        "n_layers": SPEC.num_layers,
        "n_heads": SPEC.num_heads,
        "n_kv_heads": SPEC.num_kv_heads,
        "vocab_size": SPEC.vocab_size,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    params = {k: v for k, v in {**params, **changes}.items() if v is not None}
    (directory / "params.json").write_text(json.dumps(params))
    for shard in range(num_shards):
        state = {"rope.freqs": torch.zeros(SPEC.head_dim // 2)}
        for name, array in weights.items():
            if heads := rotary_heads(name):
                array = interleaved(array, heads)
            if array.ndim == 2:
                by_cols = ".o." in name or ".down." in name
                by_cols |= name == "embed.weight" and not is_embed_by_rows
                array = np.split(array, num_shards, axis=1 if by_cols else 0)[shard]
            state[renamed(name, _META, "layers")] = to_torch(np.ascontiguousarray(array))
        torch.save(state, directory / f"consolidated.{shard:02}.pth")
    return directory


def write_gguf(
    path: Path,
    weights: Weights,
    types: Mapping[str, str] | str = "F32",
    extra: Weights | None = None,
    **changes: Any,
) -> Path:
    """`types` is one GGML type for all matrices or one by name; `changes` are keys, of `llama.*`
    where they begin with no known word; None removes a key."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    keys: dict[str, Any] = {
        "llama.context_length": SPEC.max_position_embeddings,
        "llama.embedding_length": SPEC.hidden_size,
        "llama.block_count": SPEC.num_layers,
        "llama.feed_forward_length": SPEC.intermediate_size,
        "llama.attention.head_count": SPEC.num_heads,
        "llama.attention.head_count_kv": SPEC.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": SPEC.head_dim,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": SPEC.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    whole = ("llama.", "tokenizer.", "general.", "split.")
    keys |= {(k if k.startswith(whole) else f"llama.{k}"): v for k, v in changes.items()}
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, array in weights.items():
        if heads := rotary_heads(name):
            array = interleaved(array, heads)
        kind = types if isinstance(types, str) else types.get(name, "F32")
        type_ = GGMLQuantizationType["F32" if array.ndim == 1 else kind]
        data = quantize(array.astype(np.float32), type_)
        writer.add_tensor(renamed(name, _GGUF, "blk"), data, raw_dtype=type_)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}puna:"


def write_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer without merges, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return directory
