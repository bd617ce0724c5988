"""Beyond the conformance suite: the all-reduce is started at a push and waited for at the next pull."""

import threading
from typing import Any

import pytest
import torch

from lightning_easgd.algorithms import EASGD
from lightning_easgd.communication import all_reduce
from lightning_easgd.communication._c10d import new_group
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.rules import Addition
from tests.helpers import TIMEOUT, run_threads


class _GatedWork:
    """An operation that is not complete before ``gate`` opens."""

    def __init__(self, work: Any, gate: threading.Event) -> None:
        self._work, self._gate = work, gate

    def wait(self, timeout: Any) -> bool:
        assert self._gate.is_set(), "waited for an all-reduce that cannot be complete yet"
        return bool(self._work.wait(timeout))

    def get_future(self) -> Any:
        return self._work.get_future()


class _GatedGroup:
    def __init__(self, group: Any, gate: threading.Event) -> None:
        self._group, self._gate = group, gate

    def broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        return self._group.broadcast(tensor, root)

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        self._gate.clear()
        return _GatedWork(self._group.allreduce(tensors), self._gate)


def test_an_exchange_is_waited_for_only_at_the_next(monkeypatch):
    """The gate opens in the last local step of a period: a wait before the next exchange fails the test."""
    gates = [threading.Event() for _ in range(2)]
    monkeypatch.setattr(
        all_reduce, "new_group", lambda store, rank, *rest: _GatedGroup(new_group(store, rank, *rest), gates[rank])
    )
    period = 5

    def body(replica, store):
        parameter = torch.ones(7)
        vector = ParameterVector([parameter])
        center = all_reduce.AllReduce().open(
            vector.read(), replica=replica, num_replicas=2, rule=Addition(), store=store, timeout=TIMEOUT
        )
        algorithm = EASGD(period=period)
        with center:
            for step in range(6 * period):

                def local_update(last=step % period == period - 1):
                    parameter.mul_(0.9 + 0.01 * replica)
                    if last:
                        gates[replica].set()

                algorithm.step(vector, center, local_update)
            center.drain()
        return center.traffic

    for traffic in run_threads(body, 2):
        assert traffic.exchanges == 6


def test_a_slow_collective_behind_a_period_of_compute_adds_no_exposed_wait(monkeypatch):
    """It is over before the next exchange asks for it: the wait is nothing, the hidden time is all of it."""
    completed = [threading.Event() for _ in range(2)]

    class _Observed(_GatedGroup):
        def allreduce(self, tensors):
            work = self._group.allreduce(tensors)
            work.get_future().add_done_callback(lambda _: self._gate.set())
            return work

    monkeypatch.setattr(
        all_reduce, "new_group", lambda store, rank, *rest: _Observed(new_group(store, rank, *rest), completed[rank])
    )

    def body(replica, store):
        parameter = torch.ones(200_000)
        vector = ParameterVector([parameter])
        center = all_reduce.AllReduce().open(
            vector.read(), replica=replica, num_replicas=2, rule=Addition(), store=store, timeout=TIMEOUT
        )
        algorithm = EASGD(period=1)
        with center:
            for _ in range(5):

                def local_update():  # compute that lasts as long as the collective, whatever that takes here
                    assert completed[replica].wait(TIMEOUT.total_seconds())
                    completed[replica].clear()

                algorithm.step(vector, center, local_update)
            center.drain()
        return center.traffic

    for traffic in run_threads(body, 2):
        assert traffic.hidden_s > 0
        assert traffic.exposed_s < 0.2 * traffic.hidden_s


@pytest.mark.parametrize(("num_replicas", "share"), [(1, 0), (2, 1), (4, 1.5)])
def test_bytes_are_those_of_a_ring(num_replicas, share):
    def body(replica, store):
        center = all_reduce.AllReduce().open(
            torch.zeros(1000), replica=replica, num_replicas=num_replicas, rule=Addition(), store=store, timeout=TIMEOUT
        )
        with center:
            for _ in range(3):
                center.push(torch.ones(1000), read_at=center.pull().clock)
            center.drain()
        return center.traffic.bytes_sent

    # 1000 numbers, and how many deltas there are in the sum.
    assert run_threads(body, num_replicas) == [3 * int(share * 4004)] * num_replicas
