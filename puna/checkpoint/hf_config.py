"""config.json and generation_config.json of a Hugging Face checkpoint, as ModelSpec and defaults.

Decides what the many spellings and omissions of these files mean (always what transformers 5 does
with them) and which models are refused. Reads no weights; `quantization_config` is read in
`hf_quant_config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puna.checkpoint.fields import Fields, brief, read_json
from puna.errors import CheckpointError
from puna.spec import GenerationDefaults, ModelSpec, RopeSpec

_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")


def read_spec(config: Fields) -> tuple[ModelSpec, list[str]]:
    """The spec that config.json describes, and notes on what it left open."""
    _refuse_other_models(config)
    notes = []
    num_heads = config.whole("num_attention_heads", smallest=1)
    hidden_size = config.whole("hidden_size", smallest=1)
    head_dim = config.whole("head_dim", None, smallest=1)
    if head_dim is None:
        if hidden_size % num_heads:
            raise CheckpointError(
                f"{config.where}: hidden_size ({hidden_size}) is not a multiple of "
                f"num_attention_heads ({num_heads}), and head_dim is missing"
            )
        head_dim = hidden_size // num_heads
    if not config.has("max_position_embeddings"):
        notes.append("config.json gives no max_position_embeddings: 2048, Llama's default")
    if not config.has("rms_norm_eps"):
        notes.append("config.json gives no rms_norm_eps: 1e-6, Llama's default")
    max_position_embeddings = config.whole("max_position_embeddings", 2048, smallest=1)
    try:
        spec = ModelSpec(
            hidden_size=hidden_size,
            intermediate_size=config.whole("intermediate_size", smallest=1),
            num_layers=config.whole("num_hidden_layers", smallest=1),
            num_heads=num_heads,
            num_kv_heads=config.whole("num_key_value_heads", num_heads, smallest=1),
            head_dim=head_dim,
            vocab_size=config.whole("vocab_size", smallest=1),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=read_rope(config, max_position_embeddings),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            attention_bias=config.flag("attention_bias", False),
            mlp_bias=config.flag("mlp_bias", False),
        )
    except CheckpointError as error:
        where = "" if str(error).startswith(config.where) else f"{config.where}: "
        raise CheckpointError(f"{where}{error}") from None
    return spec, notes


def _refuse_other_models(config: Fields) -> None:
    named = config.data.get("architectures") or [config.text("model_type", "unknown")]
    accepted = (*_ARCHITECTURES, "llama")
    if not isinstance(named, list) or not any(name in accepted for name in named):
        raise CheckpointError(
            f"{config.where}: this is {brief(named[0] if isinstance(named, list) else named)}; "
            f"puna builds {' and '.join(_ARCHITECTURES)} only"
        )
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(
            f"{config.where}: hidden_act is {brief(activation)}; puna has silu only"
        )


def read_rope(config: Fields, max_position_embeddings: int) -> RopeSpec:
    """RoPE from `rope_theta`, `rope_scaling` and `rope_parameters`, whichever are there.

    As transformers does: `rope_scaling` wins over `rope_parameters`, a theta inside either over the
    one beside it, and an `original_max_position_embeddings` beside them over the one inside.
    """
    key = "rope_scaling" if config.data.get("rope_scaling") else "rope_parameters"
    scaling = config.object(key)
    if any(isinstance(value, dict) for value in scaling.data.values()):
        raise CheckpointError(
            f"{scaling.where} differs from layer to layer; puna has one RoPE a model"
        )
    for where in (config, scaling):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                f"{where.where}: partial_rotary_factor must be 1; puna rotates whole heads"
            )
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    rope_type = scaling.text("rope_type", scaling.text("type", "default"))
    original = config.whole(
        "original_max_position_embeddings",
        scaling.whole("original_max_position_embeddings", max_position_embeddings, smallest=1),
        smallest=1,
    )
    extra: dict[str, Any] = {}
    if rope_type in ("linear", "dynamic", "llama3"):
        extra["factor"] = scaling.number("factor")
    if rope_type == "dynamic":
        extra["original_max_position_embeddings"] = max_position_embeddings
    elif rope_type == "llama3":
        extra["original_max_position_embeddings"] = original
        extra["low_freq_factor"] = scaling.number("low_freq_factor")
        extra["high_freq_factor"] = scaling.number("high_freq_factor")
    elif rope_type == "yarn":
        extra = {
            "factor": scaling.number("factor", max_position_embeddings / original),
            "original_max_position_embeddings": original,
            "beta_fast": scaling.number("beta_fast", None) or 32.0,
            "beta_slow": scaling.number("beta_slow", None) or 1.0,
            "attention_factor": scaling.number("attention_factor", None),
            "mscale": scaling.number("mscale", None),
            "mscale_all_dim": scaling.number("mscale_all_dim", None),
            "truncate": scaling.flag("truncate", True),
        }
    return RopeSpec(theta=theta, type=rope_type, **extra)


def read_generation(directory: Path, config: Fields) -> GenerationDefaults:
    """generation_config.json where it is there, each missing token id from config.json.

    The sampling values count only with `do_sample`: without it the checkpoint's default is greedy.
    """
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else config
    is_sampled = generation.flag("do_sample", False)
    bos = generation.token_ids("bos_token_id") or config.token_ids("bos_token_id")

    def sampled(key: str, default: float | None = None) -> float | None:
        return generation.number(key, default) if is_sampled else None

    return GenerationDefaults(
        eos_token_ids=generation.token_ids("eos_token_id") or config.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
        temperature=sampled("temperature", 1.0),
        top_k=generation.whole("top_k", None) if is_sampled else None,
        top_p=sampled("top_p"),
        min_p=sampled("min_p"),
        repetition_penalty=generation.number("repetition_penalty", None),
    )
