"""Rendezvous: the ranks of a job find each other, and notice when one of them is gone.

Every rank keeps two connections to rank 0, which listens: one for messages in their order, and one
that is only watched. Decides when a rank counts as lost and what its loss does to the others. What
the messages say is `puna.runtime.ranks`'s; arrays travel elsewhere (`puna.runtime.comm`).
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from puna.errors import LaunchError
from puna.runtime.launch import LOOPBACK, World, has_launcher

# Candidates for the port of a job: below the range from which systems hand out ports themselves.
_FIRST_PORT, _NUM_PORTS, _NUM_CANDIDATES = 20000, 12000, 8
# Seconds for all ranks to start: Python on a cold network file system takes its time.
JOIN_SECONDS = 120.0
_GREETING_SECONDS = 5.0
# A host that vanished without a word is noticed after 10 + 3 * 5 seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
# How often a rank looks whether its launcher is still there.
_LAUNCHER_SECONDS = 1.0
_LENGTH = struct.Struct("<Q")
_LARGEST_GREETING = 1 << 16

End = Callable[[str, int], None]


@dataclass(frozen=True)
class Greeting:
    """How a rank introduces itself: what must agree, and what helps to name it."""

    job: str
    rank: int
    size: int
    engine: str  # digest of its config
    host: str
    pid: int
    kind: str  # "data" or "watch"; "failed" from a rank that cannot take part
    problem: str = ""  # why it cannot

    def describe(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Link:
    """A connection that carries whole messages. One reader and one writer at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: bytes) -> None:
        self.sock.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, most: int | None = None) -> bytes:
        """The next message; ConnectionError where the other side is gone."""
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if most is not None and size > most:
            raise ConnectionError(f"a message of {size} bytes")
        return self._exactly(size)

    def send_json(self, value: dict[str, Any]) -> None:
        self.send(json.dumps(value).encode())

    def receive_json(self) -> dict[str, Any]:
        """The next message of a rendezvous; ConnectionError also where it is none."""
        try:
            found = json.loads(self.receive(_LARGEST_GREETING))
        except ValueError as error:
            raise ConnectionError(f"not a message of puna: {error}") from error
        if not isinstance(found, dict):
            raise ConnectionError("not a message of puna")
        return found

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self.sock.recv(min(size - len(data), 1 << 20))
            if not more:
                raise ConnectionError("the connection was closed")
            data += more
        return bytes(data)


class Peers:
    """The other ranks as this one sees them: all of them on rank 0, rank 0 alone elsewhere.

    `end(message, status)` is called, from a thread of its own, when a rank is lost or has failed;
    it must end the process. `message` is empty where another rank has it.
    """

    def __init__(
        self,
        world: World,
        own_address: str,
        data: dict[int, Link],
        watch: dict[int, Link],
        names: dict[int, str],
        end: End,
    ) -> None:
        self.world = world
        self.own_address = own_address  # under which the other ranks reach this one
        self._data, self._watch, self._names = data, watch, names
        self._end = end
        self._is_closing = threading.Event()
        self._said_bye: set[int] = set()
        threading.Thread(target=self._watch_others, daemon=True, name="puna-watch").start()

    def send(self, message: bytes) -> None:
        """To every other rank (on rank 0), or to rank 0."""
        for link in self._data.values():
            self._guarded(link.send, message)

    def receive(self, rank: int = 0) -> bytes:
        return self._guarded(self._data[rank].receive)

    def fail(self, message: str, status: int) -> None:
        """Tell rank 0, or all others, that this rank cannot go on."""
        for link in self._watch.values():
            self._quietly(link, {"failed": message, "status": status})

    def close(self) -> None:
        """Part from the other ranks in peace."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        for link in self._watch.values():
            self._quietly(link, {"bye": True})
        for link in self._data.values():
            link.sock.close()

    def _guarded(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except OSError:
            self.wait_for_end()
            raise

    def wait_for_end(self, seconds: float = 30.0) -> None:
        """After an error that a lost rank may have caused: the watching thread knows which one it
        was, and ends the process. Returns where none was lost."""
        self._is_closing.wait(seconds)

    @staticmethod
    def _quietly(link: Link, value: dict[str, Any]) -> bool:
        """Send what only matters if the other side is still there; whether it went out."""
        try:
            link.send_json(value)
        except OSError:
            return False
        return True

    def _watch_others(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self._watch.items():
                selector.register(link.sock, selectors.EVENT_READ, rank)
            while len(self._said_bye) < len(self._watch):
                for key, _ in selector.select(_LAUNCHER_SECONDS):
                    if self._hear(key.data):
                        self._said_bye.add(key.data)
                        selector.unregister(key.fileobj)
                if not has_launcher(self.world) and not self._is_closing.is_set():
                    self._stop("the launcher is gone, so all ranks stop", 1)
                    return

    def _hear(self, rank: int) -> bool:
        """Whether a rank has said goodbye; ends the process if it failed or is lost."""
        try:
            message = self._watch[rank].receive_json()
        except OSError:
            if self._is_closing.is_set():
                return True
            self._stop(f"{self._names[rank]} ended unexpectedly, so all ranks stop", 1)
            return True
        if "stop" in message:  # rank 0 has said why
            self._end("", int(message.get("status", 1)))
        elif "failed" in message:
            status = int(message.get("status", 1))
            self._stop(f"rank {rank}: {message['failed']}", status)
        return "bye" in message

    def _stop(self, message: str, status: int) -> None:
        """Tell the others, then end. Rank 0 says why; where that is what was lost, rank 1 does."""
        for link in self._watch.values() if self.world.rank == 0 else ():
            self._quietly(link, {"stop": True, "status": status})
        self._end(message if self.world.rank <= 1 else "", status)


def join(world: World, engine: str, end: End, seconds: float = JOIN_SECONDS) -> Peers:
    """Meet the other ranks of `world`, all of which call this with the same engine digest.

    Raises LaunchError where ranks are missing after `seconds`, hold another engine, or cannot find
    rank 0; see `Peers` for `end`.
    """
    assert world.size > 1, "a lone rank has nobody to meet"
    if not world.addresses:
        raise LaunchError(
            f"{world.launcher} does not tell where rank 0 is: pass --master-addr HOST (rank 0's)"
            + ("" if world.job else ", and --master-port N with a port that is free there")
        )
    if not world.job and world.port is None:
        raise LaunchError(
            f"{world.launcher} does not tell this job from others: pass --master-port N with a "
            "port that is free on rank 0's host"
        )
    deadline = time.monotonic() + seconds
    if world.rank == 0:
        return _gather(world, engine, end, deadline)
    return _find_rank_0(world, engine, end, deadline)


def candidate_ports(world: World) -> list[int]:
    """Ports at which rank 0 of this job may listen, in the order in which they are tried."""
    if world.port is not None:
        return [world.port]
    digest = hashlib.sha256(world.job.encode()).digest()
    return [
        _FIRST_PORT + int.from_bytes(digest[2 * i : 2 * i + 2], "little") % _NUM_PORTS
        for i in range(_NUM_CANDIDATES)
    ]


def tell_failure(world: World, problem: str, seconds: float = 3.0) -> None:
    """Let rank 0, if it is there, say why this rank cannot take part, for all of them."""
    if world.addresses:
        deadline = time.monotonic() + seconds
        if link := _try_connect(world, _greeting(world, "", "failed", problem), deadline):
            link.sock.close()


def _greeting(world: World, engine: str, kind: str, problem: str = "") -> Greeting:
    # The job's name may hold a secret of the launcher, and need not be sent as it is.
    job = hashlib.sha256(f"puna rendezvous {world.job}".encode()).hexdigest()
    host, pid = socket.gethostname(), os.getpid()
    return Greeting(job, world.rank, world.size, engine, host, pid, kind, problem)


def _listen(world: World) -> socket.socket:
    host = LOOPBACK if world.is_one_host else ""
    ports = candidate_ports(world)
    for port in ports:
        try:
            return socket.create_server((host, port), backlog=2 * world.size)
        except OSError:
            continue
    raise LaunchError(
        f"rank 0 can listen at none of the ports {', '.join(map(str, ports))}: pass --master-port "
        "with a free one"
    )


def _gather(world: World, engine: str, end: End, deadline: float) -> Peers:
    """Rank 0's part: wait for the others, compare, and let them in or turn all away."""
    own = _greeting(world, engine, "data")
    links: dict[str, dict[int, Link]] = {"data": {}, "watch": {}}
    greetings: dict[int, Greeting] = {}
    address = LOOPBACK
    with _listen(world) as server:
        while min(map(len, links.values())) < world.size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, peer = server.accept()
            except TimeoutError:
                missing = [r for r in range(1, world.size) if r not in links["watch"]]
                names = ", ".join(map(str, missing))
                raise LaunchError(
                    f"rank {names} of {world.size} did not join within {JOIN_SECONDS:.0f} s: look "
                    "at its host's output, and whether rank 0's host can be reached from there"
                ) from None
            link = Link(sock)
            found = _greeted(link, own.job)
            if found is None:
                sock.close()
                continue
            if found.problem:
                for other in links["data"].values():
                    other.send_json({"refused": ""})
                raise LaunchError(f"{found.describe()}: {found.problem}")
            links[found.kind][found.rank] = link
            greetings[found.rank] = found
            if peer[0] != LOOPBACK:
                address = sock.getsockname()[0]
    problem = _disagreement(own, greetings)
    for link in links["data"].values():
        link.send_json({"refused": problem} if problem else {"welcome": True})
    if problem:
        raise LaunchError(problem)
    names = {rank: greeting.describe() for rank, greeting in greetings.items()}
    return Peers(world, address, links["data"], links["watch"], names, end)


def _greeted(link: Link, job: str) -> Greeting | None:
    """Answer who connects; None where it is not a rank of this job."""
    link.sock.settimeout(_GREETING_SECONDS)
    try:
        message = link.receive_json()
        is_ours = message.get("job") == job
        link.send_json({"known": is_ours})
        link.sock.settimeout(None)
        return Greeting(**message) if is_ours else None
    except (OSError, TypeError):
        return None


def _disagreement(own: Greeting, others: dict[int, Greeting]) -> str:
    """Why these ranks cannot work together, in a line; empty where they can."""
    sizes = {greeting.size for greeting in others.values()} - {own.size}
    if sizes:
        return f"ranks were started for worlds of {own.size} and {min(sizes)}: start them as one"
    different = [g for g in others.values() if g.engine != own.engine]
    if different:
        names = ", ".join(g.describe() for g in sorted(different, key=lambda g: g.rank))
        digests = ", ".join(sorted({g.engine[:12] for g in different}))
        return (
            f"{names}: the engine there is from another build ({digests}) than rank 0's "
            f"({own.engine[:12]}): copy one build to all hosts"
        )
    return ""


def _find_rank_0(world: World, engine: str, end: End, deadline: float) -> Peers:
    data = _connect(world, engine, "data", deadline)
    watch = _connect(world, engine, "watch", deadline)
    data.sock.settimeout(max(1.0, deadline + 10 - time.monotonic()))
    try:
        answer = data.receive_json()
    except OSError as error:
        raise LaunchError(f"rank 0 gave up before all ranks had joined ({error})") from error
    if "refused" in answer:
        raise LaunchError(str(answer["refused"]) or "rank 0 says why")
    data.sock.settimeout(None)
    name = f"rank 0 (host {data.sock.getpeername()[0]})"
    return Peers(world, data.sock.getsockname()[0], {0: data}, {0: watch}, {0: name}, end)


def _connect(world: World, engine: str, kind: str, deadline: float) -> Link:
    if link := _try_connect(world, _greeting(world, engine, kind), deadline):
        return link
    raise LaunchError(
        f"rank {world.rank} found no rank 0 at {', '.join(world.addresses)} within "
        f"{JOIN_SECONDS:.0f} s: start all ranks, and pass --master-addr HOST (rank 0's) if that "
        "is the wrong place"
    )


def _try_connect(world: World, greeting: Greeting, deadline: float) -> Link | None:
    """Try rank 0's addresses and ports until one answers for this job."""
    places = [(host, port) for port in candidate_ports(world) for host in world.addresses]
    while time.monotonic() < deadline:
        for place in places:
            try:
                sock = socket.create_connection(place, timeout=_GREETING_SECONDS)
            except OSError:
                continue
            link = Link(sock)
            try:
                link.send_json(asdict(greeting))
                is_known = link.receive_json().get("known")
            except OSError:
                is_known = False
            if is_known:
                sock.settimeout(None)
                return link
            sock.close()  # another job's, or no puna at all
        time.sleep(0.05)
    return None
