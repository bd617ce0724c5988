"""The ranks that train one replica together, and the decisions that they must agree on.

Inside a replica the ranks are an ordinary ``DistributedDataParallel`` group: equal parameters, each its own part of a
batch. A decision that one rank made by itself (by a clock, or by reading a store) would make them differ. All members
therefore make a decision within an epoch together: each member raises its flags with every optimizer step, and all
members see the flags with the next step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_easgd.communication import OpenCenter
from lightning_easgd.communication._c10d import Group, PrefixStore, Store, Work, new_group
from lightning_easgd.communication._slices import open_sliced
from lightning_easgd.communication._turnstile import DoubleTurnstile, Turnstile

__all__ = ["Layout", "Members", "SharedTurnstile"]


@dataclass(frozen=True)
class Layout:
    """Which ranks are which replica: ``replica_size`` consecutive ones each.

    Attributes:
        world_size: number of ranks; a multiple of ``replica_size``.
        replica_size: ranks of a replica.
    """

    world_size: int
    replica_size: int

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return self.world_size // self.replica_size

    def ranks(self, replica: int) -> range:
        """Returns the ranks of a replica, member 0 first."""
        return range(replica * self.replica_size, (replica + 1) * self.replica_size)

    def describe(self, hosts: list[str] | None = None) -> str:
        """Returns the map in words, such as ``replica 0: ranks 0-3 (node1)``; ``hosts`` names each rank's."""
        lines = []
        for replica in range(self.num_replicas):
            ranks = self.ranks(replica)
            which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
            where = "" if hosts is None else f" ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks))})"
            lines.append(f"replica {replica}: {which}{where}")
        return "; ".join(lines)


class Members:
    """The ranks of one replica, as one of them sees them. Several ranks: it is collective among them to create it.

    Args:
        layout: of the job.
        rank: this process.
        store: for this alone, the same on all ranks of the job.
        device: of the parameters.
        timeout: the longest wait of any operation.

    Attributes:
        replica: index of the replica.
        index: of this rank in it; 0 speaks for the replica where one must.
        size: number of ranks in it.
    """

    def __init__(self, layout: Layout, rank: int, *, store: Store, device: torch.device, timeout: timedelta) -> None:
        self.replica, self.index = divmod(rank, layout.replica_size)
        self.size = layout.replica_size
        self._layout, self._timeout = layout, timeout
        self._ddp_group: dist.ProcessGroup | None = None
        self._group = self._control = None
        self._work: Work | None = None
        self._raised = torch.zeros(0)
        self._confined: list[nn.SyncBatchNorm] = []
        if self.size > 1:
            self._store = own = PrefixStore(f"replica/{self.replica}", store)
            self._group = new_group(PrefixStore("buffers", own), self.index, self.size, device, timeout)
            cpu = torch.device("cpu")  # what is read with every step must not wait for a GPU
            self._control = new_group(PrefixStore("control", own), self.index, self.size, cpu, timeout)

    @property
    def group(self) -> Group | None:
        """A process group of these ranks, for tensors on the device; None for a single one."""
        return self._group

    @property
    def ddp_group(self) -> dist.ProcessGroup:
        """A process group registered with ``torch.distributed``, for DDP and SyncBatchNorm.

        It is created on first access, which is a collective over all ranks. Each rank creates the groups of all
        replicas, as ``torch.distributed.new_group`` requires. The local synchronisation of ``new_group`` would name a
        group by its ranks alone, and a second ``fit`` would find the addresses of the first.
        """
        if self._ddp_group is None:
            for replica in range(self._layout.num_replicas):
                group = dist.new_group(list(self._layout.ranks(replica)), timeout=self._timeout)
                if replica == self.replica:
                    assert isinstance(group, dist.ProcessGroup)
                    self._ddp_group = group
        assert self._ddp_group is not None
        return self._ddp_group

    def agree(self, *flags: bool) -> list[bool]:
        """Returns, for each flag, whether any rank of the replica has raised it, the same on all of them.

        With several ranks the returned flags are those of the previous call, because the flags travel beside a step's
        work. Collective over the ranks of the replica; every call must have the same number of flags.
        """
        if self._control is None:
            return list(flags)
        heard = [False] * len(flags)
        if self._work is not None:
            self._work.wait(self._timeout)
            heard = [count > 0 for count in self._raised.tolist()]
        self._raised = torch.tensor(flags, dtype=torch.float32)
        self._work = self._control.allreduce([self._raised])
        return heard

    def wait(self) -> None:
        """Returns when all ranks of the replica have come here. Collective among them."""
        if self._control is not None:
            self._control.allreduce([torch.zeros(1)]).wait(self._timeout)

    def confine_batch_norm(self, module: nn.Module) -> None:
        """Confines every SyncBatchNorm of the module that has no group yet to this replica. Collective."""
        for layer in module.modules():
            if isinstance(layer, nn.SyncBatchNorm) and layer.process_group in (None, dist.group.WORLD):
                layer.process_group = self.ddp_group
                self._confined.append(layer)

    def open_center(self, name: str, initial: Tensor, open_slice: Callable[[Tensor, int], OpenCenter]) -> OpenCenter:
        """Opens a center that this replica's ranks reach together, each its slice.

        It has its own group, because the exchanges of two centers may proceed in either order.

        Args:
            name: of this center alone.
            initial: (d,) the center.
            open_slice: ``open_slice(initial, index)`` opens the ``index``-th slice with those of the other replicas.
        """
        if self._group is None:
            return open_slice(initial, 0)
        return open_sliced(
            initial,
            lambda part: open_slice(part, self.index),
            new_group(PrefixStore(name, self._store), self.index, self.size, initial.device, self._timeout),
            member=self.index,
            replica_size=self.size,
            timeout=self._timeout,
        )

    def close(self) -> None:
        """Gives the groups back without waiting for anybody. Idempotent."""
        control, work = self._control, self._work
        # A group waits for its operations when it is destroyed; one that a lost peer never answers must not hold us.
        if control is not None and work is not None and not work.is_completed() and hasattr(control, "abort"):
            control.abort()
        self._group = self._control = self._work = None
        for layer in self._confined:
            layer.process_group = None
        self._confined.clear()
        if self._ddp_group is not None and dist.is_initialized():
            dist.destroy_process_group(self._ddp_group)
        self._ddp_group = None


class SharedTurnstile:
    """A turnstile that all ranks of a replica pass together, as one.

    Args:
        turnstile: of the replica.
        members: the ranks.

    Attributes:
        waited_s: seconds spent waiting so far.
    """

    def __init__(self, turnstile: Turnstile | DoubleTurnstile, members: Members) -> None:
        self._turnstile, self._members = turnstile, members

    @property
    def waited_s(self) -> float:
        """Seconds that this replica's member 0 has waited so far; 0 in the others."""
        return self._turnstile.waited_s

    def enter(self) -> None:
        """See ``Turnstile.enter``."""
        if self._members.index == 0:
            self._turnstile.enter()
        self._members.wait()

    def has_read(self) -> None:
        """See ``Turnstile.has_read``."""
        if self._members.index == 0:
            self._turnstile.has_read()

    def enter_addition(self) -> None:
        """See ``Turnstile.enter_addition``."""
        if self._members.index == 0:
            self._turnstile.enter_addition()
        self._members.wait()

    def advance(self) -> None:
        """See ``Turnstile.advance``."""
        if self._members.index == 0:
            self._turnstile.advance()

    def leave(self) -> None:
        """See ``Turnstile.leave``."""
        if self._members.index == 0:
            self._turnstile.leave()

    def begin_round(self, number: int) -> None:
        """See ``Turnstile.begin_round``."""
        if self._members.index == 0:
            self._turnstile.begin_round(number)
