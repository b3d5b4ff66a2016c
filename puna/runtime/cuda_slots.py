"""Slots: how a step's integers get to a GPU, and its tokens back, without anybody waiting.

A slot serves one step in flight, from its start until it is finished. It has pinned memory, and on
the GPU buffers of its own: the inputs of a decode step arrive while the step before runs, and its
tokens leave while the next one does, both on streams of their own. Programs are therefore recorded
for a slot's buffers; those of other shapes, which are many and seldom, for buffers that all slots
share, in the order of the main stream, torch's current one.

Of a test on a CPU nothing is pinned, there are no streams, and all is done at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from puna.runtime.cuda_inputs import InputPlaces, InputWriter, StepShape
from puna.runtime.lower import LoweredStep

Tensor = Any  # a torch.Tensor


@dataclass(frozen=True, slots=True)
class Buffers:
    """What programs read a step's integers from and write its tokens to. int32, on the GPU."""

    index: int
    inputs: Tensor
    out_tokens_L: Tensor

    @classmethod
    def make(cls, index: int, num_ints: int, max_batch_size: int, device: torch.device) -> Buffers:
        sizes = (num_ints, max_batch_size)
        return cls(index, *(torch.zeros(n, dtype=torch.int32, device=device) for n in sizes))


class Streams:
    """The two ways beside the main stream, of a GPU."""

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self.up = torch.cuda.Stream(device) if is_gpu else None
        self.down = torch.cuda.Stream(device) if is_gpu else None


class Slot:
    """Memory of one step in flight, on both sides."""

    def __init__(self, buffers: Buffers, streams: Streams) -> None:
        is_gpu = buffers.inputs.device.type == "cuda"
        self.buffers = buffers
        self._streams = streams
        self._inputs, self._tokens = (
            torch.zeros(array.shape, dtype=torch.int32, pin_memory=is_gpu)
            for array in (buffers.inputs, buffers.out_tokens_L)
        )
        self.tokens_L = self._tokens.numpy()
        self._writers: dict[StepShape, InputWriter] = {}
        self._events = [torch.cuda.Event() if is_gpu else None for _ in range(3)]

    def send(self, step: LoweredStep, places: InputPlaces, block_size: int, to: Buffers) -> None:
        """Write a step's inputs and begin to copy them: what the main stream is given next finds
        them. The step that had this slot before is finished, so nobody reads its buffers."""
        writer = self._writers.get(places.shape)
        if writer is None:
            writer = InputWriter(self._inputs.numpy(), places, block_size)
            self._writers[places.shape] = writer
        writer.write(step)
        source, target = self._inputs[: places.num_ints], to.inputs[: places.num_ints]
        up, (arrived, _, _) = self._streams.up, self._events
        if to is not self.buffers or up is None or arrived is None:
            target.copy_(source, non_blocking=True)
            return
        with torch.cuda.stream(up):
            target.copy_(source, non_blocking=True)
            arrived.record(up)
        torch.cuda.current_stream().wait_event(arrived)

    def fetch_tokens(self, of: Buffers) -> None:
        """Begin to copy the tokens that the main stream computes, as the last part of the step."""
        down, (_, computed, done) = self._streams.down, self._events
        if of is not self.buffers or down is None or computed is None or done is None:
            self._tokens.copy_(of.out_tokens_L, non_blocking=True)
            self.mark()
            return
        computed.record()
        with torch.cuda.stream(down):
            down.wait_event(computed)
            self._tokens.copy_(of.out_tokens_L, non_blocking=True)
            done.record(down)

    def mark(self) -> None:
        """Say that what the main stream was given until now is all of the step."""
        if (done := self._events[2]) is not None:
            done.record()

    def wait(self) -> None:
        """Until the step is done."""
        if (done := self._events[2]) is not None:
            done.synchronize()
