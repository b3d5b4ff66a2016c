"""What the products of sm_90 for 65 to 128 tokens are compiled with (csrc/prompt_sm90.cu): those of
`puna.cuda.wide_plan` for a prompt, cut for more tokens beside each chunk of weights.

Pure, from `EngineConfig`.
"""

from __future__ import annotations

from puna.cuda.attend_plan import MAX_SHARED
from puna.cuda.fused_plan import KERNELS, layer_defines
from puna.cuda.shapes import fused_shapes
from puna.cuda.wide_plan import COLUMNS, PROMPT_TOKENS, Cut, cut, has_wide, variants
from puna.engine import EngineConfig

# Whether engines have them, for prompts and for batches of more than 64 sequences: not before they
# were measured.
IS_USED = False
NUM_WARPS = 12
REGISTERS = 168  # most of a thread
SHARED_BYTES = MAX_SHARED // 1024 * 1024  # of a CTA
# Mirrors of constants in the sources.
_ROW_BYTES, _GROUP_THREADS, _MAX_STAGES, _MOST_COLUMNS = COLUMNS * 2, 128, 32, 128


def has_prompt(config: EngineConfig) -> bool:
    """Whether prompts of up to 128 tokens, and decode batches, are done by these kernels and those
    of `puna.cuda.wide_plan`."""
    if not IS_USED or not has_wide(config) or config.limits.max_num_tokens <= variants(config)[-1]:
        return False
    kernels = [kernel for kernel in KERNELS if kernel != "head"]
    return all(
        num_stages(config, kernel) >= 3 and prompt_cut(config, kernel).half_rows <= _MOST_COLUMNS
        for kernel in kernels
    )


def most_tokens(config: EngineConfig) -> int:
    """That the kernels for several tokens are for, where there are some."""
    return PROMPT_TOKENS if has_prompt(config) else variants(config)[-1]


def prompt_cut(config: EngineConfig, kernel: str) -> Cut:
    """As `wide_plan.cut`. gate_up is done in one round, and qkv by pairs of CTAs: of twice as many
    rows the tokens are copied half as often."""
    it = cut(fused_shapes(config), config.spec.vocab_size, kernel, most_rows=128)
    if kernel != "qkv" or it.cluster == 2:
        return it
    return Cut(it.halves, it.unit, 2 * it.most, 2) if it.half_rows <= 64 else it


def num_stages(config: EngineConfig, kernel: str) -> int:
    """Of a ring."""
    it = prompt_cut(config, kernel)
    received = it.halves * it.half_rows // 8 * 16 * _GROUP_THREADS if it.cluster == 2 else 0
    barriers = (2 * _MAX_STAGES + 4) * 8
    ring = (SHARED_BYTES - received - barriers - PROMPT_TOKENS * 4) // 1024 * 1024
    return min(ring // ((PROMPT_TOKENS + it.halves * it.half_rows) * _ROW_BYTES), _MAX_STAGES)


def prompt_defines(config: EngineConfig) -> dict[str, int | str]:
    """Macros of the source."""
    cuts = {kernel: prompt_cut(config, kernel) for kernel in KERNELS}
    return {
        **layer_defines(config),
        "TOKENS": PROMPT_TOKENS,
        **{f"SHARED_{kernel}": SHARED_BYTES for kernel in KERNELS},
        **{f"STAGES_{kernel}": num_stages(config, kernel) for kernel in KERNELS},
        **{f"UNIT_{kernel}": it.unit for kernel, it in cuts.items()},
        **{f"MOST_{kernel}": it.most for kernel, it in cuts.items()},
        **{f"CLUSTER_{kernel}": it.cluster for kernel, it in cuts.items()},
        "REGISTERS_BESIDE": REGISTERS,
    }
