"""How fast a GPU reads its memory: the ceiling of whatever reads all weights for each token."""

from __future__ import annotations

from pathlib import Path

import torch

from puna.cuda.driver import Driver
from puna.cuda.library import Library, read_kernels
from puna.errors import ConfigError

# Far beyond the L2 cache of any GPU, so that each round reads memory.
BUFFER_BYTES = 4 * 2**30
LEAST_BYTES = 2**29
NUM_ROUNDS = 5
_BLOCKS = 2  # of threads, on each multiprocessor


def gpu_read_bandwidth(device_name: str, engine_dir: Path, num_bytes: int = BUFFER_BYTES) -> float:
    """Read bandwidth of a GPU ("cuda:0") in GB/s, by the engine's kernel for it: one pass over a
    buffer, the best of several rounds.

    Where `num_bytes` are not free, of less. ConfigError if little is free.
    """
    device = torch.device(device_name)
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    num_bytes = min(num_bytes, free_bytes * 9 // 10)
    if num_bytes < LEAST_BYTES:
        raise ConfigError(
            f"the read bandwidth needs a buffer of {LEAST_BYTES:,} bytes on the GPU, of which "
            f"{free_bytes:,} are free: lower --kv-cache-bytes"
        )
    best = 0.0
    with torch.cuda.device(device):
        library = Library(
            read_kernels(engine_dir), Driver(), lambda: torch.cuda.current_stream().cuda_stream
        )
        num_blocks = _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count
        words = torch.zeros(num_bytes // 16 * 4, dtype=torch.int32, device=device)
        unused = torch.zeros(1, dtype=torch.int32, device=device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(1 + NUM_ROUNDS):  # the first one loads the kernel
            start.record()
            arguments = (words, len(words) // 4, unused)
            library.launch("read_only", (num_blocks, 1, 1), arguments, False)
            end.record()
            end.synchronize()
            best = max(best, words.nbytes / (start.elapsed_time(end) * 1e-3))
        del words, unused
        torch.cuda.empty_cache()
    return best / 1e9
