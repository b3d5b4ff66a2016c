"""Ranks: several sessions, one a process, that run an engine as one.

Rank 0 holds the scheduler and sends every step's plan to the others; a rank of the last pipeline
stage sends back what was sampled. Decides how an engine is opened by all ranks together and how
they end together. Knows no requests and no text.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from puna.engine import EngineConfig, read_config
from puna.errors import LaunchError, PunaError
from puna.memory import RankMemory
from puna.native.cores import num_cores
from puna.runtime import wire
from puna.runtime.comm import Comm
from puna.runtime.launch import World, keep_to_share
from puna.runtime.rendezvous import Peers, join, tell_failure
from puna.runtime.request import SamplingParams
from puna.runtime.session import LoadProgress, Session, check_world_size
from puna.runtime.step import StepPlan, StepResult

# How long a process that must end waits for someone to read what it says.
_LAST_WORDS_SECONDS = 2.0
# What a rank tells rank 0 once its session is open.
_IS_OPEN = b"open"


@dataclass(frozen=True)
class SessionOptions:
    """How every rank opens its session; see `Session.open`."""

    device: str = "auto"
    kv_cache_bytes: int | None = None
    threads: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    deterministic: bool = False


class RankedSession:
    """All ranks of an engine, driven from rank 0 as if they were one session."""

    def __init__(self, own: Session, peers: Peers) -> None:
        self.own = own
        self.engine_dir, self.config = own.engine_dir, own.config
        self.num_blocks, self.block_size = own.num_blocks, own.block_size
        self.num_lanes = own.num_lanes
        self.device, self.device_name = own.device, own.device_name
        self.threads, self.notice = own.threads, own.notice
        self._peers = peers
        self._last_rank = own.config.world_size - own.config.tp_size
        self._token_ids: dict[int, tuple[int, ...]] = {}  # by lane: sampled, and to be told
        self._closer = weakref.finalize(self, _part, peers)

    @property
    def memory(self) -> RankMemory:
        """Bytes of rank 0."""
        return self.own.memory

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        """Start a step on all ranks; this one has done its part when it returns."""
        if plan.reset:
            raise LaunchError(
                "a step was broken off, and the ranks no longer agree: open the engine again"
            )
        token_ids = self._token_ids.pop(lane, None)
        self._peers.send(wire.encode_order(wire.Order(lane, token_ids, plan)))
        _run(self.own, wire.Order(lane, token_ids, plan))

    def collect(self, lane: int = 0) -> StepResult:
        """The result of the oldest step in flight, which is the lane's."""
        if self._last_rank == 0:
            return self.own.collect(lane)
        result = wire.decode_result(self._peers.receive(self._last_rank))
        self._token_ids[lane] = result.token_ids
        return result

    def can_run_ahead(self, params: SamplingParams) -> bool:
        """Never: ranks that compute a step learn its tokens with the next one."""
        return False

    def close(self) -> None:
        """Let all ranks end."""
        if self._closer.alive:
            self._closer()
            self.own.close()


def open_ranks(
    world: World,
    engine_dir: Path,
    options: SessionOptions,
    progress: LoadProgress | None = None,
) -> RankedSession:
    """Open an engine of several ranks on all of them.

    Returns on rank 0. On the others it serves rank 0 until that closes the session, then ends the
    process (SystemExit, status 0). Raises PunaError as `Session.open` does, on rank 0 also for what
    went wrong elsewhere.
    """
    keep_to_share(world)
    if world.rank == 0:
        config = read_config(engine_dir)
        check_world_size(config, world.size)
        peers = join(world, config.digest(), _end)
        with _telling(peers):
            session = _open(world, config, engine_dir, options, peers, progress)
            for rank in range(1, world.size):
                peers.receive(rank)  # it is open; or it is not, and this process ends here
            return RankedSession(session, peers)
    try:
        config = read_config(engine_dir)
        check_world_size(config, world.size)
    except PunaError as error:
        if not world.is_one_host:  # where rank 0 reads the same files, and finds the same
            tell_failure(world, str(error))
        raise
    peers = join(world, config.digest(), _end)
    with _telling(peers):
        session = _open(world, config, engine_dir, options, peers, None)
        peers.send(_IS_OPEN)
        _follow(session, peers)
    session.close()
    peers.close()
    raise SystemExit(0)


def _open(
    world: World,
    config: EngineConfig,
    engine_dir: Path,
    options: SessionOptions,
    peers: Peers,
    progress: LoadProgress | None,
) -> Session:
    comm = Comm(peers, config.mapping(world.rank))
    return Session.open(
        engine_dir,
        device=options.device,
        kv_cache_bytes=options.kv_cache_bytes,
        max_batch_size=options.max_batch_size,
        max_num_tokens=options.max_num_tokens,
        # BLAS has its threads already, and would use the other ranks' cores too.
        threads=options.threads or num_cores(),
        comm=comm,
        deterministic=options.deterministic,
        progress=progress,
    )


def _follow(session: Session, peers: Peers) -> None:
    """Run the steps that rank 0 orders until it has no more."""
    mapping = session.mapping
    while (order := wire.decode_order(peers.receive())) is not None:
        _run(session, order)
        if mapping.is_last_stage:
            result = session.collect(order.lane)
            if mapping.pp_size > 1 and mapping.tp_rank == 0:
                peers.send(wire.encode_result(result))


def _run(session: Session, order: wire.Order) -> None:
    if order.token_ids is not None and not session.mapping.is_last_stage:
        session.take(order.token_ids, order.lane)
    session.submit(order.plan, order.lane)


class _telling:
    """While it is entered, a failure of this rank is one of all ranks."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, SystemExit):
            is_known = isinstance(error, PunaError)
            message = str(error) if is_known else f"{type(error).__name__}: {error}"
            self._peers.fail(message, 2 if is_known else 1)
            self._peers.close()


def _part(peers: Peers) -> None:
    """End the steps in peace; the others' sessions close as they hear it."""
    try:
        peers.send(wire.encode_order(None))
    finally:
        peers.close()


def _end(message: str, status: int) -> None:
    """What the loss of a rank does to this process, whatever it is busy with.

    Where the launcher is gone, nobody may read what this process writes: that must not keep it.
    """

    def say() -> None:
        with suppress(OSError, ValueError):
            if message:
                sys.stderr.write(f"puna: {message}\n")
            sys.stderr.flush()
            sys.stdout.flush()

    last_words = threading.Thread(target=say, daemon=True)
    last_words.start()
    last_words.join(_LAST_WORDS_SECONDS)
    os._exit(status)
