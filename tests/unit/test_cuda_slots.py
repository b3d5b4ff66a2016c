"""The order of a step's copies, graphs and waits on a GPU's streams, which are played here."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import puna.runtime.cuda_slots  # noqa: E402
from puna.runtime.cuda_slots import Buffers, Slot, Streams  # noqa: E402

PLACES = SimpleNamespace(shape="a shape", num_ints=10)


class Played:
    """What torch.cuda is to cuda_slots; `log` has who did what, in the order of the calls."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = [self.stream_named("main")]  # the innermost is the current one
        self.num_events = 0

    def stream_named(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, wait_event=lambda event: self.log.append(f"{name} waits for {event.name}")
        )

    def Event(self) -> SimpleNamespace:
        self.num_events += 1
        name = f"event {self.num_events}"
        return SimpleNamespace(
            name=name,
            record=lambda stream=None: self.log.append(
                f"{(stream or self.streams[-1]).name} records {name}"
            ),
            synchronize=lambda: self.log.append(f"host waits for {name}"),
        )

    @contextmanager
    def stream(self, stream: SimpleNamespace):
        self.streams.append(stream)
        yield
        self.streams.pop()

    def current_stream(self) -> SimpleNamespace:
        return self.streams[-1]


class Memory:
    """A tensor of which only copies matter."""

    device = SimpleNamespace(type="cuda")
    shape = (20,)

    def __init__(self, name: str, played: Played) -> None:
        self.name, self._played = name, played

    def __getitem__(self, part: slice) -> Memory:
        return self

    def numpy(self) -> np.ndarray:
        return np.zeros(self.shape, np.int32)

    def copy_(self, source: Memory, non_blocking: bool) -> None:
        assert non_blocking
        stream = self._played.streams[-1].name
        self._played.log.append(f"{stream} copies {source.name} to {self.name}")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    names = iter(("up", "down"))
    played.Stream = lambda device: played.stream_named(next(names))  # type: ignore[attr-defined]
    stand_in = SimpleNamespace(
        cuda=played,
        int32=torch.int32,
        zeros=lambda shape, dtype, pin_memory: Memory("pinned" if pin_memory else "host", played),
    )
    monkeypatch.setattr(puna.runtime.cuda_slots, "torch", stand_in)
    return played


def make(played: Played) -> tuple[Buffers, Slot]:
    shared, own = (
        Buffers(i, Memory(f"inputs {i}", played), Memory(f"tokens {i}", played)) for i in (0, 1)
    )
    slot = Slot(own, Streams(torch.device("cuda")))
    slot._writers["a shape"] = SimpleNamespace(  # type: ignore[index, assignment]
        write=lambda step: played.log.append(f"host writes {step}")
    )
    return shared, slot


def test_a_decode_step_waits_for_its_inputs_only(played: Played) -> None:
    """Neither copy stands in the main stream, where the other slot's graph may be running."""
    _, slot = make(played)
    slot.send("a step", PLACES, 64, slot.buffers)  # type: ignore[arg-type]
    played.log.append("main runs the graph")
    slot.fetch_tokens(slot.buffers)
    slot.wait()
    assert played.log == [
        "host writes a step",
        "up copies pinned to inputs 1",
        "up records event 1",
        "main waits for event 1",
        "main runs the graph",
        "main records event 2",
        "down waits for event 2",
        "down copies tokens 1 to pinned",
        "down records event 3",
        "host waits for event 3",
    ]


def test_shared_buffers_are_used_in_the_order_of_the_main_stream(played: Played) -> None:
    shared, slot = make(played)
    slot.send("a step", PLACES, 64, shared)  # type: ignore[arg-type]
    played.log.append("main runs the graph")
    slot.fetch_tokens(shared)
    slot.wait()
    assert played.log == [
        "host writes a step",
        "main copies pinned to inputs 0",
        "main runs the graph",
        "main copies tokens 0 to pinned",
        "main records event 3",
        "host waits for event 3",
    ]


def test_what_else_a_step_is_ends_with_a_mark(played: Played) -> None:
    _, slot = make(played)
    slot.mark()
    slot.wait()
    assert played.log == ["main records event 3", "host waits for event 3"]
