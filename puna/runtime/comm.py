"""Comm: how arrays get from rank to rank, over torch's process groups (gloo between CPU ranks).

Two patterns: sums and joins within a tensor-parallel group, and the stream handed from a pipeline
stage to the next. Every sum is taken in the order of the ranks, by each of them, so that it depends
on neither the batch nor the moment, and all get the same bits. Knows arrays and ranks, no model.

Shape suffixes: X tensor-parallel ranks, L rows, V vocab on this rank.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from puna.errors import LaunchError
from puna.mapping import Mapping
from puna.quant import Array
from puna.runtime.launch import quiet_torch
from puna.runtime.rendezvous import Peers

# A rank that waits here waits for another that computes or has been lost, and `Peers` notices that.
_FOREVER = timedelta(days=365)


class Comm:
    """One rank's connections to its tensor-parallel group and to the stages beside its own.

    Made by all ranks at the same time. Raises LaunchError where torch is missing.
    """

    def __init__(self, peers: Peers, mapping: Mapping) -> None:
        torch, dist = _torch()
        self._torch, self._dist = torch, dist
        self.mapping = mapping
        self._peers = peers
        # The group's own store: rank 0 tells the others where.
        if mapping.rank == 0:
            server = socket.create_server((peers.own_address, 0))
            port = server.getsockname()[1]
            self._store = dist.TCPStore(
                peers.own_address,
                port,
                None,
                True,
                wait_for_workers=False,
                # By itself it would listen at all of the host's addresses.
                master_listen_fd=server.detach(),
            )
            peers.send(f"{peers.own_address} {port}".encode())
        else:
            host, port = peers.receive().decode().split()
            self._store = dist.TCPStore(host, int(port), None, False)
        self._address = peers.own_address
        first_of_stage = mapping.pp_rank * mapping.tp_size
        self._tensor: Any = self._group(
            f"tp{mapping.pp_rank}", mapping.rank - first_of_stage, mapping.tp_size
        )
        # Stages exchange between ranks of the same place in their groups.
        self._pipeline: Any = self._group(f"pp{mapping.tp_rank}", mapping.pp_rank, mapping.pp_size)
        self._sending: dict[int, list[Any]] = {}  # by slot

    def _group(self, name: str, rank: int, size: int) -> Any:
        """A process group of some ranks, each listening where the others reach it."""
        if size == 1:
            return None
        gloo = self._dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._address, lazy_init=False)]
        options._timeout = _FOREVER
        options._threads = 1
        return gloo(self._dist.PrefixStore(name, self._store), rank, size, options)

    def sum_call(self, partial_TD: Array, gathered: Array) -> Callable[[], None]:
        """A call that replaces float32 partial_TD with its sum over the tensor-parallel ranks.

        `gathered` is room for all ranks' arrays: at least X * T * D numbers, flat.
        """
        size = self.mapping.tp_size
        assert partial_TD.flags.c_contiguous and gathered.size >= size * partial_TD.size
        all_XTD = gathered[: size * partial_TD.size].reshape(size, *partial_TD.shape)
        gather = self._gather_call(partial_TD, all_XTD)

        def run() -> None:
            gather()
            np.add(all_XTD[0], all_XTD[1], out=partial_TD)
            for other_TD in all_XTD[2:]:
                np.add(partial_TD, other_TD, out=partial_TD)

        return run

    def _gather_call(self, own: Array, everybody: Array) -> Callable[[], None]:
        """A call that fills everybody[x] with the `own` of rank x of the group.

        Each sends to each: one message of latency, where gloo's own gathering hands everything
        around in a ring, and through one more thread.
        """
        group, me = self._tensor, self.mapping.tp_rank
        others = [rank for rank in range(self.mapping.tp_size) if rank != me]
        sent = [self._torch.from_numpy(own)]
        received = [(rank, [self._torch.from_numpy(everybody[rank])]) for rank in others]

        def run() -> None:
            receives = [(group.recv, target, rank) for rank, target in received]
            sends = [(group.send, sent, rank) for rank in others]
            self._do(lambda: [begin(arrays, rank, 0) for begin, arrays, rank in receives + sends])
            everybody[me] = own

        return run

    def join_columns(self, logits_LV: Array, gathered: Array, out: Array) -> None:
        """Put the ranks' columns side by side: float32 [L, V] each, `out` [L, X * V]."""
        size = self.mapping.tp_size
        assert logits_LV.flags.c_contiguous and gathered.size >= size * logits_LV.size
        all_XLV = gathered[: size * logits_LV.size].reshape(size, *logits_LV.shape)
        self._gather_call(logits_LV, all_XLV)()
        num_rows, num_columns = logits_LV.shape
        out.reshape(num_rows, size, num_columns)[:] = all_XLV.transpose(1, 0, 2)

    def send_to_next_stage(self, arrays: tuple[Array, ...], slot: int) -> None:
        """Begin to send arrays, which must stay as they are until the next send of this slot."""
        self.wait_sent(slot)
        to = self.mapping.pp_rank + 1
        self._sending[slot] = [
            self._pipeline.send([self._torch.from_numpy(array)], to, tag)
            for tag, array in enumerate(arrays)
        ]

    def wait_sent(self, slot: int) -> None:
        """Wait until what was sent from this slot has arrived."""
        works = self._sending.pop(slot, [])
        self._do(lambda: works)

    def receive_from_stage_before(self, arrays: tuple[Array, ...]) -> None:
        """Fill arrays with what the stage before sent, in the order in which it sent."""
        source = self.mapping.pp_rank - 1
        targets = [[self._torch.from_numpy(array)] for array in arrays]
        self._do(lambda: [self._pipeline.recv(t, source, tag) for tag, t in enumerate(targets)])

    def _do(self, begin: Callable[[], list[Any]]) -> None:
        """Wait for all that `begin` starts."""
        try:
            for work in begin():
                work.wait()
        except RuntimeError:  # gloo's word for a lost connection
            self._peers.wait_for_end()
            raise

    def close(self) -> None:
        """Wait for what is being sent, and end the groups' threads while Python can still do so."""
        for slot in list(self._sending):
            self.wait_sent(slot)
        self._tensor = self._pipeline = self._store = None


def _torch() -> tuple[Any, Any]:
    quiet_torch()
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        raise LaunchError(
            f"several ranks need PyTorch, which carries their messages ({error}): "
            'pip install "puna[ranks]"'
        ) from error
    if not dist.is_available() or not hasattr(dist, "ProcessGroupGloo"):
        raise LaunchError(
            "this PyTorch was built without gloo, which several CPU ranks need: install another"
        )
    return torch, dist
