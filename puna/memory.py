"""The byte-exact memory plan of a rank, and what this machine has.

Every array that a session allocates is named here with its dtype and shape; the plan sums the same
table that the session allocates from, so the two cannot differ.

Shape suffixes: T tokens in the step, S sequences, L rows wanted as logits, D hidden, H query heads
on this rank, K KV heads on this rank, E head_dim, F ffn on this rank, V vocab on this rank, N KV
blocks, P block size, M blocks a sequence (most).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from puna.engine import EngineConfig, RankMemory
from puna.layout import ArraySpec
from puna.quant import DTYPES
from puna.rank_file import rank_file, rank_weights
from puna.weights import extent

FLOAT32 = np.dtype(np.float32)
INT32 = np.dtype(np.int32)


def kv_cache_spec(config: EngineConfig, rank: int, num_blocks: int) -> ArraySpec:
    """The KV cache of a rank: [layers here, 2 (K, V), N, P, K, E] in kv_dtype."""
    spec, mapping = config.spec, config.mapping(rank)
    num_kv_heads = extent("kv_heads", spec.kv_size, spec, mapping).size // spec.head_dim
    num_layers = len(mapping.layers(spec.num_layers))
    block = (config.limits.block_size, num_kv_heads, spec.head_dim)
    return DTYPES[config.kv_dtype], (num_layers, 2, num_blocks, *block)


def kv_block_bytes(config: EngineConfig, rank: int) -> int:
    """Bytes of one KV block over all layers of the rank."""
    return _num_bytes(kv_cache_spec(config, rank, 1))


def workspace_specs(config: EngineConfig, rank: int) -> dict[str, ArraySpec]:
    """Everything a session allocates beside the mapped weights and the KV cache.

    The reference ops keep every matrix unpacked to float32 as well (`unpacked.*`): four bytes a
    weight, the price of plain NumPy matrix products.
    """
    spec, mapping, limits = config.spec, config.mapping(rank), config.limits
    num_tokens, num_seqs = limits.max_num_tokens, limits.max_batch_size
    max_blocks = -(-limits.max_seq_len // limits.block_size)
    q_size = extent("heads", spec.q_size, spec, mapping).size
    ffn = extent("ffn", spec.intermediate_size, spec, mapping, config.ffn_multiple).size
    vocab = extent("vocab", spec.vocab_size, spec, mapping, config.vocab_multiple).size
    rope = (FLOAT32, (limits.max_seq_len, spec.head_dim // 2))
    specs: dict[str, ArraySpec] = {
        "token_ids_T": (INT32, (num_tokens,)),
        "positions_T": (INT32, (num_tokens,)),
        "slots_T": (INT32, (num_tokens,)),
        "query_start_S1": (INT32, (num_seqs + 1,)),
        "seq_lens_S": (INT32, (num_seqs,)),
        "block_table_SM": (INT32, (num_seqs, max_blocks)),
        "logits_rows_L": (INT32, (num_seqs,)),
        "rope_cos_PE": rope,
        "rope_sin_PE": rope,
        "residual_TD": (FLOAT32, (num_tokens, spec.hidden_size)),
        "partial_TD": (FLOAT32, (num_tokens, spec.hidden_size)),
        "q_TQ": (FLOAT32, (num_tokens, q_size)),
        "act_TF": (FLOAT32, (num_tokens, ffn)),
        "logits_LV": (FLOAT32, (num_seqs, vocab)),
    }
    for weight in rank_weights(config, rank):
        if weight.weight.is_matrix:
            specs[f"unpacked.{weight.name}"] = (FLOAT32, weight.shape)
    return specs


def rank_memory(config: EngineConfig, rank: int) -> RankMemory:
    """Bytes the rank needs: its file as mapped, its KV cache, its workspace."""
    no_digest = "0" * 64
    return RankMemory(
        weights=rank_file(config, rank, no_digest).num_bytes,
        kv_cache=_num_bytes(kv_cache_spec(config, rank, config.limits.num_blocks)),
        workspace=sum(map(_num_bytes, workspace_specs(config, rank).values())),
    )


def _num_bytes(spec: ArraySpec) -> int:
    dtype, shape = spec
    return dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))


def available_bytes() -> int | None:
    """RAM that can still be had, within this process's cgroup; None where the system does not
    say."""
    found = []
    meminfo = _read(Path("/proc/meminfo"))
    if match := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE):
        found.append(int(match[1]) * 1024)
    limit, used = (_read(Path(f"/sys/fs/cgroup/memory.{name}")) for name in ("max", "current"))
    if limit.strip().isdigit() and used.strip().isdigit():
        found.append(max(int(limit) - int(used), 0))
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def human_bytes(num_bytes: int) -> str:
    """1.23 GB: decimal units, as disks and model cards count."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
