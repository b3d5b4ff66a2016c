"""Ranks that meet, that may not, and that are lost; as threads of one process."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from puna.errors import LaunchError
from puna.runtime import rendezvous
from puna.runtime.launch import LOOPBACK, World
from puna.runtime.rendezvous import Link, Peers, candidate_ports, join, tell_failure


class Ended:
    """What `end` was called with; `wait` returns when it was."""

    def __init__(self) -> None:
        self.said: tuple[str, int] | None = None
        self._event = threading.Event()

    def __call__(self, message: str, status: int) -> None:
        self.said = (message, status)
        self._event.set()

    def wait(self) -> tuple[str, int]:
        assert self._event.wait(10), "nobody noticed"
        assert self.said is not None
        return self.said


def make_world(size: int = 3) -> World:
    return World(0, size, 0, size, "a test", secrets.token_hex(8), (LOOPBACK,))


def start(
    pool: ThreadPoolExecutor,
    world: World,
    ends: list[Ended],
    engine: Callable[[int], str] = lambda rank: "digest",
    seconds: float = 20,
) -> list[Future[Peers]]:
    return [
        pool.submit(join, replace(world, rank=rank), engine(rank), ends[rank], seconds)
        for rank in range(world.size)
    ]


def met(world: World, ends: list[Ended]) -> list[Peers]:
    with ThreadPoolExecutor(world.size) as pool:
        return [future.result() for future in start(pool, world, ends)]


def test_messages_in_order_and_a_peaceful_end() -> None:
    world, ends = make_world(), [Ended() for _ in range(3)]
    peers = met(world, ends)
    for i in range(50):
        peers[0].send(bytes([i]) * i * 1000)
    for rank in (1, 2):
        for i in range(50):
            assert peers[rank].receive() == bytes([i]) * i * 1000
        peers[rank].send(b"from %d" % rank)
        assert peers[0].receive(rank) == b"from %d" % rank
    for each in peers:
        each.close()
        each.close()
    time.sleep(0.2)
    assert [end.said for end in ends] == [None] * 3


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_rank_ends_the_others(lost: int) -> None:
    world, ends = make_world(), [Ended() for _ in range(3)]
    peers = met(world, ends)
    for link in (*peers[lost]._watch.values(), *peers[lost]._data.values()):
        link.sock.shutdown(socket.SHUT_RDWR)  # as when the process is killed
    others = [rank for rank in range(3) if rank != lost]
    said = [ends[rank].wait() for rank in others]
    assert all(status == 1 for _, status in said)
    # One of them says it for all, and names the rank.
    messages = [message for message, _ in said if message]
    assert len(messages) == 1 and f"rank {lost} (host" in messages[0], said


def test_a_rank_that_fails_has_the_last_word() -> None:
    world, ends = make_world(), [Ended() for _ in range(3)]
    peers = met(world, ends)
    peers[2].fail("the disk is full", 2)
    assert ends[0].wait() == ("rank 2: the disk is full", 2)
    assert ends[1].wait() == ("", 2)


def test_engines_of_different_builds_are_refused() -> None:
    world, ends = make_world(), [Ended() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        futures = start(pool, world, ends, engine=lambda rank: "other" if rank == 1 else "digest")
        for future in futures:
            with pytest.raises(LaunchError, match=r"rank 1 \(host .*from another build"):
                future.result()


def test_a_rank_that_cannot_take_part_says_why() -> None:
    world, ends = make_world(2), [Ended()]
    with ThreadPoolExecutor(2) as pool:
        future = pool.submit(join, world, "digest", ends[0], 20)
        pool.submit(tell_failure, replace(world, rank=1, local_rank=1), "no engine here").result()
        with pytest.raises(LaunchError, match=r"rank 1 \(host .*no engine here"):
            future.result()


def test_missing_ranks_are_named() -> None:
    world, ends = make_world(4), [Ended() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(join, replace(world, rank=rank), "digest", ends[rank], 1.0)
            for rank in (0, 2)
        ]
        with pytest.raises(LaunchError, match="rank 1, 3 of 4 did not join"):
            futures[0].result()
        with pytest.raises(LaunchError, match="rank 0 gave up"):
            futures[1].result()


def test_no_rank_0_anywhere() -> None:
    world = replace(make_world(2), rank=1, local_rank=1)
    with pytest.raises(LaunchError, match=r"found no rank 0 at 127.0.0.1 .*--master-addr"):
        join(world, "digest", Ended(), 0.5)
    with pytest.raises(LaunchError, match=r"does not tell where rank 0 is: pass --master-addr"):
        join(replace(world, addresses=()), "digest", Ended(), 0.5)
    with pytest.raises(LaunchError, match="does not tell this job from others: pass --master-port"):
        join(replace(world, job=""), "digest", Ended(), 0.5)


def test_two_jobs_that_want_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_world(2), make_world(2)
    ports = candidate_ports(first)
    monkeypatch.setattr(rendezvous, "candidate_ports", lambda world: ports)
    ends = [Ended() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        futures = [*start(pool, first, ends[:2]), *start(pool, second, ends[2:])]
        peers = [future.result() for future in futures]
    peers[0].send(b"first")
    peers[2].send(b"second")
    assert (peers[1].receive(), peers[3].receive()) == (b"first", b"second")
    for each in peers:
        each.close()


def test_strangers_are_sent_away() -> None:
    world, ends = make_world(2), [Ended() for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        future = pool.submit(join, world, "digest", ends[0], 20)
        for message in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 8, b""):
            for _ in range(100):
                try:
                    stranger = socket.create_connection((LOOPBACK, candidate_ports(world)[0]), 1)
                    break
                except OSError:
                    time.sleep(0.02)
            stranger.sendall(message)
            stranger.close()
        other = socket.create_connection((LOOPBACK, candidate_ports(world)[0]), 1)
        link = Link(other)
        link.send_json({"job": "another"})
        assert link.receive_json() == {"known": False}
        other.close()
        rank_1 = pool.submit(
            join, replace(world, rank=1, local_rank=1), "digest", ends[1], 20
        ).result()
        rank_0 = future.result()
    rank_0.close()
    rank_1.close()
