"""limits: how much of an engine's plan a run takes, of sequences, tokens and memory.

Decides what a user may lower, and refuses what this machine has no RAM for. Allocates nothing.
"""

from __future__ import annotations

from dataclasses import replace

from puna.engine import EngineConfig
from puna.errors import EngineError
from puna.memory import Device, available_bytes, human_bytes, kv_block_bytes, rank_memory

# Beside what is planned, of a GPU's memory: code of kernels, graphs, and what cuBLAS works in.
GPU_RESERVE_BYTES = 400 * 2**20


def lower_limits(
    config: EngineConfig, max_batch_size: int | None, max_num_tokens: int | None
) -> EngineConfig:
    """The engine with lower limits; EngineError for higher ones. None leaves a limit as it is."""
    limits = config.limits
    asked = {"max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens}
    for name, value in asked.items():
        most = getattr(limits, name)
        if value is None:
            continue
        if not 1 <= value <= most:
            raise EngineError(
                f"{name} {value} is not between 1 and the engine's {most}: lower it, or build with "
                f"a larger --{name.replace('_', '-')}"
            )
    batch = max_batch_size or limits.max_batch_size
    if max_num_tokens is not None and max_batch_size is None:
        batch = min(batch, max_num_tokens)
    num_tokens = max_num_tokens or limits.max_num_tokens
    return replace(config, limits=replace(limits, max_batch_size=batch, max_num_tokens=num_tokens))


def num_kv_blocks(config: EngineConfig, kv_cache_bytes: int | None) -> int:
    """KV blocks of `kv_cache_bytes` a rank: on all ranks what the one with most layers can have."""
    if kv_cache_bytes is None:
        return config.limits.num_blocks
    block = max(kv_block_bytes(config, rank) for rank in range(config.world_size))
    if kv_cache_bytes < 2 * block:
        raise EngineError(
            f"kv_cache_bytes {kv_cache_bytes} is too small: {config.limits.block_size} tokens take "
            f"{block} bytes, and two such blocks are the least"
        )
    return kv_cache_bytes // block


def check_gpu_memory(
    config: EngineConfig, rank: int, num_blocks: int, gpu: str, free_bytes: int
) -> None:
    """Refuse now what would not fit the GPU's memory, of which `free_bytes` are free."""
    memory = rank_memory(config, rank, "cuda")
    block = kv_block_bytes(config, rank)
    kv_cache = num_blocks * block
    needed = memory.weights + kv_cache + memory.workspace + GPU_RESERVE_BYTES
    if needed <= free_bytes:
        return
    found = (
        f"the engine needs {human_bytes(needed)} of {gpu}'s memory ({human_bytes(memory.weights)} "
        f"weights, {human_bytes(kv_cache)} KV cache, {human_bytes(memory.workspace)} workspace, "
        f"{human_bytes(GPU_RESERVE_BYTES)} libraries and graphs), {human_bytes(free_bytes)} are "
        "free: "
    )
    room = free_bytes - (needed - kv_cache)
    limits = config.limits
    if room >= 2 * block:
        tokens = (room // block - 1) * limits.block_size
        raise EngineError(
            f"{found}lower --kv-cache-bytes to {room // block * block} or less "
            f"({tokens:,} tokens instead of {(num_blocks - 1) * limits.block_size:,})"
        )
    raise EngineError(
        f"{found}use a GPU with more memory, end what else uses this one, or build with a smaller "
        "--max-num-tokens or --max-batch-size"
    )


def check_ram(config: EngineConfig, rank: int, device: Device, num_blocks: int) -> None:
    """Refuse now what would be killed later. Mapped weights can be dropped by the system, so they
    do not count; generated ones do."""
    memory = rank_memory(config, rank, device)
    kv_cache = num_blocks * kv_block_bytes(config, rank)
    needed = memory.workspace + kv_cache + (memory.weights if config.dummy else 0)
    available = available_bytes()
    if available is not None and needed > available:
        raise EngineError(
            f"the engine needs {human_bytes(needed)} of RAM ({human_bytes(kv_cache)} of it KV "
            f"cache), {human_bytes(available)} are free: lower --kv-cache-bytes, or build with a "
            "smaller --max-seq-len, --max-batch-size or --quant"
        )
