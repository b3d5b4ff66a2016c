"""Two hosts, played by two network namespaces of this machine: each launcher; engines that differ.

Only the network is real: both have this machine's files, processes, CPUs and host name. Commands
start on a host with an empty environment, as over ssh.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from checkpoint_writers import SPEC
from small_models import ROOT, write_checkpoint

from puna import BuildConfig, build
from puna.checkpoint import open_checkpoint
from puna.engine import read_config

pytest.importorskip("torch")

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NUM_NEW = 24


@dataclass(frozen=True)
class Hosts:
    """Two namespaces that see each other and nothing else."""

    names: tuple[str, str]

    def on(self, host: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[host])

    def agent(self, path: Path, on_second: str = "") -> str:
        """A script that stands for ssh; `on_second` goes before every command on host 1."""
        first, second = (" ".join(self.on(host)) for host in range(2))
        path.write_text(
            f"""#!/bin/sh
host=$1; shift
case $host in
{ADDRESSES[0]}) exec {first} env -i PATH="$PATH" HOME="$HOME" sh -c "$*" ;;
{ADDRESSES[1]}) exec {second} env -i PATH="$PATH" HOME="$HOME" sh -c "{on_second} $*" ;;
esac
echo "no host $host" >&2; exit 255
"""
        )
        path.chmod(0o755)
        return str(path)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    token = secrets.token_hex(3)
    found = Hosts((f"puna{token}a", f"puna{token}b"))

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name in found.names:
                ip("netns", "add", name)
            # Made inside, so that neither end nor address is ever seen outside.
            ends = [("name", "veth0", "netns", name) for name in found.names]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name, address in zip(found.names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
                ip("-n", name, "link", "set", "veth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield found
    finally:
        for name in found.names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


@dataclass(frozen=True)
class Engine:
    path: Path
    other: Path  # of the same shape, with other weights
    stages: Path  # with pp in place of tp
    four: Path  # tp 2 x pp 2
    expected: dict[str, object]  # what one rank on one host makes of the prompt


def run_command(engine: Path) -> list[str]:
    words = f"run {engine} --prompt on~two~hosts --temperature 0 --max-new-tokens {NUM_NEW} --json"
    return [word.replace("~", " ") for word in words.split()]


def answer(out: str) -> dict[str, object]:
    """What must be the same on any number of ranks."""
    found = json.loads(out)
    assert len(found["token_ids"]) == NUM_NEW
    return {name: found[name] for name in ("text", "token_ids", "finish_reason")}


def ran(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, argv)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )


def environment() -> dict[str, str]:
    allowed = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    return {**os.environ, "PYTHONPATH": str(ROOT), **allowed}


@pytest.fixture(scope="module")
def engine(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("two_hosts")
    changed = {"norm.weight": np.full(SPEC.hidden_size, 2, np.float32)}
    paths = {}
    for name, tp_size, pp_size, changes in (
        ("one", 1, 1, {}),
        ("engine", 2, 1, {}),
        ("other", 2, 1, changed),
        ("stages", 1, 2, {}),
        ("four", 2, 2, {}),
    ):
        checkpoint = open_checkpoint(write_checkpoint(folder / f"{name}.hf", **changes))
        config = BuildConfig(dtype="float32", tp_size=tp_size, pp_size=pp_size)
        paths[name] = build(checkpoint, folder / name, config).path
    done = ran(sys.executable, "-m", "puna", *run_command(paths["one"]))
    assert done.returncode == 0, done.stderr
    return Engine(
        *(paths[name] for name in ("engine", "other", "stages", "four")), answer(done.stdout)
    )


@pytest.mark.parametrize("split", ["tp", "pp"])
def test_puna_launch(split: str, hosts: Hosts, engine: Engine, tmp_path: Path) -> None:
    path = engine.path if split == "tp" else engine.stages
    agent = hosts.agent(tmp_path / "agent")
    launch = ("launch", "-n", 2, "--hosts", ",".join(ADDRESSES), "--ssh", agent)
    done = ran(sys.executable, "-m", "puna", *launch, "--", *run_command(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert answer(done.stdout) == engine.expected


def test_open_mpi(hosts: Hosts, engine: Engine, tmp_path: Path) -> None:
    """Two ranks on each host: tensor parallel within a host, pipeline stages between them."""
    if shutil.which("mpirun.openmpi") is None:
        pytest.skip("needs mpirun.openmpi")
    agent = hosts.agent(tmp_path / "agent")
    where = ",".join(f"{address}:2" for address in ADDRESSES)
    mpirun = ("mpirun.openmpi", "-H", where, "--mca", "plm_rsh_agent", agent, "-x", "PYTHONPATH")
    rank = (sys.executable, "-m", "puna", *run_command(engine.four))
    done = ran(*hosts.on(0), *mpirun, *rank)
    assert done.returncode == 0, done.stderr
    assert answer(done.stdout) == engine.expected


def test_torchrun(hosts: Hosts, engine: Engine) -> None:
    words = "--nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29500"
    pipe = subprocess.PIPE
    nodes = [
        subprocess.Popen(
            [
                *(*hosts.on(host), sys.executable, "-m", "torch.distributed.run"),
                *("--node-rank", str(host), *words.split(), "-m", "puna"),
                *run_command(engine.path),
            ],
            cwd=ROOT,
            env=environment(),
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for host in range(2)
    ]
    outputs = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert answer(outputs[0][0]) == engine.expected
    assert outputs[1][0] == ""


def test_another_engine_on_the_second_host(hosts: Hosts, engine: Engine, tmp_path: Path) -> None:
    """It lies at the same path there, as a copy of an older build would."""
    agent = hosts.agent(tmp_path / "agent", f"mount --bind {engine.other} {engine.path} &&")
    launch = ("launch", "-n", 2, "--hosts", ",".join(ADDRESSES), "--ssh", agent)
    done = ran(sys.executable, "-m", "puna", *launch, "--", *run_command(engine.path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    own, other = (read_config(path).digest()[:12] for path in (engine.path, engine.other))
    assert done.stderr.startswith("puna: rank 1 (host ") and own != other
    assert f"from another build ({other}) than rank 0's ({own})" in done.stderr
