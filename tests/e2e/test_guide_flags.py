"""Every flag of the LLaMA guide does something, or is accepted with a note, or refused with advice.

The scripts of examples/llama run in this process here; `test_guide` runs them as users do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoint_writers import SPEC, write_meta
from quantised_writers import How, quantised_layers, save, tensors_of
from small_models import ROOT, Script, weights, write_checkpoint

import puna.builder
from puna.engine import read_config

# A flag, and how config.json shows what it does; `{}` is a folder with checkpoints.
BUILD_EFFECTS = {
    "world_size": ("--world_size 2", "tp_size", 2),
    "tp_size": ("--tp_size 2", "tp_size", 2),
    "pp_size": ("--pp_size 2", "pp_size", 2),
    "model_dir": ("--model_dir {}/hf", "provenance.kind", "hf"),
    "meta_ckpt_dir": ("--meta_ckpt_dir {}/meta", "provenance.kind", "meta"),
    "quant_ckpt_path": (
        "--model_dir {}/hf --quant_ckpt_path {}/gptq.safetensors",
        "weights.layers.0.attn.q.weight.format",
        "int4-g16",
    ),
    "dtype": ("--dtype float32", "dtype", "float32"),
    "vocab_size": ("--vocab_size 77", "spec.vocab_size", 77),
    "n_layer": ("--n_layer 3", "spec.num_layers", 3),
    "n_positions": ("--n_positions 99", "spec.max_position_embeddings", 99),
    "n_embd": ("--n_embd 96", "spec.hidden_size", 96),
    "n_head": ("--n_head 8", "spec.num_heads", 8),
    "n_kv_head": ("--n_kv_head 2", "spec.num_kv_heads", 2),
    "multiple_of": ("--multiple_of 100", "spec.intermediate_size", 200),
    "ffn_dim_multiplier": ("--ffn_dim_multiplier 2.5", "spec.intermediate_size", 512),
    "inter_size": ("--inter_size 130", "spec.intermediate_size", 130),
    "rms_norm_eps": ("--rms_norm_eps 1e-3", "spec.rms_norm_eps", 1e-3),
    "rotary_base": ("--rotary_base 5e5", "spec.rope.theta", 5e5),
    "rotary_scaling": ("--rotary_scaling linear 2.0", "spec.rope.factor", 2.0),
    "max_batch_size": ("--max_batch_size 3", "limits.max_batch_size", 3),
    "max_input_len": ("--max_input_len 100", "limits.max_seq_len", 612),
    "max_output_len": ("--max_output_len 100", "limits.max_seq_len", 2148),
    "max_beam_width": ("--max_beam_width 4", "limits.max_batch_size", 32),
    "max_num_tokens": ("--max_num_tokens 64", "limits.max_num_tokens", 64),
    "use_weight_only": ("--use_weight_only", "quant", "int8"),
    "weight_only_precision": ("--use_weight_only --weight_only_precision int4", "quant", "int4"),
    "per_group": (
        "--use_weight_only --weight_only_precision int4 --per_group",
        "quant",
        "int4-g128",
    ),
    "group_size": ("--use_weight_only --per_group --group_size 32", "quant", "int8-g32"),
    "int8_kv_cache": ("--int8_kv_cache", "kv_dtype", "int8"),
}
BUILD_NOTES = {
    "use_gpt_attention_plugin": "--use_gpt_attention_plugin float16",
    "use_gemm_plugin": "--use_gemm_plugin",
    "use_rmsnorm_plugin": "--use_rmsnorm_plugin",
    "enable_context_fmha": "--enable_context_fmha",
    "enable_context_fmha_fp32_acc": "--enable_context_fmha_fp32_acc",
    "multi_block_mode": "--multi_block_mode",
    "remove_input_padding": "--remove_input_padding",
    "paged_kv_cache": "--paged_kv_cache",
    "tokens_per_block": "--tokens_per_block 64",
    "use_inflight_batching": "--use_inflight_batching",
    "use_custom_all_reduce": "--use_custom_all_reduce",
    "use_parallel_embedding": "--use_parallel_embedding",
    "embedding_sharding_dim": "--embedding_sharding_dim 1",
    "load_by_shard": "--load_by_shard",
    "timing_cache": "--timing_cache model.cache",
    "builder_opt": "--builder_opt 4",
    "gpus_per_node": "--gpus_per_node 4",
    "strongly_typed": "--strongly_typed",
}
BUILD_REFUSED = {
    "ft_model_dir": ("--ft_model_dir ft", "--meta_ckpt_dir"),
    "fp8_kv_cache": ("--fp8_kv_cache", "--int8_kv_cache"),
    "enable_fp8": ("--enable_fp8", "--use_weight_only"),
    "quantized_fp8_model_path": ("--quantized_fp8_model_path a.npz", "--use_weight_only"),
    "use_smooth_quant": ("--use_smooth_quant", "--use_weight_only"),
    "per_channel": ("--per_channel", "--use_weight_only"),
    "per_token": ("--per_token", "--use_weight_only"),
    "visualize": ("--visualize", "puna inspect"),
    "enable_debug_output": ("--enable_debug_output", "--device reference"),
}
# Shown by tests of their own below.
BUILD_OTHERS = {"hidden_act", "parallel_build", "log_level", "output_dir"}
# Not the guide's.
OWN_FLAGS = {"target": ("--target cpu", "resolved.target", ["cpu", "as asked"])}
BUILD_FLAGS = {*BUILD_EFFECTS, *BUILD_NOTES, *BUILD_REFUSED, *BUILD_OTHERS}
RUN_FLAGS = """
    max_output_len log_level engine_dir tokenizer_dir input_text input_tokens output_csv output_npy
    num_beams streaming streaming_interval input_file temperature top_k top_p length_penalty
    repetition_penalty max_kv_cache_len
"""
SUMMARIZE_FLAGS = """
    hf_model_location test_hf test_trt_llm data_type dataset_path log_level engine_dir batch_size
    max_ite check_accuracy tensorrt_llm_rouge1_threshold num_beams top_k output_len
"""
SHAPE = "--n_layer 2 --n_embd 64 --n_head 4 --vocab_size 90"
CONTRADICTIONS = {
    "--world_size 4 --tp_size 2": "is not tp_size 2 x pp_size 1",
    "--use_weight_only --use_smooth_quant": "exclude each other",
    "--enable_context_fmha --enable_context_fmha_fp32_acc": "exclude each other",
    "--model_dir a --meta_ckpt_dir b": "exclude each other",
    "--weight_only_precision int4": "needs --use_weight_only",
    "--use_weight_only --group_size 64": "needs --per_group",
    "--quant_ckpt_path a.safetensors": "needs --model_dir",
    "--dtype bfloat16 --use_gemm_plugin float16": "contradicts --dtype bfloat16",
    "--hidden_act gelu": "silu",
    "--rotary_scaling yarn 2": "needed linear or dynamic",
    "--rotary_scaling linear 0.5": "a factor above 1",
    "--n_embd 65": "is not a multiple of --n_head 4",
    "--model_dir {}/hf --n_layer 7": "the checkpoint says 2",
    "--model_dir {}/hf --multiple_of 1024": "the checkpoint says 96",
    "--meta_ckpt_dir {}/hf": "no Meta checkpoint",
    "--model_dir {}/nothing": "does not exist",
    "--model_dir {}/hf --use_weight_only --weight_only_precision int4_gptq": "layers of .* float32",
    "--tp_size 3": "cannot be split over tp 3",
    "--target sm_90 --use_weight_only": "int8 is not available on target sm_90 .*--target cpu",
    "--output_dir {}/hf": "is not a puna engine",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, meta and gptq.safetensors, which has hf's layers in groups of 16."""
    path = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(path / "hf")
    write_meta(path / "meta", weights(), vocab_size=300)
    how = How("gptq", bits=4, group_size=16)
    layers = quantised_layers(weights(), how)
    save(path / "gptq.safetensors", tensors_of(weights(), layers, how))
    return path


def names(parser: Any) -> set[str]:
    return {action.dest for action in parser._actions} - {"help"}


def test_the_flags_are_the_guides(examples: dict[str, ModuleType]) -> None:
    assert names(examples["build_flags"].parser()) == BUILD_FLAGS | OWN_FLAGS.keys()
    assert names(examples["run"].parser()) >= set(RUN_FLAGS.split())
    assert names(examples["summarize"].parser()) >= set(SUMMARIZE_FLAGS.split())
    guide = ROOT.parent / "shared" / "guide" / "LLAMA_GUIDE.md"
    if not guide.is_file():
        return
    table = guide.read_text().partition("to support under the same names")[2]
    listed = re.split(r"(?:build|run|summarize)\.py: ", table.partition("\nA flag that")[0])[1:]
    for text, flags in zip(
        listed, (BUILD_FLAGS, set(RUN_FLAGS.split()), set(SUMMARIZE_FLAGS.split())), strict=True
    ):
        found = {re.match(r"\w+", item.split("versions ")[-1].strip())[0] for item in _items(text)}  # type: ignore
        assert found == flags, found ^ flags


def _items(text: str) -> list[str]:
    """The flags of a list, without what stands in brackets or quotes after them."""
    plain = re.sub(r"\(.*?\)|\{.*?\}|\[.*?\]|\".*?\"", "", text, flags=re.DOTALL)
    return [item for item in plain.replace("\n", " ").strip(" .").split(",") if item.strip()]


def look_up(config: Any, path: str) -> Any:
    """A value of config.json by its path, in which a weight's name may have dots."""
    if not path:
        return config
    key = next(key for key in config if path == key or path.startswith(f"{key}."))
    return look_up(config[key], path[len(key) + 1 :])


@pytest.mark.parametrize("flag", [*BUILD_EFFECTS, *OWN_FLAGS])
def test_flag_that_changes_the_engine(
    flag: str, run_example: Script, checkpoints: Path, tmp_path: Path
) -> None:
    arguments, path, value = {**BUILD_EFFECTS, **OWN_FLAGS}[flag]
    shape = "" if "_dir" in arguments else SHAPE
    built = run_example(
        "build", f"{shape} {arguments.format(*[checkpoints] * 2)} --output_dir {tmp_path}/e"
    )
    assert built.status == 0, built.err
    assert look_up(json.loads((tmp_path / "e" / "config.json").read_text()), path) == value
    assert run_example("build", f"{SHAPE} --output_dir {tmp_path}/plain").status == 0
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert look_up(plain, path) != value


@pytest.mark.parametrize("flag", BUILD_NOTES)
def test_flag_that_changes_nothing_says_so(flag: str, run_example: Script, tmp_path: Path) -> None:
    plain = run_example("build", f"{SHAPE} --output_dir {tmp_path}/plain")
    built = run_example("build", f"{SHAPE} {BUILD_NOTES[flag]} --output_dir {tmp_path}/e")
    assert built.status == 0 and plain.status == 0
    assert (built.err.count("\n"), plain.err.count("\n")) == (1, 1)
    assert f"note: {flag}: " in built.err and flag not in plain.err
    assert read_config(tmp_path / "e") == read_config(tmp_path / "plain")


def test_all_notes_are_one_line(run_example: Script, tmp_path: Path) -> None:
    given = " ".join(set(BUILD_NOTES.values()) - {"--enable_context_fmha"})
    for _ in range(2):
        built = run_example("build", f"{SHAPE} {given} --output_dir {tmp_path}/e")
    assert built.status == 0 and built.err.count("\n") == 1
    for text in (*BUILD_NOTES.keys() - {"enable_context_fmha"}, "max_seq_len 2560", "replaced"):
        assert text in built.err


@pytest.mark.parametrize("flag", BUILD_REFUSED)
def test_flag_that_is_refused(flag: str, run_example: Script, tmp_path: Path) -> None:
    arguments, advice = BUILD_REFUSED[flag]
    found = run_example("build", f"{SHAPE} {arguments} --output_dir {tmp_path}/e")
    assert (found.status, found.out, found.err.count("\n")) == (2, "", 1)
    assert f"--{flag} asks for what puna does not have" in found.err and advice in found.err
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("arguments", CONTRADICTIONS)
def test_contradiction(
    arguments: str, run_example: Script, checkpoints: Path, tmp_path: Path
) -> None:
    shape = "" if "model_dir" in arguments or "--meta" in arguments else SHAPE
    out = "" if "--output_dir" in arguments else f"--output_dir {tmp_path}/e"
    found = run_example("build", f"{shape} {arguments.format(checkpoints)} {out}")
    assert (found.status, found.out, found.err.count("\n")) == (2, "", 1), found
    assert re.search(CONTRADICTIONS[arguments], found.err), found.err


def test_values_that_are_the_checkpoints_are_welcome(
    run_example: Script, checkpoints: Path, tmp_path: Path
) -> None:
    same = f"--n_layer {SPEC.num_layers} --inter_size 96 --hidden_act silu --vocab_size 300"
    found = run_example("build", f"--model_dir {checkpoints}/hf {same} --output_dir {tmp_path}/e")
    assert found.status == 0, found
    scaled = "--rotary_scaling dynamic 4"
    found = run_example("build", f"--model_dir {checkpoints}/hf {scaled} --output_dir {tmp_path}/e")
    assert found.status == 0 and read_config(tmp_path / "e").spec.rope.type == "dynamic"


def test_parallel_build(
    run_example: Script, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process a rank, at most as many as there are CPUs; the same bytes."""
    calls: list[int] = []
    write = puna.builder.write_ranks_in_processes

    def spy(task: Any, num_processes: int, *rest: Any) -> None:
        calls.append(num_processes)
        write(task, num_processes, *rest)

    monkeypatch.setattr(puna.builder, "write_ranks_in_processes", spy)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    command = f"--model_dir {checkpoints}/hf --world_size 4 --output_dir {tmp_path}"
    assert run_example("build", f"{command}/one").status == 0 and not calls
    assert run_example("build", f"{command}/many --parallel_build").status == 0 and calls == [2]
    for path in (tmp_path / "one").glob("*.*"):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_log_level(run_example: Script, tmp_path: Path) -> None:
    command = f"{SHAPE} --output_dir {tmp_path}/e --use_gemm_plugin --log_level"
    talkative, quiet = (
        run_example("build", f"{command} info"),
        run_example("build", f"{command} error"),
    )
    assert f"{tmp_path}/e: " in talkative.out and quiet.out == ""
    assert "use_gemm_plugin" in quiet.err
    assert "kv_cache_tokens" in run_example("build", f"{command} verbose").out


def test_what_the_flags_say_of_gptq(run_example: Script, checkpoints: Path, tmp_path: Path) -> None:
    command = (
        f"--model_dir {checkpoints}/hf --quant_ckpt_path {checkpoints}/gptq.safetensors "
        f"--use_weight_only --weight_only_precision int4_gptq --per_group --output_dir {tmp_path}/e"
    )
    assert run_example("build", f"{command} --group_size 16").status == 0
    assert "the checkpoint has int4-g16" in run_example("build", f"{command} --group_size 64").err
    dummy = f"{SHAPE} --use_weight_only --weight_only_precision int4_awq --output_dir {tmp_path}/d"
    assert run_example("build", dummy).status == 0
    assert read_config(tmp_path / "d").quant == "int4-g128"
