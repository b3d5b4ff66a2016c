"""`puna launch`: start the ranks of an engine, here or on several hosts, and end them together."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from puna.errors import LaunchError
from puna.runtime.launch import (
    LOOPBACK,
    parent_environment,
    process_environment,
    rank_environment,
    remote_environment,
)

HELP = """\
Run an engine that was built for several ranks (puna build --tp N, --pp N). A rank is one process,
with its part of the model; an engine has --tp times --pp of them, and -n must be that number.

  puna build CHECKPOINT --tp 2 -o engine
  puna launch -n 2 -- run engine --prompt "Once upon a time"
  puna launch -n 2 --hosts node1,node2 -- bench latency engine
  puna launch -n 2 -- program.py ...       a Python program that opens the engine with puna.LLM

After -- comes a command of puna (run, chat, summarize, bench) with its arguments, or a Python
program; all ranks run it, and only rank 0 prints. Ranks need PyTorch: pip install "puna[ranks]".

With --hosts the first ranks run on the first host, the next on the second. They are started over
ssh, in the directory of the same name and with the same Python; the engine must be there too.
mpirun, torchrun and srun can start the ranks as well: docs/deploy.md.
"""
RANKED = ("run", "chat", "summarize", "bench")
# Ranks hear of each other's end at once; one that does not end by itself is ended after this.
GRACE_SECONDS = 8.0
KILL_SECONDS = 5.0


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "launch",
        help="run an engine of several ranks, here or on several hosts",
        description=HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "-n",
        "--num-ranks",
        type=int,
        required=True,
        metavar="N",
        help="ranks, on all hosts together",
    )
    add(
        "--hosts",
        metavar="A,B",
        help="hosts to run on (default: this one), each with as many ranks",
    )
    add(
        "--ssh",
        default="ssh",
        metavar="CMD",
        help="run in place of ssh, as CMD HOST COMMAND",
    )
    add(
        "--master-addr",
        metavar="HOST",
        help="where the other ranks reach rank 0 (default: the first host)",
    )
    add(
        "--master-port",
        type=int,
        metavar="N",
        help="the port at which rank 0 waits for the others (default: one that is free)",
    )
    add("ranked", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each rank runs")
    parser.set_defaults(handler=run)


@dataclass(frozen=True)
class _Rank:
    """One process to start."""

    rank: int
    host: str | None  # None: this one
    argv: list[str]
    environment: dict[str, str]


def run(args: argparse.Namespace) -> int:
    command = _command(args.ranked)
    hosts = [host for host in args.hosts.split(",") if host] if args.hosts else [None]
    if args.num_ranks < 1 or args.num_ranks % len(hosts):
        raise LaunchError(
            f"{args.num_ranks} ranks cannot be dealt evenly to {len(hosts)} hosts: use a multiple"
        )
    hosts = [None if host in ("localhost", socket.gethostname()) else host for host in hosts]
    address = args.master_addr or _address(args.hosts, len(hosts))
    job = secrets.token_hex(16)
    local_size = args.num_ranks // len(hosts)
    ranks = [
        _Rank(
            rank,
            hosts[rank // local_size],
            command,
            rank_environment(
                rank,
                args.num_ranks,
                rank % local_size,
                local_size,
                address,
                job,
                args.master_port,
            ),
        )
        for rank in range(args.num_ranks)
    ]
    return _supervise(ranks, shlex.split(args.ssh))


def _command(ranked: list[str]) -> list[str]:
    """The argv of a rank."""
    command = ranked[1:] if ranked[:1] == ["--"] else ranked
    if command and command[0].endswith(".py"):
        return [sys.executable, *command]
    if not command or command[0] not in RANKED:
        found = repr(command[0]) if command else "nothing"
        raise LaunchError(
            f"found {found} to launch; needed {', '.join(RANKED)} or a Python script, after --"
        )
    return [sys.executable, "-m", "puna", *command]


def _address(hosts: str | None, num_hosts: int) -> str:
    """Where rank 0 listens: the first host, without a user's name before it."""
    if hosts is None or num_hosts == 1:
        return LOOPBACK
    return hosts.split(",")[0].rpartition("@")[2]


def _start(rank: _Rank, ssh: list[str]) -> subprocess.Popen[bytes]:
    stdin = None if rank.rank == 0 else subprocess.DEVNULL
    if rank.host is None:
        environment = {**rank.environment, **parent_environment(os.getpid())}
        return subprocess.Popen(rank.argv, env=process_environment(environment), stdin=stdin)
    variables = remote_environment(rank.environment)
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    command = f"cd {shlex.quote(os.getcwd())} && exec env {' '.join(settings)} "
    command += " ".join(map(shlex.quote, rank.argv))
    try:
        return subprocess.Popen([*ssh, rank.host, command], stdin=stdin)
    except OSError as error:
        raise LaunchError(f"{ssh[0]} cannot be run ({error.strerror}): install it") from error


def _supervise(ranks: list[_Rank], ssh: list[str]) -> int:
    """Run all ranks to their end; the status is that of the first to fail."""

    def terminate(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in ranks:
            processes.append(_start(rank, ssh))
        return _wait(processes)
    finally:
        _end(processes)
        signal.signal(signal.SIGTERM, before)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    running = dict(enumerate(processes))
    failure, deadline = 0, float("inf")
    while running and time.monotonic() < deadline:
        for rank, process in list(running.items()):
            status = process.poll()
            if status is None:
                continue
            del running[rank]
            if status and not failure:
                failure = status if status > 0 else 128 - status
                deadline = time.monotonic() + GRACE_SECONDS
                if status < 0:
                    name = signal.Signals(-status).name
                    print(f"puna: rank {rank} was ended by {name}", file=sys.stderr)
        time.sleep(0.02)
    return failure


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Whatever happened, no rank outlives its launcher."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + KILL_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
