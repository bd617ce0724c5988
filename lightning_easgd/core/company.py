"""The processes of one job, as one of them sees it: who is there, and how they reach each other."""

import os
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_easgd.communication._c10d import Group, PrefixStore, Store, new_group
from lightning_easgd.communication._notice import Notice
from lightning_easgd.communication._rendezvous import Rendezvous
from lightning_easgd.core.ending import end_at_exit
from lightning_easgd.core.members import Layout, Members

__all__ = ["Company"]


class Company:
    """All ranks of a job, once they have found each other. Its groups are there between ``open`` and ``close``.

    Args:
        rendezvous: where they have met; it stays the caller's to close.
        layout: which ranks form which replica.
        device: of the parameters on this rank.
        timeout: the longest wait of any operation.

    Attributes:
        watch: what hears of the others' failures and requests: the rendezvous.
    """

    def __init__(self, rendezvous: Rendezvous, layout: Layout, *, device: torch.device, timeout: timedelta) -> None:
        self.watch, self.layout, self.device, self.timeout = rendezvous, layout, device, timeout
        self.rank = rendezvous.rank
        self._members: Members | None = None
        self._group: Group | None = None
        self._owns_watch = self._is_open = self._is_taken = self._is_closed = False

    @classmethod
    def from_environment(
        cls,
        *,
        device: torch.device | None = None,
        replica_size: int = 1,
        timeout: timedelta = timedelta(minutes=30),
    ) -> "Company":
        """Finds the other ranks: those of ``torch.distributed``'s default group, else those that torchrun has started.

        Collective and blocking. A process without a default group, and without ``RANK`` and ``WORLD_SIZE`` in its
        environment, is the whole job. The ``Elastic`` that opens a company closes it.

        Args:
            device: of the parameters on this rank. Default: the CPU.
            replica_size: ranks of a replica. Several of them train as one by the caller's DistributedDataParallel.
            timeout: the longest wait of any operation.

        Raises:
            RuntimeError: rank 0 is not there, or the environment says no rank.
            ValueError: ``replica_size`` does not divide the number of ranks.
        """
        is_grouped = dist.is_available() and dist.is_initialized()
        rank = dist.get_rank() if is_grouped else int(os.environ.get("RANK", "0"))
        world_size = dist.get_world_size() if is_grouped else int(os.environ.get("WORLD_SIZE", "1"))
        absent = [name for name in ("RANK", "MASTER_PORT") if name not in os.environ]
        if not is_grouped and world_size > 1 and absent:
            raise RuntimeError(
                f"Company.from_environment: WORLD_SIZE is {world_size}, but there is no {' and no '.join(absent)} in "
                "the environment; start the processes with torchrun, or make torch.distributed's default group first"
            )
        if replica_size < 1 or world_size % replica_size:
            raise ValueError(
                f"Company.from_environment(replica_size={replica_size}): must divide the number of ranks, {world_size}"
            )
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        connect = partial(Rendezvous, host, rank=rank, world_size=world_size, timeout=timeout)
        if is_grouped:
            told: list[Any] = [None]
            rendezvous = connect(None) if rank == 0 else None
            if rendezvous is not None:
                told = [rendezvous.port]
            dist.broadcast_object_list(told, 0)
            rendezvous = rendezvous or connect(told[0])
        elif world_size == 1:
            rendezvous = connect(None)
        else:
            notice = Notice(host, int(os.environ["MASTER_PORT"]), rank=rank, timeout=timeout)
            rendezvous = connect(None if rank == 0 else notice.read(), arrival=timeout)
            try:
                if rank == 0:
                    notice.post(rendezvous.port)
                rendezvous.roll_call.gather("start together", "")
            except BaseException:
                rendezvous.close()
                raise
        end_at_exit()
        cpu = torch.device("cpu")
        company = cls(rendezvous, Layout(world_size, replica_size), device=device or cpu, timeout=timeout)
        company._owns_watch = True
        return company

    @property
    def is_open(self) -> bool:
        """Whether the groups are there."""
        return self._is_open

    @property
    def replica(self) -> int:
        """Index of the replica that this rank belongs to."""
        return self.rank // self.layout.replica_size

    @property
    def num_replicas(self) -> int:
        """How many replicas there are."""
        return self.layout.num_replicas

    @property
    def members(self) -> Members:
        """The ranks of this replica."""
        assert self._members is not None
        return self._members

    @property
    def group(self) -> Group | None:
        """A process group over all ranks, for what is not a center's; None for a single rank."""
        return self._group

    def open(self) -> None:
        """Makes the groups. Collective and blocking.

        Raises:
            ValueError: it was closed.
        """
        if self._is_closed:
            raise ValueError("Company.open: it is closed; find the ranks anew with Company.from_environment()")
        self._members = Members(
            self.layout, self.rank, store=self.store("members"), device=self.device, timeout=self.timeout
        )
        if self.layout.world_size > 1:
            self._group = new_group(self.store("module"), self.rank, self.layout.world_size, self.device, self.timeout)
        self._is_open = True

    def take(self) -> None:
        """Says that its stores are one ``Elastic``'s from here on.

        Raises:
            ValueError: they are another one's.
        """
        if self._is_taken:
            raise ValueError("Elastic(company=...): this company is another Elastic's; each needs one of its own")
        self._is_taken = True

    def close(self) -> None:
        """Gives the groups back without waiting for anybody; one that has found its ranks by itself leaves them.

        Idempotent. For leaving, rank 0 waits until the others have left; see ``Rendezvous.close``.
        """
        if self._members is not None:
            self._members.close()
        self._members = self._group = None
        self._is_open, self._is_closed = False, True
        if self._owns_watch:
            self.watch.close()

    def store(self, purpose: str) -> Store:
        """Returns a key-value store of all ranks that is used for one purpose alone."""
        return PrefixStore(purpose, self.watch.store)

    def gather(self, purpose: str, mine: str) -> list[str]:
        """Waits for all ranks and returns what each has brought, in their order. Collective and blocking.

        Args:
            purpose: what all do, as in "the ranks could not ...".
            mine: what this rank brings.

        Raises:
            TransportError: not all came within the timeout; names who is missing.
        """
        return self.watch.roll_call.gather(purpose, mine)

    def agree(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether some rank has raised it. Collective and blocking: all ranks are here."""
        if self._group is None:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.float32, device=self.device)
        self._group.allreduce([raised]).wait()
        return [count > 0 for count in raised.tolist()]
