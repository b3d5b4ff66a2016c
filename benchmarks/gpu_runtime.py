"""What the runtime adds to the GPU's work: opening an engine, and Python's share of a step.

    python -m benchmarks.gpu_runtime [--preset llama-2-7b] [--dtype float16] [--stored DIR]

Builds a dummy engine for this machine's GPU, opens it in parts that are timed one by one, and runs
a model of two narrow layers, whose steps take the GPU next to no time. With --stored, an engine of
the same shape with its weights is written below DIR and read back. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from puna import LLM, BuildConfig, SamplingParams, build
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.memory import rank_memory
from puna.runtime import cuda_runner
from puna.runtime.cuda_bandwidth import gpu_read_bandwidth
from puna.runtime.cuda_runner import CudaRunner

NARROW = "hidden=128,layers=2,heads=2,head_dim=64,ffn=256,vocab=512,max_positions=2048"


class Stopwatch:
    """Seconds of each method of CudaRunner that is called while the engine is opened."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, owner: object, name: str, label: str) -> None:
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            torch.cuda.synchronize()
            start = time.perf_counter()
            found = method(*args, **kwargs)
            torch.cuda.synchronize()
            self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start
            return found

        setattr(owner, name, timed)


def opened(path: Path) -> dict[str, float]:
    """Open an engine and take its first token."""
    start = time.perf_counter()
    with LLM(path) as llm:
        open_s = time.perf_counter() - start
        llm.generate([[1, 2, 3]], SamplingParams(1, temperature=0.0))
        return {
            "open_s": open_s,
            "first_token_s": time.perf_counter() - start,
            "planned_bytes": rank_memory(llm.config, 0, "cuda").total,
            "allocated_bytes": torch.cuda.memory_allocated(),
        }


def host_us(path: Path, batch: int) -> dict[str, float]:
    """Median microseconds of a decode step whose kernels take next to none of them."""
    with LLM(path, prefix_cache=False) as llm:
        executor = llm.executor
        params = SamplingParams(400, temperature=0.0, ignore_eos=True)
        for i in range(batch):
            executor.add_request([1 + i, 2, 3], params)
        seconds = []
        while not executor.is_idle:
            start = time.perf_counter()
            executor.step()
            seconds.append(time.perf_counter() - start)
    return {f"step_us_batch_{batch}": median(seconds) * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-2-7b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--stored", type=Path)
    args = parser.parse_args()

    major, minor = torch.cuda.get_device_capability()
    config = BuildConfig(dtype=args.dtype, target=f"sm_{major}{minor}")
    found: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "preset": args.preset}
    with tempfile.TemporaryDirectory(dir=args.stored) as folder:
        start = time.perf_counter()
        checkpoint = DummyCheckpoint(parse_preset(args.preset))
        path = build(checkpoint, Path(folder) / "dummy", config).path
        found["build_s"] = time.perf_counter() - start
        found["dummy"] = opened(path)
        watch = Stopwatch()
        watch.time(cuda_runner, "generate_weights_on", "generate")
        watch.time(cuda_runner, "_allocate", "allocate")
        watch.time(cuda_runner, "Library", "load_kernels")
        watch.time(CudaRunner, "_record_common", "record_common")
        opened(path)
        found["dummy_parts_s"] = watch.seconds
        if args.stored:
            stored = build(checkpoint, Path(folder) / "stored", config, materialize=True).path
            found["stored"] = opened(stored)
            found["stored_bytes"] = (stored / "rank0.safetensors").stat().st_size
        narrow = build(DummyCheckpoint(parse_preset(NARROW)), Path(folder) / "narrow", config).path
        for batch in (1, 8, 64):
            found |= host_us(narrow, batch)
        found["read_gb_s"] = gpu_read_bandwidth("cuda:0", narrow)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
