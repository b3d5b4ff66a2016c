"""ModelSpec: the facts of a LLaMA-family model, validated once and never changed.

Field names are Hugging Face's. This file knows nothing of weights, files or devices; the readers in
`puna.checkpoint` translate each format into it, and `config.json` of an engine stores it verbatim.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from puna.errors import CheckpointError
from puna.strict_json import exact_keys

# The table of weights grows with it; a damaged header must not make that endless.
MAX_LAYERS = 10_000

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding, half-split form. Angles are computed in `puna.rope`.

    `original_max_position_embeddings` is the length the model was first trained for; the three
    scalings that need it (dynamic, llama3, yarn) always have it, the others leave it 0.
    """

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: computed from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self) -> None:
        if self.type not in get_args(RopeType):
            raise CheckpointError(
                f"RoPE scaling {self.type!r} is not supported; puna has "
                f"{', '.join(get_args(RopeType))}"
            )
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise CheckpointError(f"rope_theta is {self.theta}; it must be a positive number")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise CheckpointError(f"RoPE factor is {self.factor}; it must be a positive number")
        needs_original = self.type in ("dynamic", "llama3", "yarn")
        if needs_original and self.original_max_position_embeddings <= 0:
            raise CheckpointError(
                f"RoPE scaling {self.type!r} needs original_max_position_embeddings, "
                f"found {self.original_max_position_embeddings}"
            )
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise CheckpointError(
                "RoPE scaling 'llama3' needs 0 < low_freq_factor < high_freq_factor, found "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelSpec:
    """Shape and constants of one LLaMA-family decoder.

    Every layer is: RMSNorm, attention (q, k, v, o), RMSNorm, gated SiLU MLP (gate, up, down).
    `attention_bias` puts a bias on q, k, v and o; `mlp_bias` on gate, up and down.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeSpec = RopeSpec()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise CheckpointError(f"{name} is {value!r}; it must be a positive whole number")
        if self.num_layers > MAX_LAYERS:
            raise CheckpointError(
                f"num_layers is {self.num_layers}; at most {MAX_LAYERS} make sense"
            )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; RoPE needs an even number")
        if self.rope.type == "dynamic" and self.head_dim == 2:
            raise CheckpointError("head_dim is 2; dynamic RoPE scaling needs more")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise CheckpointError(f"rms_norm_eps is {self.rms_norm_eps}; it must be positive")

    @property
    def q_size(self) -> int:
        """Rows of the query projection: num_heads * head_dim (need not equal hidden_size)."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key (and of the value) projection."""
        return self.num_kv_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """Inverse of `to_json`; unknown or missing keys are a ValueError that names them."""
        rope = RopeSpec(**exact_keys(RopeSpec, data.get("rope", {})))
        return cls(**{**exact_keys(cls, data), "rope": rope})


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint says about sampling (generation_config.json); None where it says nothing.

    `eos_token_ids` end a sequence. `temperature` None or 0 means greedy.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GenerationDefaults:
        data = exact_keys(cls, data)
        return cls(**{**data, "eos_token_ids": tuple(data["eos_token_ids"])})
