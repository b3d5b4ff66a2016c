"""What the cuda device writes beside the arrays that every device has, for the memory plan.

Some names are those of `puna.memory`: on a GPU what feeds a matrix product has the engine's dtype,
and so has `partial_TD`. Knows sizes, not what is computed in them.

Shape suffixes as in `puna.memory`; R rows of the lowering's mirror, Qp, Fp ... = rows of a stored
matrix (rounded up to 16), C chunks of the vocabulary, B parts of a context.
"""

from __future__ import annotations

import numpy as np

from puna.cuda.attend_plan import attend_pieces
from puna.cuda.fused_plan import MAX_SPLITS, has_fused
from puna.cuda.gemm_shapes import num_splits
from puna.cuda.shapes import fused_shapes
from puna.cuda.wide_plan import has_wide, variants
from puna.engine import EngineConfig
from puna.layout import ArraySpec
from puna.quant import DTYPES
from puna.weights import extent

FLOAT32 = np.dtype(np.float32)
INT32 = np.dtype(np.int32)

# Rows and columns of a stored matrix are padded to multiples of these.
ROWS_MULTIPLE = 16
COLS_MULTIPLE = 64
ARGMAX_CHUNK = 2048  # numbers of the vocabulary that one program of argmax looks at
MAX_MULTIPROCESSORS = 256  # of a GPU, more than any has
MAX_PARTS = 32  # a long context is shared out in at most so many parts
PART_ROWS = 64  # most tokens of a product that leaves its parts to the consumer


def padded_rows(num_rows: int) -> int:
    return -(-num_rows // ROWS_MULTIPLE) * ROWS_MULTIPLE


def padded_cols(num_cols: int) -> int:
    return -(-num_cols // COLS_MULTIPLE) * COLS_MULTIPLE


def product_splits(config: EngineConfig) -> tuple[int, int]:
    """Into how many stretches the products of qkv, and those of o and down, are cut."""
    spec, mapping, target = config.spec, config.mapping(0), config.target
    q_size = extent("heads", spec.q_size, spec, mapping).size
    kv_size = extent("kv_heads", spec.kv_size, spec, mapping).size
    ffn = extent("ffn", spec.intermediate_size, spec, mapping, config.ffn_multiple).size
    qkv_rows = padded_rows(q_size) + 2 * padded_rows(kv_size)
    return (
        num_splits(target, qkv_rows, (padded_cols(spec.hidden_size),)),
        num_splits(target, spec.hidden_size, (padded_cols(q_size), padded_cols(ffn))),
    )


def cuda_specs(config: EngineConfig, rank: int) -> dict[str, ArraySpec]:
    """dtype and shape of each array, by name; takes precedence over what all devices have.
    `zeros_N` stays as it begins."""
    spec, mapping, limits = config.spec, config.mapping(rank), config.limits
    dtype = DTYPES[config.dtype]
    num_tokens, num_seqs = limits.max_num_tokens, limits.max_batch_size
    q_size = extent("heads", spec.q_size, spec, mapping).size
    kv_size = extent("kv_heads", spec.kv_size, spec, mapping).size
    ffn = extent("ffn", spec.intermediate_size, spec, mapping, config.ffn_multiple).size
    vocab = extent("vocab", spec.vocab_size, spec, mapping, config.vocab_multiple).size
    num_heads = q_size // spec.head_dim
    qkv_rows = padded_rows(q_size) + 2 * padded_rows(kv_size)
    num_chunks = -(-vocab // ARGMAX_CHUNK)
    qkv_splits, splits = product_splits(config)
    largest = max(qkv_splits * qkv_rows, splits * spec.hidden_size)
    return {
        "partial_TD": (dtype, (num_tokens, spec.hidden_size)),
        "q_TQ": (dtype, (num_tokens, q_size)),
        "act_TF": (dtype, (num_tokens, ffn)),
        "normed_TD": (dtype, (num_tokens, spec.hidden_size)),
        "qkv_TX": (dtype, (num_tokens, qkv_rows)),
        "attended_TQ": (dtype, (num_tokens, q_size)),
        "gate_up_TX": (dtype, (num_tokens, 2 * padded_rows(ffn))),
        "zeros_N": (dtype, (max(qkv_rows, 2 * padded_rows(ffn), spec.hidden_size),)),
        "product_parts": (FLOAT32, (PART_ROWS * largest,)),
        "attn_part_SBHE": (FLOAT32, (num_seqs, MAX_PARTS, num_heads, spec.head_dim)),
        "attn_scale_SBH2": (FLOAT32, (num_seqs, MAX_PARTS, num_heads, 2)),
        "argmax_value_LC": (FLOAT32, (num_seqs, num_chunks)),
        "argmax_index_LC": (INT32, (num_seqs, num_chunks)),
        "last_tokens_R": (INT32, (num_seqs,)),
        **_fused_specs(config),
        **_attend_specs(config),
    }


def _fused_specs(config: EngineConfig) -> dict[str, ArraySpec]:
    """Scratch of the fused kernels, where the engine has them; all of it begins as zeros."""
    has_one, has_several = has_fused(config), has_wide(config)
    if not has_one and not has_several:
        return {}
    s = fused_shapes(config)
    all_heads = s.num_heads + 2 * s.num_kv_heads
    split = (s.num_kv_heads, MAX_SPLITS, s.group, s.head_dim + 2)
    of_one = {
        "fused_part": (FLOAT32, split),
        "fused_fresh": (INT32, (all_heads, s.head_dim // 2, 2)),
        "fused_split_count": (INT32, (s.num_kv_heads,)),
    }
    rows = variants(config)[-1] if has_several else 1
    of_several = {
        "fused_next": (DTYPES[config.dtype], (rows, s.hidden)),
        "fused_sums": (FLOAT32, (MAX_MULTIPROCESSORS, rows)),
    }
    return {
        **(of_one if has_one else {}),
        **(of_several if has_several else {}),
        "fused_best": (FLOAT32, (MAX_MULTIPROCESSORS, rows, 2)),
        "fused_epoch": (INT32, (4,)),
        "fused_error": (INT32, (4,)),
    }


def _attend_specs(config: EngineConfig) -> dict[str, ArraySpec]:
    """Scratch of decode attention as a kernel of the target's own; it begins as zeros."""
    if not has_wide(config):
        return {}
    return {
        "attend_pieces": (FLOAT32, attend_pieces(config, MAX_MULTIPROCESSORS)),
        "attend_counts": (INT32, (MAX_MULTIPROCESSORS,)),
    }
