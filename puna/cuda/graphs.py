"""Recording launches as CUDA graphs, and replaying them.

Knows streams and graphs, not what is in them. Allocates nothing: what is recorded writes to arrays
that exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GraphProgram:
    """A recorded graph; `run` replays it on the current stream."""

    graph: torch.cuda.CUDAGraph

    def run(self) -> None:
        self.graph.replay()


class GraphRecorder:
    """Records on a stream of its own, on the current GPU."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def prepare(self, call: Callable[[], None]) -> None:
        """Run at once, on the stream that launches are recorded from: after what the current stream
        has been given, and before what comes."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            call()
        current.wait_stream(self._stream)

    def record(self, emit: Callable[[], None]) -> GraphProgram:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads may allocate meanwhile: what they do is not recorded.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                emit()
            finally:
                graph.capture_end()
        return GraphProgram(graph)
