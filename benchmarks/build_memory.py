"""How much memory a build takes: int8 from a random checkpoint of TinyLlama's shape (1.1B weights).

    python -m benchmarks.build_memory [--session] [--write]

Writes a 2.2 GB float16 checkpoint of two shards to a temporary folder, builds it with `puna build`
in a process of its own, and adds up the private memory (RssAnon + RssShmem) of that process and its
children every 20 ms. Compares the plan with the bytes on disk and, with --session, with the bytes
that a session then holds (6 GB of RAM). --write keeps the figures in results/build_memory.json.
Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import ROOT, about, write
from puna.checkpoint.dummy import parse_preset
from puna.checkpoint.hf import NAMES
from puna.spec import ModelSpec
from puna.weights import checkpoint_weights

PRESET = "tinyllama-1.1b"
INTERVAL = 0.02
LIMIT_BYTES = 700_000_000
_HF = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn.{}_proj",
    "mlp": "mlp.{}_proj",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of a canonical tensor.

    >>> hf_name("layers.3.attn.q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    top = {"embed.weight": "model.embed_tokens", "norm.weight": "model.norm"}
    if not name.startswith("layers."):
        return f"{top.get(name, 'lm_head')}.weight"
    _, layer, kind, *part, _ = name.split(".")
    found = f"model.layers.{layer}.{_HF[kind].format(*part)}.weight"
    assert NAMES.canonical(found) == name, found
    return found


def write_checkpoint(directory: Path, spec: ModelSpec, num_shards: int = 2) -> None:
    """A float16 Hugging Face checkpoint of near-normal weights: one random block, repeated."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_hf_config(spec)))
    block = (np.random.default_rng(0).standard_normal(2**20 + 7) * 0.02).astype("<f2")
    ones = np.ones(spec.hidden_size, "<f2").tobytes()
    weights = checkpoint_weights(spec)
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        mine = weights[shard::num_shards]
        header, end = {}, 0
        for weight in mine:
            size = 2 * int(np.prod(weight.shape))
            entry = {"dtype": "F16", "shape": weight.shape, "data_offsets": [end, end + size]}
            header[hf_name(weight.name)], end = entry, end + size
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for weight in mine:
                if not weight.is_matrix:
                    file.write(ones)
                    continue
                left = int(np.prod(weight.shape))
                while left:
                    file.write(block[:left].tobytes())
                    left -= min(left, block.size)
        weight_map |= dict.fromkeys(header, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _hf_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope.theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "torch_dtype": "float16",
    }


def private_bytes(pid: int) -> int:
    """RssAnon + RssShmem of a process and its descendants; processes that end meanwhile are 0."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(private_bytes, map(int, (task / "children").read_text().split())))
    except OSError:
        return total
    return total + 1024 * sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.M)))


def run_measured(arguments: list[str]) -> tuple[int, float, int]:
    """Run `python -m puna …`: peak private bytes, seconds, samples."""
    start, peak, samples = time.perf_counter(), 0, 0
    with subprocess.Popen(
        [sys.executable, "-m", "puna", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            peak, samples = max(peak, private_bytes(process.pid)), samples + 1
            time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"puna {' '.join(arguments)} ended with {process.returncode}")
    return peak, time.perf_counter() - start, samples


def measure(folder: Path, preset: str = PRESET, workers: int | None = None) -> dict[str, Any]:
    """Write the checkpoint into `folder`, build it there, and return the figures."""
    spec = parse_preset(preset)
    source, engine = folder / "checkpoint", folder / "engine"
    write_checkpoint(source, spec)
    arguments = [str(source), "--quant", "int8"]
    plan = subprocess.run(
        [sys.executable, "-m", "puna", "plan", *arguments, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    (planned,) = json.loads(plan.stdout)["ranks"]
    extra = [] if workers is None else ["--workers", str(workers)]
    peak, seconds, samples = run_measured(["build", *arguments, "-o", str(engine), *extra])
    return {
        "preset": preset,
        "checkpoint_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "peak_private_bytes": peak,
        "seconds": round(seconds, 1),
        "samples": samples,
        "planned": planned,
        "rank_file_bytes": (engine / "rank0.safetensors").stat().st_size,
    }


def session_memory(engine: Path) -> dict[str, Any]:
    """The bytes that a session of the engine holds, counted from its arrays, and those that the
    plan has for the session's device."""
    from puna.memory import rank_memory
    from puna.runtime.session import Session

    session = Session.open(engine)
    held = session.memory.to_json()
    planned = rank_memory(session.config, 0, session.device).to_json()
    session.close()
    return {"device": session.device, "held": held, "planned": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of a build.")
    parser.add_argument("--session", action="store_true", help="also open the engine: 6 GB of RAM")
    parser.add_argument("--workers", type=int, metavar="N", help="threads of the build")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="puna-build-memory-") as folder:
        figures = measure(Path(folder), workers=args.workers)
        if args.session:
            figures["session"] = session_memory(Path(folder) / "engine")
    record = {**figures, "limit_bytes": LIMIT_BYTES, **about("build_memory")}
    print(json.dumps(record, indent=2))
    if args.write:
        write("build_memory", record)


if __name__ == "__main__":
    main()
