"""The wire between the executor and its sessions: StepPlan goes down, StepResult comes back.

A StepPlan is a delta. Every session mirrors the sequences (see `puna.runtime.lower`) and a plan
says only what changed. It never carries the token that a running sequence sampled, because each
session has it already: step n + 1 can be planned, and sent to other ranks, while step n runs.
Beams are the exception: which beam takes which token is for the scheduler to decide, so the plan
says it, and what was sampled for a beam is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.runtime.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Join:
    """A sequence enters, new or again after it was preempted.

    `token_ids` are all tokens known so far, the first `num_prompt` of them the prompt; the first
    `num_computed` lie in the KV cache when it first computes. `stream` tells the sequences of one
    seed apart. A beam's step returns its `num_candidates` best tokens; 0: not a beam.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    num_prompt: int
    num_computed: int
    block_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stream: int = 0
    want_prompt_logits: bool = False
    num_candidates: int = 0


@dataclass(frozen=True, slots=True)
class Branch:
    """A beam goes on as `parent_id` (perhaps itself) was, and takes `token_id`.

    It has the first `num_blocks` blocks of its parent's table, and computes next what its parent
    would have. It is decoding from now on.
    """

    seq_id: int
    parent_id: int
    token_id: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, applied in this order: reset, left, joined, branches (all at once), new_blocks,
    copies, then compute.

    A sequence is *decoding* from the step on in which its computed tokens have caught up with its
    known ones, until it leaves. Decoding sequences compute their last token in every step and are
    never listed; of the others, those in `prefills` compute their next `num_tokens` and the rest
    are idle. A sequence that has caught up at the end of a step samples one token in it.
    """

    reset: bool = False  # forget all sequences: the step before was not completed
    left: tuple[int, ...] = ()  # finished, aborted or preempted
    joined: tuple[Join, ...] = ()
    branches: tuple[Branch, ...] = ()
    new_blocks: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (seq_id, appended to its table)
    prefills: tuple[tuple[int, int], ...] = ()  # (seq_id, num_tokens)
    copies: tuple[tuple[int, int], ...] = ()  # (source block, destination block), all at once


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Logits of consecutive prompt positions, as an array only the caller of `logits` looks
    into."""

    seq_id: int
    start: int
    logits: object  # float32 [positions, V]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One token for each sequence that sampled, in the order in which the sequences joined.

    `logprobs` is empty, or has one entry a token: None where the sequence did not ask. A beam's
    are its candidates: the most likely tokens after its repetition penalty.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob | None, ...] = ()
    prompt_logits: tuple[PromptLogits, ...] = ()
