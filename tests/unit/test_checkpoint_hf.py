"""Hugging Face checkpoints: spellings of config.json, accepted oddities, refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import SPEC, hf_config, hf_name, tiny_weights, write_hf

from puna.checkpoint import open_checkpoint
from puna.checkpoint.fields import Fields
from puna.checkpoint.hf_config import read_spec
from puna.errors import CheckpointError
from puna.rope import rope_tables
from puna.spec import ModelSpec, RopeSpec

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


def spec_of(**changes: Any) -> ModelSpec:
    return read_spec(Fields(hf_config(**changes), "config.json"))[0]


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        spec_of(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_spellings_of_rope() -> None:
    old = spec_of(rope_theta=5e5, rope_scaling=LLAMA3)
    new = spec_of(rope_theta=None, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    typed = {**LLAMA3, "type": "llama3", "rope_type": None}
    assert old.rope == new.rope == spec_of(rope_theta=5e5, rope_scaling=typed).rope
    assert old.rope == RopeSpec(5e5, "llama3", 32.0, 1024, 1.0, 4.0)
    plain = spec_of(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 3.0})
    assert plain.rope == RopeSpec(theta=3.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": None},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16}},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "mscale": 0.7,
                "mscale_all_dim": 0.9,
            }
        },
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 2048},
        {"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    ],
)
def test_rope_as_transformers_reads_it(changes: dict[str, Any]) -> None:
    """Cosines, not parameters: what transformers makes of the config is what the spec must mean."""
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    if "rope_scaling" in changes:
        scaling = {k: v for k, v in changes["rope_scaling"].items() if v is not None}
        changes = {**changes, "rope_scaling": scaling}
    config = json.loads(json.dumps(hf_config(**changes)))  # transformers changes what it is given
    rotary = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**config))
    theirs, _ = rotary(torch.zeros(1), torch.arange(300)[None])
    ours, _ = rope_tables(spec_of(**changes).rope, SPEC.head_dim, 300)
    np.testing.assert_allclose(ours, theirs[0, :, : SPEC.head_dim // 2], atol=2e-5)


def test_config_defaults() -> None:
    spec = spec_of(num_key_value_heads=None, max_position_embeddings=None, rms_norm_eps=None)
    assert (spec.num_kv_heads, spec.max_position_embeddings, spec.rms_norm_eps) == (8, 2048, 1e-6)
    notes = read_spec(Fields(hf_config(max_position_embeddings=None), "config.json"))[1]
    assert notes == ["config.json gives no max_position_embeddings: 2048, Llama's default"]
    assert spec_of(head_dim=16).q_size == 128


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LLaMAForCausalLM"])
def test_architecture_names(name: str) -> None:
    assert spec_of(architectures=[name], model_type=None) == SPEC


def test_architecture_missing() -> None:
    assert spec_of(architectures=None) == SPEC


def test_dtype_spellings_do_not_matter() -> None:
    assert spec_of(torch_dtype=None, dtype="bfloat16") == SPEC


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "'MistralForCausalLM'; puna builds Llama"),
        ({"architectures": None, "model_type": "qwen2"}, "this is 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; puna has silu only"),
        ({"hidden_size": -64}, "hidden_size is -64; it must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 63}, "not a multiple of num_attention_heads"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_key_value_heads": 3}, "num_heads .* is not a multiple of num_kv_heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; it must be a finite number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; it must be positive"),
        ({"rope_theta": -1}, "rope_theta is -1.0"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "0 < low_freq_factor"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be an object"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "differs from layer to layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ],
)  # fmt: skip
def test_refusals(changes: dict[str, Any], message: str) -> None:
    text = refusal(**changes)
    assert re.search(message, text), text
    assert text.startswith("config.json: ")


def test_buffers_and_tied_copies_are_skipped(tmp_path: Path) -> None:
    weights = tiny_weights()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    found = open_checkpoint(str(write_hf(tmp_path, weights, extra=extra, tie_word_embeddings=True)))
    assert found.names() == set(weights) - {"head.weight"}


def test_unexpected_tensors_keep_their_names(tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.experts.w": np.ones((2, 2, 2), np.float32)}
    extra["model.layers.0.input_layernorm.bias"] = np.ones(64, np.int8)
    found = open_checkpoint(str(write_hf(tmp_path, tiny_weights(), extra=extra)))
    assert set(extra) <= found.names()
    assert found.shape("model.layers.0.mlp.experts.w") == (2, 2, 2)
    with pytest.raises(CheckpointError, match=r"input_layernorm\.bias: weights of type I8"):
        found.format("model.layers.0.input_layernorm.bias")


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    found = open_checkpoint(str(write_hf(tmp_path, tiny_weights(np.float64))))
    assert found.format("norm.weight").name == "float32"
    assert found.load("norm.weight").dtype == np.float32


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    weights = tiny_weights() | {"layers.0.attn.q.weight": np.ones((64, 64), np.int8)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.q\.weight: weights of type I8"):
        open_checkpoint(str(write_hf(tmp_path, weights)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_hf(tmp_path, tiny_weights(), num_files=3)
    for i in (1, 3):
        (tmp_path / f"model-{i:05}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 2 of 3.*model-00001-of.*model-00003-of"):
        open_checkpoint(str(tmp_path))


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    with pytest.raises(CheckpointError, match=r"no weights; needed one of model\.safetensors"):
        open_checkpoint(str(tmp_path))


def test_index_cannot_leave_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="needed a file beside it"):
        open_checkpoint(str(tmp_path))


def test_tensor_in_two_files(tmp_path: Path) -> None:
    write_hf(tmp_path, tiny_weights(), num_files=2)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointError, match="is in more than one file"):
        open_checkpoint(str(tmp_path))


def test_overlapping_tensors(tmp_path: Path) -> None:
    write_hf(tmp_path, tiny_weights())
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    q = header[hf_name("layers.0.attn.q.weight")]
    header[hf_name("layers.1.attn.q.weight")] = q
    changed = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(CheckpointError, match="share bytes"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "is empty"), (4, "cut short"), (200, "cut short"), (-1, "cut short")]
)
def test_cut_short(tmp_path: Path, keep: int, message: str) -> None:
    path = write_hf(tmp_path, tiny_weights()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\xff"]
)
def test_malformed_json(tmp_path: Path, text: str) -> None:
    write_hf(tmp_path, tiny_weights())
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path))


def generation(tmp_path: Path, config: dict[str, Any] | None, **changes: Any) -> Any:
    write_hf(tmp_path, tiny_weights(), **changes)
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    return open_checkpoint(str(tmp_path)).generation


def test_generation_of_a_chat_model(tmp_path: Path) -> None:
    config = {
        "eos_token_id": [7, 8],
        "bos_token_id": 3,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    found = generation(tmp_path, config)
    assert (found.eos_token_ids, found.bos_token_id) == ((7, 8), 3)
    assert (found.temperature, found.top_p, found.top_k) == (0.6, 0.9, None)


def test_generation_is_greedy_without_do_sample(tmp_path: Path) -> None:
    found = generation(tmp_path, {"temperature": 0.6, "top_k": 5})
    assert (found.temperature, found.top_k) == (None, None)
    assert (found.eos_token_ids, found.bos_token_id) == ((2,), 1)  # from config.json


def test_generation_from_config_alone(tmp_path: Path) -> None:
    assert generation(tmp_path, None, eos_token_id=[5]).eos_token_ids == (5,)


def test_generation_malformed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="eos_token_id is -1; it must be a token id"):
        generation(tmp_path, {"eos_token_id": -1})


def test_tokenizer_files(tmp_path: Path) -> None:
    write_hf(tmp_path, tiny_weights())
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"hi")
    found = open_checkpoint(str(tmp_path)).tokenizer_files()
    assert found == {"tokenizer.json": b"{}", "chat_template.jinja": b"hi"}


class Refused(Exception):
    pass


class GatedRepoError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            Refused(),
            r"could not be read \(Refused\).*`hf download org/name --local-dir DIR`, and pass",
        ),
        (GatedRepoError(), "accept its licence.*hf auth login"),
        (RepositoryNotFoundError(), "has no such repository"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("org/name")


def test_hub_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        write_hf(tmp_path, tiny_weights())
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = open_checkpoint("org/name")
    assert (found.source, found.spec) == ("org/name", SPEC)
    assert "*.bin" not in asked[0]
    assert len(asked) == 1


def test_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="huggingface_hub is not installed"):
        open_checkpoint("org/name")
