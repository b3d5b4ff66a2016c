"""plan: every choice, its reason, and what is refused. No weights are read and no file is made."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace
from typing import Any

import pytest

from puna.checkpoint.dummy import PRESETS
from puna.engine import EngineConfig, Provenance
from puna.errors import ConfigError
from puna.memory import planned_device, rank_memory
from puna.plan import BuildConfig, CheckpointFacts, plan, warnings
from puna.quant import Format
from puna.rank_file import ALIGNMENT, rank_file
from puna.spec import GenerationDefaults, ModelSpec
from puna.weights import checkpoint_weights

SPEC = ModelSpec(256, 688, 2, 8, 4, 32, 500, 4096)


def facts(spec: ModelSpec = SPEC, fmt: str = "bfloat16", **others: str) -> CheckpointFacts:
    """All matrices in `fmt`; `others` by the end of the name (attn_v for ...attn.v.weight)."""
    formats = {}
    for weight in checkpoint_weights(spec):
        if weight.is_matrix:
            name = weight.name.removesuffix(".weight")
            ends = [f for end, f in others.items() if name.endswith(end.replace("_", "."))]
            formats[weight.name] = Format.parse(ends[0] if ends else fmt)
    provenance = Provenance("somewhere", "hf", {}, "0", ("a note",))
    return CheckpointFacts(spec, formats, GenerationDefaults(), provenance)


def formats_of(spec: ModelSpec, config: BuildConfig, fmt: str, **others: str) -> dict[str, str]:
    planned = plan(facts(spec, fmt, **others), config)
    return {name: weight.format for name, weight in planned.weights.items()}


def test_every_option_is_resolved_with_a_reason() -> None:
    planned = plan(facts(), BuildConfig())
    parallel = {"tp_size", "pp_size", "group_size"}  # these have no auto
    options = {field.name for field in fields(BuildConfig)} - parallel
    assert planned.resolved.keys() >= options
    for name, (value, why) in planned.resolved.items():
        assert value not in (None, "auto"), name
        assert len(why) > 5, name
    assert planned.resolved["dtype"] == ("bfloat16", "what the checkpoint holds")
    assert (planned.dtype, planned.kv_dtype) == ("bfloat16", "float16")
    assert planned.quant == "none"
    assert planned.limits.max_seq_len == 4096


def test_what_was_asked_for_is_said_to_be_asked_for() -> None:
    config = BuildConfig("float32", "int8", target="cpu", max_seq_len=64, max_batch_size=2)
    planned = plan(facts(), config)
    for name in ("dtype", "quant", "target", "max_seq_len", "max_batch_size"):
        assert planned.resolved[name][1].startswith("as asked"), name
    assert planned.limits.max_seq_len == 64 and planned.limits.max_batch_size == 2
    assert planned.quant == "int8" and planned.dtype == "float32"


def test_plan_is_pure() -> None:
    given, config = facts(fmt="int4-g32"), BuildConfig(tp_size=4, pp_size=2)
    before = repr(given)
    once, again = plan(given, config), plan(given, config)
    assert once.to_bytes() == again.to_bytes() and repr(given) == before
    assert json.loads(once.to_bytes())["resolved"]["kv_dtype"][0] == "bfloat16"
    assert len(once.memory) == 8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_plan_at_full_size(name: str) -> None:
    """A 70B model is planned as fast as a small one: nothing is allocated."""
    tp = 3 if name == "smollm2-135m" else 8
    planned = plan(facts(PRESETS[name]), BuildConfig(quant="int4", tp_size=tp))
    assert sum(memory.weights for memory in planned.memory) > 40_000_000


@pytest.mark.parametrize(
    ("quant", "group_size", "expected"),
    [
        ("none", None, {"bfloat16"}),
        ("int8", None, {"int8"}),
        ("int8", 64, {"int8-g64"}),
        ("int4", None, {"int4-g128", "int8-g128"}),
        ("int4", 32, {"int4-g32", "int8-g32"}),
        ("int4", 0, {"int4", "int8"}),
    ],
)
def test_formats_from_floats(quant: Any, group_size: int | None, expected: set[str]) -> None:
    found = formats_of(SPEC, BuildConfig(quant=quant, group_size=group_size), "bfloat16")
    matrices = {n: f for n, f in found.items() if "norm" not in n}
    assert set(matrices.values()) == expected
    assert {found[n] for n in found if "norm" in n} == {"float32"}
    if quant == "int4":
        assert matrices["embed.weight"].startswith("int8")
        assert matrices["layers.0.mlp.down.weight"].startswith("int4")


def test_auto_keeps_blocks_whose_formats_differ() -> None:
    found = formats_of(SPEC, BuildConfig(), "int4-g32-min", attn_v="int8-g32", head="float32")
    assert found["layers.0.attn.q.weight"] == found["layers.0.attn.k.weight"] == "int4-g32-min"
    assert found["layers.0.attn.v.weight"] == "int8-g32"
    assert found["layers.0.mlp.gate.weight"] == found["layers.0.mlp.up.weight"] == "int4-g32-min"
    assert found["head.weight"] == "float16", "floats beside blocks become the engine's dtype"
    planned = plan(facts(SPEC, "int4-g32-min", attn_v="int8-g32"), BuildConfig())
    assert planned.quant == "int4-g32-min"
    assert "int8-g32" in planned.resolved["quant"][1]


def test_none_dequantises_blocks() -> None:
    found = formats_of(SPEC, BuildConfig("float32", "none"), "int4-g32-min")
    assert set(found.values()) == {"float32"} and "layers.0.attn.v.weight" in found


def test_every_matrix_is_stored_in_tiles_and_on_its_own() -> None:
    planned = plan(facts(replace(SPEC, attention_bias=True)), BuildConfig())
    assert {weight.layout for weight in planned.weights.values()} == {"tiles"}
    assert {w.name for w in checkpoint_weights(SPEC)} <= planned.weights.keys()
    assert not planned.weights.keys() & {"layers.0.attn.qkv.weight", "layers.0.mlp.gate_up.weight"}
    assert "layers.0.attn.qkv.bias" in planned.weights


def test_kv_dtype() -> None:
    """int8 takes a byte a number, and four a token, KV head and layer for each of K and V."""
    usual, small = plan(facts(), BuildConfig()), plan(facts(), BuildConfig(kv_dtype="int8"))
    assert (usual.kv_dtype, small.kv_dtype) == ("float16", "int8")
    assert plan(facts(), BuildConfig(kv_dtype="bfloat16")).kv_dtype == "bfloat16"
    assert plan(facts(), BuildConfig(dtype="float32")).kv_dtype == "float32"
    assert plan(facts(), BuildConfig(quant="int8")).kv_dtype == "float16"
    assert plan(facts(fmt="int4-g32"), BuildConfig()).kv_dtype == "bfloat16"
    assert plan(facts(), BuildConfig(dtype="float32", quant="int8")).kv_dtype == "float32"
    assert plan(facts(), BuildConfig(dtype="float16")).kv_dtype == "float16"
    assert small.resolved["kv_dtype"] == ("int8", "as asked")
    tokens = usual.limits.num_blocks * usual.limits.block_size * SPEC.num_layers * 2
    assert usual.memory[0].kv_cache == tokens * SPEC.kv_size * 2
    assert small.memory[0].kv_cache == tokens * (SPEC.kv_size + 4 * SPEC.num_kv_heads)


def test_a_rank_holds_whole_groups_of_the_ffn() -> None:
    spec = replace(SPEC, intermediate_size=172)
    planned = plan(facts(spec, "int4-g32"), BuildConfig(tp_size=4))
    assert planned.ffn_multiple == 32
    assert plan(facts(spec), BuildConfig(tp_size=4)).ffn_multiple == 1
    assert plan(facts(spec, "int4-g32"), BuildConfig()).ffn_multiple == 1


def test_blocks_that_are_kept_are_not_cut() -> None:
    spec = replace(SPEC, num_heads=10, num_kv_heads=10, head_dim=16)
    plan(facts(spec, "int4-g32"), BuildConfig(tp_size=5))
    with pytest.raises(ConfigError, match=r"tp 2 cuts .* int4-g32 blocks.* another --tp"):
        plan(facts(spec, "int4-g32"), BuildConfig(tp_size=2))
    plan(facts(spec, "int4-g32"), BuildConfig(tp_size=2, quant="int8"))
    plan(facts(spec, "bfloat16"), BuildConfig(tp_size=2))


def test_group_sizes_of_the_vocabulary_do_not_bind_tensor_parallelism() -> None:
    spec = replace(SPEC, num_heads=10, num_kv_heads=10, head_dim=16)
    plan(facts(spec, "bfloat16", embed="int8-g32"), BuildConfig(tp_size=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 32}, "needs --quant int8 or int4, found auto"),
        ({"group_size": 32, "quant": "none"}, "found none"),
        ({"group_size": 8, "quant": "int8"}, "multiple of 16"),
        ({"group_size": -16, "quant": "int4"}, "multiple of 16"),
        ({"dtype": "float64"}, "float64.*use one of auto, float32"),
        ({"quant": "int3"}, "int3.*use one of auto"),
        ({"max_seq_len": 0}, "positive whole number"),
        ({"max_batch_size": 2.0}, "positive whole number"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "sm_70"}, "sm_70.*not built by this version.*auto, cpu, sm_80, .*sm_120"),
        ({"kv_dtype": "fp8"}, "fp8 is not available on target cpu.*use auto, .* or int8$"),
        ({"tp_size": 3}, "use tp 1, 2, 4, 8"),
        ({"pp_size": 3}, "use pp 2 or fewer"),
        ({"max_num_tokens": 4, "max_batch_size": 8}, "max_num_tokens 4 is below"),
    ],
)
def test_options_that_do_not_fit_the_model_or_version_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(facts(), BuildConfig(**options))


def test_a_longer_context_than_the_models_is_allowed_with_one_warning() -> None:
    long = plan(facts(), BuildConfig(max_seq_len=8192))
    assert long.limits.max_seq_len == 8192
    assert warnings(long) == [
        "a note",
        "max_seq_len 8192 exceeds the model's 4096 positions; text beyond them may be poor",
    ]
    assert warnings(plan(facts(), BuildConfig())) == ["a note"]


GPUS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


def gpu_plan(spec: ModelSpec = SPEC, fmt: str = "bfloat16", **options: Any) -> EngineConfig:
    return plan(facts(spec, fmt), BuildConfig(**{"target": "sm_90", **options}))


@pytest.mark.parametrize("target", GPUS)
def test_an_engine_for_a_gpu_is_in_rows_with_a_cache_of_its_own_dtype(target: str) -> None:
    planned = gpu_plan(target=target)
    assert planned.target == target
    assert {weight.layout for weight in planned.weights.values()} == {"rows"}
    assert (planned.dtype, planned.kv_dtype, planned.quant) == ("bfloat16", "bfloat16", "none")
    limits = planned.limits
    assert (limits.block_size, limits.max_batch_size, limits.max_num_tokens) == (64, 64, 2048)
    assert planned.resolved["max_batch_size"] == (64, "default of a GPU")
    assert planned.memory[0] == rank_memory(planned, 0, "cuda")
    assert (
        planned_device(planned) == "cuda" and planned_device(plan(facts(), BuildConfig())) == "cpu"
    )


@pytest.mark.parametrize(
    ("fmt", "dtype", "reason"),
    [
        ("float16", "float16", "what the checkpoint holds"),
        ("bfloat16", "bfloat16", "what the checkpoint holds"),
        ("float32", "float16", "target sm_90 does not have; float16 is the finest half"),
        ("int4-g32-min", "float16", "float16 is the finest half"),
    ],
)
def test_dtype_of_an_engine_for_a_gpu(fmt: str, dtype: str, reason: str) -> None:
    planned = gpu_plan(fmt=fmt)
    assert planned.dtype == planned.kv_dtype == dtype and reason in planned.resolved["dtype"][1]
    matrices = {w.format for name, w in planned.weights.items() if "norm" not in name}
    assert matrices == {dtype}


def test_quantised_checkpoints_are_dequantised_for_a_gpu_and_that_is_said() -> None:
    planned = gpu_plan(fmt="int4-g32-min")
    value, reason = planned.resolved["quant"]
    assert value == "none" and reason.startswith("the checkpoint's int4-g32-min are dequantised")
    assert reason in warnings(planned) and warnings(gpu_plan()) == ["a note"]
    assert gpu_plan().resolved["quant"] == ("none", "what the checkpoint holds: 100% bfloat16")
    asked = gpu_plan(fmt="int4-g32-min", quant="none").resolved["quant"]
    assert asked == ("none", "as asked: 100% float16")
    # A group size of the checkpoint's blocks binds nothing that is dequantised.
    spec = replace(SPEC, num_heads=10, num_kv_heads=10, head_dim=18, hidden_size=180)
    gpu_plan(spec, "int4-g32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "dtype float32 .* sm_90 .*: use auto, float16 or bfloat16 "),
        ({"kv_dtype": "int8"}, "kv-dtype int8 .* sm_90 .*: use auto, float16 or bfloat16 "),
        ({"kv_dtype": "fp8"}, "kv-dtype fp8 .* sm_90 .*: use auto, float16 or bfloat16$"),
        (
            {"kv_dtype": "float16"},
            "kv-dtype float16 beside dtype bfloat16 .*: use auto, or the same",
        ),
        ({"quant": "int8"}, "quant int8 .* sm_90 .*: use auto or none "),
        ({"quant": "int4", "group_size": 32}, "quant int4 .*: use auto or none .*--target cpu"),
        ({"tp_size": 2}, "tp 2 and pp 1: several ranks are not .* sm_90"),
        ({"pp_size": 2}, "tp 1 and pp 2: several ranks"),
    ],
)
def test_what_a_gpu_does_not_have_yet_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gpu_plan(**options)


def test_auto_is_the_target_that_was_found_with_its_reason() -> None:
    found = ("sm_89", "NVIDIA L4 (compute capability 8.9)")
    planned = plan(facts(), BuildConfig(), found)
    assert planned.target == "sm_89" and planned.resolved["target"] == found
    assert plan(facts(), BuildConfig(target="cpu"), found).resolved["target"] == ("cpu", "as asked")


def test_the_kv_cache_of_a_gpu_is_no_larger_than_weights_or_4_gib() -> None:
    """But one long sequence always fits, and where all sequences fit there is no more than that."""
    small = gpu_plan()  # 65,536 + 4,096 tokens of 2 layers, K and V, 4 heads of 32, 2 bytes
    assert small.resolved["kv_cache_tokens"][0] == 4096 + 63 * 1024
    assert small.memory[0].kv_cache == (4096 + 63 * 1024 + 64) * 2 * 2 * 4 * 32 * 2
    llama = gpu_plan(PRESETS["llama-2-7b"], "float16")
    tokens, reason = llama.resolved["kv_cache_tokens"]
    assert tokens == llama.memory[0].weights // (64 * 2**19) * 64  # 512 KiB a token
    assert tokens > 64 * 256 and reason.startswith("what 13.5 GB hold, the larger")
    assert llama.memory[0].kv_cache == (tokens + 64) * 2**19
    one = gpu_plan(PRESETS["llama-2-7b"], "float16", max_seq_len=65536)
    assert one.resolved["kv_cache_tokens"][0] == 32768
    assert one.resolved["kv_cache_tokens"][1].startswith("one sequence of 32,768 tokens;")


@pytest.mark.parametrize(
    "spec",
    [SPEC, replace(SPEC, head_dim=18, intermediate_size=101), PRESETS["llama-3-8b"]],
    ids=["small", "odd", "llama-3-8b"],
)
def test_fused_products_are_one_matrix_in_the_file_of_a_gpu(spec: ModelSpec) -> None:
    """q, k, v and gate, up follow each other without a gap, in rows of the same length; each part
    begins at a whole tile of rows."""
    planned = gpu_plan(spec)
    arrays = rank_file(planned, 0, "0" * 64).arrays
    for layer in range(spec.num_layers):
        for names in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")):
            parts = [arrays[f"layers.{layer}.{name}.weight.data"] for name in names]
            assert all(part.offset % ALIGNMENT == 0 for part in parts)
            for before, after in itertools.pairwise(parts):
                assert after.offset == before.offset + before.num_bytes
                assert after.shape[1] == before.shape[1] and before.shape[0] % 16 == 0
