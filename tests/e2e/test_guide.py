"""Every command of the LLaMA guide, verbatim and in its order, from a copy of examples/llama.

7B is first a trained model of 260K parameters, which splits over two ranks, then for the commands
of one rank SmolLM2; 70B is a random one with its 64 heads and 8 KV heads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("rouge_score")

from guide_checkpoints import write_miniature, write_smollm2, write_stories  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from puna.tokenizer import load_tokenizer  # noqa: E402

EXAMPLES = ROOT / "examples" / "llama"
FP16 = "--dtype float16 --use_gpt_attention_plugin float16 --use_gemm_plugin float16"
ENGINES = "./tmp/llama/7B/trt_engines"
BUILD_7B = f"python build.py --model_dir ./tmp/llama/7B/ {FP16}"
SUMMARIZE = (
    "python summarize.py --test_trt_llm --hf_model_location ./tmp/llama/7B/ --data_type fp16"
)
MPIRUN = "mpirun -n 2 --allow-run-as-root"
BUILD_ONE_RANK = (
    f"{BUILD_7B} --output_dir {ENGINES}/fp16/1-gpu/",
    "python build.py --model_dir ./tmp/llama/7B/ --dtype bfloat16 --use_gpt_attention_plugin "
    f"bfloat16 --use_gemm_plugin bfloat16 --output_dir {ENGINES}/bf16/1-gpu/",
    f"{BUILD_7B} --use_weight_only --output_dir {ENGINES}/weight_only/1-gpu/",
)
BUILD_RANKS = (
    f"{BUILD_7B} --output_dir {ENGINES}/fp16/2-gpu/ --world_size 2",
    f"python build.py --model_dir ./tmp/llama/30B/hf/ {FP16} "
    "--output_dir ./tmp/llama/30B/trt_engines/fp16/2-gpu/ --world_size 2",
    f"python build.py --model_dir ./tmp/llama/70B/hf/ {FP16} "
    "--output_dir ./tmp/llama/70B/trt_engines/fp16/8-gpu/ --world_size 8",
    f"python build.py --meta_ckpt_dir ./tmp/llama/70B {FP16} "
    "--output_dir ./tmp/llama/70B/trt_engines/fp16/8-gpu/ --world_size 8",
)
RUN = tuple(
    "python3 run.py --max_output_len=50 --tokenizer_dir ./tmp/llama/7B/ "
    f"--engine_dir={ENGINES}/{dtype}/1-gpu/"
    for dtype in ("fp16", "bf16")
)
SUMMARIZE_ONE_RANK = tuple(
    f"{SUMMARIZE} --engine_dir {ENGINES}/{kind}/1-gpu/" for kind in ("fp16", "weight_only")
)
SUMMARIZE_RANKS = (
    f"{MPIRUN} {SUMMARIZE} --engine_dir {ENGINES}/fp16/2-gpu/",
    f"{MPIRUN} {SUMMARIZE} --engine_dir {ENGINES}/fp16/2-gpu/".replace("7B", "30B"),
)
GUIDE = (*BUILD_ONE_RANK, *BUILD_RANKS, *RUN, *SUMMARIZE_ONE_RANK, *SUMMARIZE_RANKS)
PROMPT = "Born in north-east France, Soyer trained as a"
SCORES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

Shell = Callable[..., subprocess.CompletedProcess[str]]
Record = Callable[[str, object], None]


def has_open_mpi() -> bool:
    if shutil.which("mpirun") is None:
        return False
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    return "Open MPI" in version


needs_open_mpi = pytest.mark.skipif(not has_open_mpi(), reason="needs mpirun, of Open MPI")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A copy of the examples, with the dataset where the guide's commands find it."""
    path = tmp_path_factory.mktemp("examples") / "llama"
    shutil.copytree(EXAMPLES, path, ignore=shutil.ignore_patterns("tmp", "__pycache__", "cnn_*"))
    shutil.copytree(shared_data / "cnn_dailymail", path / "cnn_dailymail")
    models = path / "tmp" / "llama"
    stories = shared_data / "stories260K" / "hf"
    write_stories(models / "7B", stories)
    write_stories(models / "30B" / "hf", stories)
    tokenizer = stories.parent / "meta" / "tokenizer.model"
    write_miniature(models / "70B" / "hf", models / "70B", tokenizer)
    return path


@pytest.fixture(scope="module")
def shell(folder: Path) -> Shell:
    """Run a command as it is printed, from the folder of the examples."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # Ranks beyond this machine's cores, in Open MPI 4 and 5.
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }

    def run(command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        found = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert found.returncode == status, f"{command}\n{found.stdout}\n{found.stderr}"
        return found

    return run


def test_these_are_the_commands_of_the_guide() -> None:
    """Of ours, in examples/llama, and of the original, where that is at hand."""

    def commands(text: str) -> list[str]:
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        lines = (re.sub(r"\s+# .*", "", line) for line in blocks.splitlines())
        return [" ".join(line.split()) for line in lines if line.strip()]

    assert set(GUIDE) <= set(commands((EXAMPLES / "README.md").read_text()))
    original = ROOT.parent / "shared" / "guide" / "LLAMA_GUIDE.md"
    if original.is_file():
        assert commands(original.read_text()) == list(GUIDE)


@pytest.fixture(scope="module")
def guide(shell: Shell) -> dict[str, subprocess.CompletedProcess[str]]:
    """What every command printed, run in order."""
    if not has_open_mpi():
        pytest.skip("needs mpirun, of Open MPI")
    return {command: shell(command) for command in GUIDE}


def outputs(text: str) -> list[str]:
    return re.findall(r'^Output: "(.*)"$', text, re.MULTILINE | re.DOTALL)


def scores(text: str, system: str = "puna") -> dict[str, float]:
    """The ROUGE that summarize.py printed for a system."""
    block = text.partition(f"\n{system}, samples: ")[2]
    return {name: float(re.search(rf"{name} +([\d.]+)", block)[1]) for name in SCORES}  # type: ignore


def reference_text(model_dir: Path, dtype: str, num_new: int) -> str:
    """transformers' greedy continuation, in float32 with weights that were rounded to `dtype`."""
    model = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode(PROMPT)
    model = model.float().eval()
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=num_new,
        do_sample=False,
        eos_token_id=list(tokenizer.eos_token_ids),
        pad_token_id=0,
    )
    with torch.inference_mode():
        found = model.generate(torch.tensor([ids]))[0, len(ids) :].tolist()
    return tokenizer.decode(found)


@needs_open_mpi
def test_every_command_of_the_guide(guide: dict, folder: Path, record_property: Record) -> None:
    models = folder / "tmp" / "llama"
    for command in BUILD_ONE_RANK + BUILD_RANKS:
        notes = guide[command].stderr.splitlines()
        assert len(notes) == 1 and notes[0].startswith("note: use_gpt_attention_plugin"), notes
    assert "max_seq_len 2560 exceeds the model's 512 positions" in guide[GUIDE[0]].stderr
    # The eighth build replaces the engine of the seventh.
    assert "replaced" not in guide[BUILD_RANKS[2]].stderr
    assert "replaced the engine that was in ./tmp/llama/70B/" in guide[BUILD_RANKS[3]].stderr
    for dtype, command in zip(("float16", "bfloat16"), RUN, strict=True):
        printed = guide[command].stdout
        assert printed.startswith(f'Input: "{PROMPT}"\nOutput: "')
        assert outputs(printed) == [reference_text(models / "7B", dtype, 50)]
    for command in SUMMARIZE_ONE_RANK + SUMMARIZE_RANKS:
        printed = guide[command]
        assert printed.stdout.startswith("Article: (CNN)") and "Summary (puna): " in printed.stdout
        assert "puna, samples: 20\n" in printed.stdout and "tokens/s" in printed.stdout
        assert all(value >= 0 for value in scores(printed.stdout).values())
        assert printed.stderr.count("\n") == 1 and "./cnn_dailymail/" in printed.stderr
        record_property(" ".join(command.split()[-1:]), scores(printed.stdout))
    record_property("commands", len(guide))
    assert "30B has no tokenizer: using tmp/llama/30B/hf" in guide[SUMMARIZE_RANKS[1]].stderr


@needs_open_mpi
def test_summaries_of_one_rank_and_of_two(guide: dict) -> None:
    one, two = (
        guide[SUMMARIZE_ONE_RANK[0]].stdout, guide[SUMMARIZE_RANKS[0]].stdout
    )  # fmt: skip
    assert scores(one) == scores(two)
    assert one.partition("puna, samples")[0] == two.partition("puna, samples")[0]


@needs_open_mpi
def test_meta_and_hugging_face_weights_make_the_same_engine(
    guide: dict, shell: Shell, folder: Path
) -> None:
    from_meta = folder / "tmp/llama/70B/trt_engines/fp16/8-gpu"
    shell(BUILD_RANKS[2].replace("8-gpu", "from-hf"))
    for rank in range(8):
        meta, hf = (
            load_file(path / f"rank{rank}.safetensors")
            for path in (from_meta, from_meta.with_name("from-hf"))
        )
        assert meta.keys() == hf.keys() and len(meta) > 10
        for name, array in meta.items():
            assert array.tobytes() == hf[name].tobytes(), name


@needs_open_mpi
def test_side_by_side_with_transformers(guide: dict, shell: Shell, record_property: Record) -> None:
    build = BUILD_7B.replace("float16", "float32")
    shell(f"{build} --output_dir {ENGINES}/fp32/1-gpu/")
    compare = SUMMARIZE.replace("fp16", "fp32") + f" --engine_dir {ENGINES}/fp32/1-gpu/ --max_ite 5"
    printed = shell(f"{compare} --test_hf").stdout
    record_property("engine", scores(printed))
    record_property("transformers", scores(printed, "transformers"))
    assert scores(printed) == scores(printed, "transformers")
    ours, theirs = re.findall(r"^Summary \(\w+\): (.*?)\n\n", printed, re.MULTILINE | re.DOTALL)
    assert ours == theirs
    alone = shell(f"{compare} --test_hf".replace("--test_trt_llm", "")).stdout
    assert scores(alone, "transformers") == scores(printed, "transformers")
    assert "puna, samples" not in alone


@needs_open_mpi
@pytest.mark.parametrize(("model_dir", "world_size"), [("7B/", 2), ("70B/hf/", 8), ("70B/hf/", 16)])
def test_text_of_several_ranks_is_that_of_one(
    model_dir: str, world_size: int, guide: dict, shell: Shell
) -> None:
    """tp 16 has each of the 8 KV heads twice; one process a rank writes each of them."""
    build = f"python build.py --model_dir ./tmp/llama/{model_dir} --dtype float32"
    run = f"run.py --max_output_len=24 --tokenizer_dir ./tmp/llama/{model_dir} --engine_dir ./many"
    shell(f"{build} --output_dir ./one")
    expected = shell(f"python {run.replace('many', 'one')}").stdout
    assert outputs(expected)[0]
    shell(f"{build} --output_dir ./many --world_size {world_size} --parallel_build")
    mpirun = f"mpirun -n {world_size} --allow-run-as-root"
    assert shell(f"{mpirun} python {run}").stdout == expected
    refused = shell(f"python {run}", status=2)
    assert f"Engine world size ({world_size}) != Runtime world size (1)" in refused.stderr


def test_without_a_checkpoint(shell: Shell) -> None:
    shape = "--n_layer 2 --n_embd 64 --n_head 4 --vocab_size 500"
    built = shell(f"python build.py {shape} --output_dir ./dummy --dtype float16")
    assert "dummy weights" in built.stderr and "the recipe of dummy weights" in built.stdout
    (Path(shell("pwd").stdout.strip()) / "ids.csv").write_text("5,6,7\n")
    found = shell("python run.py --max_output_len=8 --engine_dir ./dummy --input_tokens ids.csv")
    assert len(set(re.findall(r"\d+", outputs(found.stdout)[0]))) > 1  # random, not zeros


@pytest.fixture(scope="module")
def smollm2(folder: Path, smollm2_gguf: Path) -> Path:
    """SmolLM2 in the place of 7B."""
    path = folder / "tmp" / "llama" / "7B"
    path.rename(path.with_name("7B-stories"))
    write_smollm2(path, smollm2_gguf)
    return path


@pytest.mark.slow
def test_commands_of_one_rank_on_a_real_model(
    shell: Shell, smollm2: Path, record_property: Record
) -> None:
    for command in BUILD_ONE_RANK:
        shell(command)
    for dtype, command in zip(("float16", "bfloat16"), RUN, strict=True):
        assert outputs(shell(command).stdout) == [reference_text(smollm2, dtype, 50)]
    for command in SUMMARIZE_ONE_RANK:
        found = scores(shell(command).stdout)
        record_property(command.split()[-1], found)
        assert found["rouge1"] > 10
    shell(f"{SUMMARIZE_ONE_RANK[0]} --max_ite 4 --check_accuracy --tensorrt_llm_rouge1_threshold 1")
    failed = shell(
        f"{SUMMARIZE_ONE_RANK[0]} --max_ite 4 --check_accuracy --tensorrt_llm_rouge1_threshold 99",
        status=2,
    )
    assert "below the threshold 99" in failed.stderr
