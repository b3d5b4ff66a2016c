"""The checkpoints that the commands of the LLaMA guide name, small: see `test_guide`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Llama 2 70B in miniature: 64 heads on 8 KV heads, and Meta's rule for the ffn (1376).
NUM_HEADS, NUM_KV_HEADS, HIDDEN, HEAD_DIM, MULTIPLE_OF = 64, 8, 512, 8, 32
BY_COLS = ("wo", "w2", "tok_embeddings")
META_NAMES = (
    ("model.embed_tokens.", "tok_embeddings."),
    ("model.norm.", "norm."),
    ("lm_head.", "output."),
    ("model.layers.", "layers."),
    ("self_attn.q_proj", "attention.wq"),
    ("self_attn.k_proj", "attention.wk"),
    ("self_attn.v_proj", "attention.wv"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)


def write_stories(directory: Path, stories: Path) -> None:
    """The trained model of 260K parameters, with its tokenizer beside it."""
    shutil.copytree(stories, directory)
    shutil.copy(stories.parent / "meta" / "tokenizer.model", directory)


def write_miniature(hf: Path, meta: Path, tokenizer: Path) -> None:
    """A random model with the vocabulary of `tokenizer`, in both forms; 8 shards in Meta's."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        vocab_size=512,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.1 * values if "norm" in name else values * weight.shape[1] ** -0.5
    model.half().save_pretrained(hf)
    shutil.copy(tokenizer, hf)
    write_meta_shards(meta, model.state_dict(), num_shards=8)
    # Meta's tokenizer lies one folder up, beside the models.
    shutil.copy(tokenizer, meta.parent)


def write_meta_shards(directory: Path, state: dict[str, Any], num_shards: int) -> None:
    """Meta's form of Hugging Face's weights: RoPE pairs side by side, a part in each file."""
    directory.mkdir(exist_ok=True)
    params = {
        "dim": HIDDEN,
        "n_layers": 4,
        "n_heads": NUM_HEADS,
        "n_kv_heads": NUM_KV_HEADS,
        "multiple_of": MULTIPLE_OF,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (directory / "params.json").write_text(json.dumps(params))
    shards: list[dict[str, Any]] = [
        {"rope.freqs": torch.zeros(HEAD_DIM // 2)} for _ in range(num_shards)
    ]
    for name, weight in state.items():
        if ".q_proj" in name or ".k_proj" in name:
            halves = weight.view(-1, 2, HEAD_DIM // 2, HIDDEN)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        for ours, theirs in META_NAMES:
            name = name.replace(ours, theirs)
        axis = 1 if any(f"{part}." in name for part in BY_COLS) else 0
        parts = weight.chunk(num_shards, axis) if weight.ndim == 2 else [weight] * num_shards
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{i:02}.pth")


def write_smollm2(directory: Path, gguf: Path) -> None:
    """SmolLM2 in Hugging Face's form, float16, with its tokenizer."""
    from safetensors.torch import save_file
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from puna.checkpoint import open_checkpoint

    config = LlamaConfig(**load_gguf_checkpoint(str(gguf))["config"])
    with torch.device("meta"):  # names only
        names = LlamaForCausalLM(config)
    found = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=names)["tensors"]
    directory.mkdir(parents=True)
    halved = {name: tensor.half() for name, tensor in found.items()}
    save_file(halved, directory / "model.safetensors", {"format": "pt"})
    config.save_pretrained(directory)
    for name, data in open_checkpoint(gguf).tokenizer_files().items():
        (directory / name).write_bytes(data)
