"""What couplings are opened with: their centers, the gate they pass, the communicator they share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.communication import AllReduce, OpenCenter
from lightning_easgd.communication._c10d import new_group
from lightning_easgd.communication._line import Line
from lightning_easgd.communication._turnstile import DoubleTurnstile, Turnstile
from lightning_easgd.core.company import Company
from lightning_easgd.core.coupling import Passage
from lightning_easgd.core.members import SharedTurnstile
from lightning_easgd.core.plan import Plan
from lightning_easgd.core.slots import num_slots
from lightning_easgd.gates import Gate, StaleSynchronous

__all__ = ["Opening", "mean_over_ranks"]


class Opening:
    """Opens centers and turnstiles for one replica. Collective: all ranks open the same ones in the same order.

    Args:
        plan: of the run.
        company: the processes of the job, open.
        num_centers: how many will be open at a time.
        closing: called with what closes each center.

    Attributes:
        line: the communicator that all centers share on a CUDA device; None where each has its own group.
    """

    def __init__(
        self, plan: Plan, company: Company, num_centers: int, closing: Callable[[Callable[[], None]], Any]
    ) -> None:
        self._plan, self._company, self._closing = plan, company, closing
        self.line = self._open_line(num_centers)

    def _open_line(self, size: int) -> Line | None:
        company = self._company
        if company.device.type != "cuda" or not isinstance(self._plan.transport, AllReduce):
            return None
        group = company.group if company.layout.replica_size == 1 else None
        if group is None:
            store = company.store(f"exchanges/{company.members.index}")
            group = new_group(store, company.replica, company.num_replicas, company.device, company.timeout)
        return Line(group, size, company.device, company.timeout)

    def center(self, name: str, initial: Tensor, index: int) -> OpenCenter:
        """Opens a center. Blocks for the others.

        Args:
            name: of this center alone.
            initial: (d,) replica 0's becomes the center.
            index: of its coupling.
        """
        company, algorithm = self._company, self._plan.algorithm
        transport: Any = self._plan.transport  # the argument ``place`` is AllReduce's own
        place = {} if self.line is None else {"place": self.line.place(index)}

        def open_slice(part: Tensor, member: int) -> OpenCenter:
            opened: OpenCenter = transport.open(
                part,
                replica=company.replica,
                num_replicas=company.num_replicas,
                rule=algorithm.rule(company.num_replicas),
                store=company.store(f"{name}/{member}"),
                timeout=company.timeout,
                num_slots=num_slots(company.num_replicas, algorithm.num_told),
                **place,
            )
            return opened

        center = company.members.open_center(name, initial, open_slice)
        self._closing(center.close)
        return center

    def turnstile(self, name: str) -> Passage | None:
        """Opens a way through the gate; None where nobody waits for another. Does not wait.

        Args:
            name: of this one alone.
        """
        company, algorithm = self._company, self._plan.algorithm
        gate: Gate | None = self._plan.gate
        if gate is None and not self._plan.is_synchronous:
            gate = algorithm.gate(company.num_replicas)
        if gate is None:
            return None
        open_one = partial(
            Turnstile,
            gate,
            replica=company.replica,
            num_replicas=company.num_replicas,
            timeout=company.timeout,
            check=company.watch.raise_if_failed,
        )
        turnstile: Turnstile | DoubleTurnstile
        turnstile = additions = open_one(company.store(name))
        # Where a step begins with reading and ends with adding, the gate is for both.
        if isinstance(gate, StaleSynchronous) and type(algorithm).begin is not Algorithm.begin:
            turnstile = DoubleTurnstile(additions, open_one(company.store(f"{name}/readings")))
        return SharedTurnstile(turnstile, company.members) if company.members.size > 1 else turnstile


def mean_over_ranks(company: Company, vector: Tensor) -> Tensor:
    """Sets a vector (d,) to its mean over all ranks, and returns it. Collective and blocking."""
    if company.group is not None and vector.numel() > 0:
        with torch.no_grad():
            company.group.allreduce([vector]).wait()
            vector /= company.layout.world_size
    return vector
