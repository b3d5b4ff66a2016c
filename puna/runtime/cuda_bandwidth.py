"""How fast a GPU reads its memory: the ceiling of whatever reads all weights for each token."""

from __future__ import annotations

import torch

from puna.errors import ConfigError

# Far beyond the L2 cache of any GPU, so that each round reads memory.
BUFFER_BYTES = 4 * 2**30
LEAST_BYTES = 2**29
NUM_ROUNDS = 5
_COLUMNS = (
    16384  # summed at a time: rows enough for all multiprocessors, long enough to be read well
)


def gpu_read_bandwidth(device_name: str, num_bytes: int = BUFFER_BYTES) -> float:
    """Read bandwidth of a GPU ("cuda:0") in GB/s: sums over a buffer, the best of several rounds.

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
    rows = num_bytes // (4 * _COLUMNS)
    words = torch.zeros((rows, _COLUMNS), dtype=torch.float32, device=device)
    sums = torch.empty(rows, dtype=torch.float32, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = 0.0
    with torch.cuda.device(device):
        for _ in range(1 + NUM_ROUNDS):  # the first one loads the kernel
            start.record()
            torch.sum(words, dim=1, out=sums)
            end.record()
            end.synchronize()
            best = max(best, words.nbytes / (start.elapsed_time(end) * 1e-3))
    del words, sums
    torch.cuda.empty_cache()
    return best / 1e9
