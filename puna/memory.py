"""The byte-exact memory plan of a rank, and what this machine has.

Every array that a session allocates is named here with its dtype and shape; the plan sums the same
table that the session allocates from, so the two cannot differ.

What a session allocates depends on its device: "cpu" computes with the weights as they are mapped,
"cuda" with the rank's file as it is, both with scratch arrays of their own; "reference" with a
float32 copy of the weights. A build plans for the device that its target is for.

Shape suffixes: T tokens in the step, S sequences, L rows wanted as logits, D hidden, H query heads
on this rank, K KV heads on this rank, E head_dim, Q = H * E, X = 2 * K * E, F ffn on this rank, V
vocab on this rank, N KV blocks, P block size, M blocks a sequence (most).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

import numpy as np

from puna.cuda_memory import cuda_specs
from puna.engine import EngineConfig, RankMemory
from puna.layout import COLS_MULTIPLE, ArraySpec
from puna.quant import KV_DTYPES
from puna.rank_file import rank_file, rank_weights
from puna.targets import TARGETS
from puna.weights import extent

Device = Literal["cpu", "reference", "cuda"]

FLOAT32 = np.dtype(np.float32)
INT32 = np.dtype(np.int32)
INT8 = np.dtype(np.int8)
UINT16 = np.dtype(np.uint16)

# The cpu device shares out a long context in parts of so many tokens.
CONTEXT_PART = 128


def kv_cache_specs(config: EngineConfig, rank: int, num_blocks: int) -> dict[str, ArraySpec]:
    """The KV cache of a rank: `kv_cache` [layers here, 2 (K, V), N, K, P, E] in kv_dtype, in which
    the keys of a block and KV head lie as [E, P], except on a GPU; for int8 `kv_scales` without the
    last axis."""
    spec, mapping = config.spec, config.mapping(rank)
    num_kv_heads = extent("kv_heads", spec.kv_size, spec, mapping).size // spec.head_dim
    num_layers = len(mapping.layers(spec.num_layers))
    tokens = (num_layers, 2, num_blocks, num_kv_heads, config.limits.block_size)
    specs = {"kv_cache": (KV_DTYPES[config.kv_dtype], (*tokens, spec.head_dim))}
    return {**specs, "kv_scales": (FLOAT32, tokens)} if config.kv_dtype == "int8" else specs


def kv_block_bytes(config: EngineConfig, rank: int) -> int:
    """Bytes of one KV block over all layers of the rank."""
    return _num_bytes(kv_cache_specs(config, rank, 1))


def workspace_specs(config: EngineConfig, rank: int, device: Device) -> dict[str, ArraySpec]:
    """Everything a session allocates beside the mapped weights and the KV cache."""
    own = {"cpu": _cpu_specs, "reference": _reference_specs, "cuda": cuda_specs}[device]
    return {**_step_specs(config, rank), **_rank_specs(config, rank), **own(config, rank)}


def planned_device(config: EngineConfig) -> Device:
    """The device that the engine's memory was planned for, by its target."""
    return "cuda" if TARGETS[config.target].is_gpu else "cpu"


def num_lanes(config: EngineConfig) -> int:
    """Batches under way at once, one for each pipeline stage where there are sequences enough."""
    return min(config.pp_size, config.limits.max_batch_size)


def _step_specs(config: EngineConfig, rank: int) -> dict[str, ArraySpec]:
    """What every device needs: a step's inputs, the stream, activations and logits."""
    spec, mapping, limits = config.spec, config.mapping(rank), config.limits
    num_tokens, num_seqs = limits.max_num_tokens, limits.max_batch_size
    max_blocks = -(-limits.max_seq_len // limits.block_size)
    q_size, ffn = _q_size(config, rank), _ffn(config, rank)
    vocab = extent("vocab", spec.vocab_size, spec, mapping, config.vocab_multiple).size
    rope = (FLOAT32, (limits.max_seq_len, spec.head_dim // 2))
    return {
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


def _rank_specs(config: EngineConfig, rank: int) -> dict[str, ArraySpec]:
    """What one of several ranks needs to exchange partial sums, logits and the stream."""
    spec, mapping, limits = config.spec, config.mapping(rank), config.limits
    num_tokens, num_seqs, tp_size = limits.max_num_tokens, limits.max_batch_size, config.tp_size
    stream = (num_tokens, spec.hidden_size)
    specs: dict[str, ArraySpec] = {}
    if tp_size > 1:
        vocab = extent("vocab", spec.vocab_size, spec, mapping, config.vocab_multiple).size
        largest = max(num_tokens * spec.hidden_size, num_seqs * vocab)
        specs["gathered"] = (FLOAT32, (tp_size * largest,))
        if mapping.is_last_stage:
            specs["head_residual_LD"] = specs["head_partial_LD"] = (
                FLOAT32,
                (num_seqs, spec.hidden_size),
            )
            specs["joined_logits_LV"] = (FLOAT32, (num_seqs, tp_size * vocab))
    if not mapping.is_last_stage:
        specs["sent_residual_TD"] = specs["sent_partial_TD"] = (
            FLOAT32,
            (num_lanes(config), *stream),
        )
    return specs


def first_token_id(config: EngineConfig, rank: int) -> int:
    """The token id of the rank's first row of the embedding."""
    spec, mapping = config.spec, config.mapping(rank)
    return extent("vocab", spec.vocab_size, spec, mapping, config.vocab_multiple).start


def _reference_specs(config: EngineConfig, rank: int) -> dict[str, ArraySpec]:
    """Every matrix unpacked: four bytes a weight, the price of plain NumPy matrix products."""
    return {
        f"unpacked.{weight.name}": (FLOAT32, weight.shape)
        for weight in rank_weights(config, rank)
        if weight.weight.is_matrix
    }


def _cpu_specs(config: EngineConfig, rank: int) -> dict[str, ArraySpec]:
    spec, limits = config.spec, config.limits
    q_size = _q_size(config, rank)
    kv_size = extent("kv_heads", spec.kv_size, spec, config.mapping(rank)).size
    return cpu_scratch_specs(
        num_tokens=limits.max_num_tokens,
        num_seqs=limits.max_batch_size,
        max_seq_len=limits.max_seq_len,
        num_inputs=max(spec.hidden_size, q_size, _ffn(config, rank)),
        num_heads=q_size // spec.head_dim,
        num_kv_heads=kv_size // spec.head_dim,
        head_dim=spec.head_dim,
    )


def cpu_scratch_specs(
    *,
    num_tokens: int,
    num_seqs: int,
    max_seq_len: int,
    num_inputs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> dict[str, ArraySpec]:
    """What the cpu device writes between the phases of an operation, at the most of each.

    `act_*` hold the inputs of one product, `num_inputs` being the most that any has. Quantised
    inputs come in two forms, in blocks of 32 or of 16 columns: their int8 numbers, and three
    numbers of four bytes about them. `attn_part` is [S, parts of the context, H, E + 2].
    """
    num_inputs = -(-num_inputs // COLS_MULTIPLE) * COLS_MULTIPLE
    num_parts = -(-max_seq_len // CONTEXT_PART)
    return {
        "kv_TX": (FLOAT32, (num_tokens, 2 * num_kv_heads * head_dim)),
        "attended_TQ": (FLOAT32, (num_tokens, num_heads * head_dim)),
        "act_float_TK": (FLOAT32, (num_tokens, num_inputs)),
        "act_bf16_TK": (UINT16, (num_tokens, num_inputs)),
        "act_q32_TX": (INT8, (num_tokens, num_inputs // 32 * (32 + 12))),
        "act_q16_TX": (INT8, (num_tokens, num_inputs // 16 * (16 + 12))),
        "attn_part": (FLOAT32, (num_seqs, num_parts, num_heads, head_dim + 2)),
    }


def _q_size(config: EngineConfig, rank: int) -> int:
    return extent("heads", config.spec.q_size, config.spec, config.mapping(rank)).size


def _ffn(config: EngineConfig, rank: int) -> int:
    size, mapping = config.spec.intermediate_size, config.mapping(rank)
    return extent("ffn", size, config.spec, mapping, config.ffn_multiple).size


def rank_memory(config: EngineConfig, rank: int, device: Device) -> RankMemory:
    """Bytes the rank needs: its file as mapped, its KV cache, its workspace."""
    no_digest = "0" * 64
    return RankMemory(
        weights=rank_file(config, rank, no_digest).num_bytes,
        kv_cache=_num_bytes(kv_cache_specs(config, rank, config.limits.num_blocks)),
        workspace=_num_bytes(workspace_specs(config, rank, device)),
    )


def _num_bytes(specs: dict[str, ArraySpec]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


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
