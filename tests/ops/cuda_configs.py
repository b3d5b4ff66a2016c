"""EngineConfigs for a GPU, for the tests of its kernels: no checkpoint, no files."""

from __future__ import annotations

from typing import Literal

from puna.engine import EngineConfig, Provenance
from puna.plan import BuildConfig, CheckpointFacts, plan
from puna.spec import GenerationDefaults, ModelSpec

BLOCK = 64


def cuda_config(
    spec: ModelSpec,
    dtype: Literal["float16", "bfloat16"] = "float16",
    target: str = "sm_90",
    *,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    max_num_tokens: int = 128,
) -> EngineConfig:
    """What a build for `target` resolves to."""
    provenance = Provenance("tests", "dummy", {}, "0", ())
    facts = CheckpointFacts(spec, {}, GenerationDefaults(), provenance)
    asked = BuildConfig(
        dtype=dtype,
        target=target,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
    )
    config = plan(facts, asked)
    assert config.limits.block_size == BLOCK
    return config
