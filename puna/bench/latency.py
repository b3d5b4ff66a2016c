"""Latency: how long a batch of prompts waits for its first token, and for each one after it.

Drives the executor step by step, so that a step's time has everything in it that a user waits for:
scheduling, lowering, the model, sampling. Decides what is measured and how it relates to the bytes
that a step has to read; prints nothing, and needs no tokenizer.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

from puna.engine import EngineConfig
from puna.errors import ConfigError
from puna.llm import LLM
from puna.memory import available_bytes, kv_block_bytes
from puna.native.bandwidth import BUFFER_BYTES, read_bandwidth
from puna.rank_file import rank_weights
from puna.runtime.executor import Executor
from puna.runtime.launch import World, on_every_cpu
from puna.runtime.ranks import RankedSession
from puna.runtime.request import SamplingParams
from puna.runtime.session import Session

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LatencyRun:
    """What to measure: `batch` prompts of `isl` tokens each, `osl` new tokens each, `rounds`
    times."""

    batch: int = 1
    isl: int = 128
    osl: int = 128
    rounds: int = 5

    def __post_init__(self) -> None:
        # The prompt gives the first new token; a decode step needs another one.
        for name, least in {"batch": 1, "isl": 1, "osl": 2, "rounds": 1}.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}: raise it")


@dataclass(frozen=True)
class LatencyResult:
    """One measurement. docs/benchmarks.md says what each figure means."""

    engine: str
    device: str
    threads: int  # of each rank
    ranks: int
    batch: int
    isl: int
    osl: int
    rounds: int
    ttft_ms: float
    prefill_tok_s: float
    decode_ms: float
    tok_s: float
    weight_bytes: int  # a decode step, all ranks
    kv_bytes: int  # a decode step, at the middle of the output, all ranks
    gb_s: float  # of the two above
    read_gb_s: float  # best of 5 after each round, the median of those
    roofline: float


def check_run(run: LatencyRun, config: EngineConfig) -> None:
    """Raise ConfigError if the engine can never do the run; known before it is loaded."""
    limits = config.limits
    if run.isl + run.osl > limits.max_seq_len:
        raise ConfigError(
            f"isl {run.isl} + osl {run.osl} is {run.isl + run.osl} tokens; the engine takes at "
            f"most {limits.max_seq_len}: lower them, or build with a larger --max-seq-len"
        )
    if run.batch > limits.max_batch_size:
        raise ConfigError(
            f"batch is {run.batch}; the engine takes at most {limits.max_batch_size} sequences: "
            "lower it, or build with a larger --max-batch-size"
        )


def measure_latency(llm: LLM, run: LatencyRun, progress: Progress | None = None) -> LatencyResult:
    """Measure on an LLM opened with `prefix_cache=False`, after one round that does not count.

    `progress` is told the new tokens of a sequence so far and in all, rounds added up.
    """
    session = llm.session
    assert session is not None, "the LLM is closed"
    config = session.config
    check_run(run, config)
    _check_kv_cache(run, llm.executor)
    total = (1 + run.rounds) * run.osl
    rng = random.Random(0)  # other tokens every round, the same ones in every run
    first_s: list[float] = []
    decode_s: list[float] = []
    reads: list[float] = []
    for i in range(1 + run.rounds):

        def report(num_tokens: int, done: int = i * run.osl) -> None:
            if progress:
                progress(done + num_tokens, total)

        prompts = [
            [rng.randrange(config.spec.vocab_size) for _ in range(run.isl)]
            for _ in range(run.batch)
        ]
        first, decode = run_round(llm.executor, prompts, run.osl, report)
        if not decode:
            raise ConfigError(
                f"osl {run.osl} ends the first of {run.batch} sequences before the last one has "
                "read its prompt, so they never decode together: raise osl"
            )
        if i > 0:
            first_s.append(first)
            decode_s += decode
            # After each round: on a shared machine the limit itself comes and goes.
            reads.append(_read_limit(llm.world, session))

    ttft_s, step_s = median(first_s), median(decode_s)
    weight_bytes, kv_bytes = step_weight_bytes(config), step_kv_bytes(config, run)
    gb_s = (weight_bytes + kv_bytes) / step_s / 1e9
    read_gb_s = median(reads)
    return LatencyResult(
        engine=str(session.engine_dir),
        device=session.device_name,
        threads=session.threads,
        ranks=config.world_size,
        **asdict(run),
        ttft_ms=ttft_s * 1000,
        prefill_tok_s=run.batch * run.isl / ttft_s,
        decode_ms=step_s * 1000,
        tok_s=run.batch / step_s,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        gb_s=gb_s,
        read_gb_s=read_gb_s,
        roofline=gb_s / read_gb_s,
    )


def step_weight_bytes(config: EngineConfig) -> int:
    """Bytes of stored weights that a decode step reads on all ranks: all but an embedding that is
    no head there, of which it reads a row a sequence, too few to count."""
    is_tied = config.spec.tie_word_embeddings
    return sum(
        dtype.itemsize * math.prod(shape)
        for rank in range(config.world_size)
        for weight in rank_weights(config, rank)
        if weight.name != "embed.weight" or (is_tied and config.mapping(rank).is_last_stage)
        for dtype, shape in weight.array_specs().values()
    )


def step_kv_bytes(config: EngineConfig, run: LatencyRun) -> int:
    """Bytes of KV cache that a decode step reads on all ranks in the middle of the output."""
    num_tokens = run.batch * (run.isl + run.osl / 2)
    block_bytes = sum(kv_block_bytes(config, rank) for rank in range(config.world_size))
    return round(num_tokens * block_bytes / config.limits.block_size)


def _read_limit(world: World, session: Session | RankedSession) -> float:
    """GB/s that the GPU can read, or the hosts of all ranks: this host, with as many threads as its
    ranks have together, times the hosts, which are taken to be alike."""
    if session.device == "cuda":
        from puna.runtime.cuda_bandwidth import gpu_read_bandwidth  # which needs torch

        return gpu_read_bandwidth(session.device_name, session.engine_dir)
    threads = session.threads
    num_bytes = min(BUFFER_BYTES, (available_bytes() or 2 * BUFFER_BYTES) // 2)
    if world.size == 1:
        return read_bandwidth(threads, num_bytes)
    with on_every_cpu():  # the other ranks are waiting for a step
        here = read_bandwidth(threads * world.local_size, num_bytes)
    return here * world.size / world.local_size


def _check_kv_cache(run: LatencyRun, executor: Executor) -> None:
    """All sequences must fit at once: one that waits for another's blocks would be timed too."""
    pool = executor.scheduler.pool
    needed = run.batch * pool.blocks_for(run.isl + run.osl - 1)
    if needed > pool.num_usable:
        raise ConfigError(
            f"the KV cache has {pool.num_usable} blocks of {pool.block_size} tokens; batch "
            f"{run.batch} with isl {run.isl} and osl {run.osl} needs {needed}: lower them, or "
            "raise --kv-cache-bytes"
        )


def run_round(
    executor: Executor, prompts: list[list[int]], osl: int, report: Callable[[int], None]
) -> tuple[float, list[float]]:
    """Seconds to the first token of all prompts, and of each step in which all of them decode.

    `report` is told the new tokens of the first sequence so far.
    """
    # Greedy, without the engine's own penalties and filters: what is measured is the model.
    params = SamplingParams(
        max_new_tokens=osl, temperature=0.0, repetition_penalty=1.0, ignore_eos=True
    )
    start = time.perf_counter()
    sequences = [executor.add_request(prompt, params).sequences[0] for prompt in prompts]
    while not all(seq.is_decoding for seq in sequences):
        executor.step()
    first_s = time.perf_counter() - start

    decode_s: list[float] = []
    while all(seq.status == "running" for seq in sequences):
        start = time.perf_counter()
        executor.step()
        decode_s.append(time.perf_counter() - start)
        report(len(sequences[0].generated_token_ids))
    while not executor.is_idle:
        executor.step()
    report(osl)
    return first_s, decode_s
