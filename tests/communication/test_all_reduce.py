"""Beyond the conformance suite: the all-reduce goes on beside the caller, from a push to the next pull."""

import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_easgd.algorithms import EASGD
from lightning_easgd.communication import AllReduce, NonFiniteDeltaError, OpenCenter, TransportError, _flight
from lightning_easgd.communication._c10d import Group, Store, new_group
from lightning_easgd.communication.all_reduce import _replicated_center
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.rules import Addition, CenterRule, MomentumCenter
from tests import centers
from tests.helpers import SOON_S, TIMEOUT, peak_bytes, run_replicas, run_threads, shorten


class _Gate(threading.Event):
    """Says when somebody stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(timeout)


class _GatedWork:
    """An operation that nobody sees complete before ``gate`` opens."""

    def __init__(self, work: Any, gate: threading.Event) -> None:
        self._work, self._gate = work, gate

    def wait(self, timeout: timedelta) -> bool:
        assert self._gate.wait(timeout.total_seconds()), "the gate stayed shut"
        return bool(self._work.wait(timeout))


class _GatedGroup:
    """A group whose all-reduces seem to last until ``gate`` opens."""

    def __init__(self, group: Group, gate: threading.Event) -> None:
        self._group, self._gate = group, gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        return _GatedWork(self._group.allreduce(tensors), self._gate)


each_way = pytest.mark.parametrize("shared_memory", [True, False], ids=["memory", "sockets"])


def open_center(
    replica: int,
    store: Store,
    initial: torch.Tensor,
    *,
    num_replicas: int = 2,
    rule: CenterRule | None = None,
    timeout: timedelta = TIMEOUT,
    shared_memory: bool = True,
) -> OpenCenter:
    transport = AllReduce(shared_memory=shared_memory)
    return centers.open_center(
        transport, replica, store, num_replicas, initial=initial, rule=rule, timeout=timeout, num_slots=0
    )


@each_way
def test_an_exchange_is_waited_for_only_at_the_next(monkeypatch, shared_memory):
    """The gate opens in the last local step of a period: a wait before the next exchange fails the test."""
    gates = [threading.Event() for _ in range(2)]
    monkeypatch.setattr(
        _replicated_center,
        "new_group",
        lambda store, rank, *rest: _GatedGroup(new_group(store, rank, *rest), gates[rank]),
    )
    period = 5

    def body(replica, store):
        parameter = torch.ones(7)
        vector = ParameterVector([parameter])
        algorithm = EASGD(period=period)
        with open_center(replica, store, vector.read(), shared_memory=shared_memory) as center:
            for step in range(6 * period):

                def local_update(step=step):
                    parameter.mul_(0.9 + 0.01 * replica)
                    if step % period == 0:  # the exchange of this step has begun, and the one before is over
                        gates[replica].clear()
                    elif step % period == period - 1:
                        gates[replica].set()

                algorithm.step(vector, center, local_update)
            center.drain()
        return center.traffic

    for traffic in run_threads(body, 2):
        assert traffic.exchanges == 6


@each_way
def test_a_slow_collective_behind_a_period_of_compute_adds_no_exposed_wait(monkeypatch, shared_memory):
    """It is over before the next exchange asks for it: the wait is nothing, the hidden time is all of it."""
    gates = [threading.Event() for _ in range(2)]
    monkeypatch.setattr(
        _replicated_center,
        "new_group",
        lambda store, rank, *rest: _GatedGroup(new_group(store, rank, *rest), gates[rank]),
    )
    hours = [0]  # that the clock has been put forward, while both replicas computed
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600 * hours[0])
    monkeypatch.setattr(_flight, "time", clock)
    computing = threading.Barrier(2, lambda: hours.__setitem__(0, hours[0] + 1), TIMEOUT.total_seconds())

    def body(replica, store):
        parameter = torch.ones(200_000)
        vector = ParameterVector([parameter])
        algorithm = EASGD(period=2)
        with open_center(replica, store, vector.read(), shared_memory=shared_memory) as center:
            for step in range(10):

                def local_update(in_between=step % 2 == 1):
                    if in_between:  # compute that lasts as long as the collective
                        computing.wait()
                        gates[replica].set()
                        assert center._flight[0].is_over(TIMEOUT)
                        gates[replica].clear()

                algorithm.step(vector, center, local_update)
            center.drain()
        return center.traffic

    for traffic in run_threads(body, 2):
        assert traffic.hidden_s > 5 * 3600
        assert traffic.exposed_s < 0.2 * traffic.hidden_s


@each_way
@pytest.mark.parametrize(("num_replicas", "share"), [(1, 0), (2, 1), (4, 1.5)])
def test_bytes_are_those_of_a_ring(num_replicas, share, shared_memory):
    def body(replica, store):
        initial = torch.zeros(1000)
        with open_center(replica, store, initial, num_replicas=num_replicas, shared_memory=shared_memory) as center:
            for _ in range(3):
                center.push(torch.ones(1000), read_at=center.pull().clock)
            center.drain()
        return center.traffic.bytes_sent

    # How many deltas there are in the sum, and 1000 numbers, or twice one for an all-reduce that only says something.
    message = 4 + (8 if shared_memory else 4000)
    assert run_threads(body, num_replicas) == [3 * int(share * message)] * num_replicas


@each_way
@pytest.mark.parametrize("rule", [Addition, lambda: MomentumCenter(0.5)], ids=["Addition", "MomentumCenter"])
@pytest.mark.parametrize("numel", [7, 100_000])
def test_a_lent_vector_is_exchanged_like_the_callers_own(rule, numel, shared_memory, monkeypatch):
    """In one chunk and in many; the force stands until it is given back, however long that takes."""
    monkeypatch.setitem(_replicated_center._CHUNK_BYTES, "cpu", 8192)

    def body(replica, store, lent):
        generator = torch.Generator().manual_seed(replica)
        own = torch.empty(numel)
        forces = []
        with open_center(replica, store, torch.ones(numel), rule=rule(), shared_memory=shared_memory) as center:
            for _ in range(3):
                x = center.borrow() if lent else own
                x.normal_(generator=generator)
                pending = center.exchange(x, torch.Tensor.sub_, scale=0.3)
                center._flight[0].is_over(timedelta(seconds=0.05))  # as far as it comes while the force is needed
                forces.append(pending.wait().clone())
                if lent:
                    pending.done()
            return forces, center.pull().value.clone()

    lent, own = run_threads(body, 2, True), run_threads(body, 2, False)
    for (forces, value), (expected_forces, expected) in zip(lent, own, strict=True):
        if shared_memory:  # who sums a lent vector multiplies it, too, and rounds once for both
            torch.testing.assert_close(torch.stack(forces), torch.stack(expected_forces))
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(torch.stack(forces), torch.stack(expected_forces))
            assert torch.equal(value, expected)
    assert torch.equal(lent[0][1], lent[1][1])


def test_a_lent_vector_that_is_not_given_back_is_the_centers_at_its_next_operation():
    def body(replica, store):
        with open_center(replica, store, torch.zeros(5)) as center:
            center.exchange(center.borrow().fill_(2.0 + replica), torch.Tensor.sub_)
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.full((5,), 5.0))


def test_a_lent_vector_that_is_not_finite_is_refused():
    def body(replica, store):
        with open_center(replica, store, torch.zeros(5)) as center:
            x = center.borrow().fill_(1.0)
            if replica == 1:
                x[3] = float("nan")
                with pytest.raises(NonFiniteDeltaError, match="replica 1: 1 of 5 numbers"):
                    center.exchange(x, torch.Tensor.sub_)
                center.abstain()
            else:
                center.exchange(x, torch.Tensor.sub_).done()
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.ones(5))


@each_way
def test_a_failed_exchange_leaves_the_center_whole(monkeypatch, shared_memory):
    """Replica 1 sends some chunks and is gone; replica 0 has some of the sum, and none of it in its center."""
    monkeypatch.setitem(_replicated_center._CHUNK_BYTES, "cpu", 4096)
    gone = threading.Event()

    def body(replica, store):
        with open_center(replica, store, torch.zeros(10_000), shared_memory=shared_memory) as center:
            center.push(torch.ones(10_000), read_at=0)
            before = center.pull().value.clone()
            if replica == 1:
                # Never given back: through sockets as many chunks are sent as there are lanes.
                center.exchange(center.borrow().fill_(5.0), torch.Tensor.sub_)
                assert gone.wait(TIMEOUT.total_seconds())
                return before, before
            shorten(center, timedelta(seconds=2))
            center.push(torch.ones(10_000), read_at=2)
            began = time.monotonic()
            with pytest.raises(TransportError, match="replica 0 of 2: the all-reduce that began .* was not applied"):
                center.drain()
            gone.set()
            assert time.monotonic() - began < SOON_S
            with pytest.raises(TransportError, match="an all-reduce has failed before"):
                center.push(torch.ones(10_000), read_at=2)
            return before, center.value.clone()

    for before, after in run_threads(body, 2):
        assert torch.equal(before, torch.full((10_000,), 2.0))
        assert torch.equal(after, before)


def test_an_exchange_may_begin_in_inference_mode_and_go_on_outside():
    def body(replica, store):
        with open_center(replica, store, torch.zeros(5)) as center:
            with torch.inference_mode():
                center.abstain()
                center.drain()
            center.push(torch.ones(5), read_at=center.clock)
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.full((5,), 2.0))


@each_way
def test_close_does_not_wait_for_what_is_outstanding(monkeypatch, shared_memory):
    """The other replica never comes to the exchange; the thread ends with the operation's timeout at the latest."""
    gate = _Gate()
    monkeypatch.setattr(_replicated_center, "new_group", lambda *args: _GatedGroup(new_group(*args), gate))

    def body(replica, store):
        center = open_center(replica, store, torch.zeros(5), shared_memory=shared_memory)
        if replica == 0:
            center._group._group._set_default_timeout(timedelta(seconds=2))  # of the operation alone
            center.push(torch.ones(5), read_at=0)
            flight = center._flight[0]
            assert gate.reached.wait(TIMEOUT.total_seconds())
            center.close()
            assert not flight.is_over()  # it stands before the gate
            gate.set()
            assert flight.is_over(2 * TIMEOUT)
            store.set("closed", "")
        store.wait(["closed"], 2 * TIMEOUT)
        center.close()

    run_threads(body, 2)


def _grow(replica: int, path: str, numel: int, shared_memory: bool) -> float:
    """Returns by how much, in vectors, the most memory that was ever in use grew with exchanges of the lent vector."""
    parameters = torch.zeros(numel)
    open_one = partial(open_center, replica, shared_memory=shared_memory)
    with open_one(torch.distributed.FileStore(f"{path}/warm", 2), torch.zeros(1 << 21)) as center:
        for _ in range(2):  # what the group and its threads take once
            center.exchange(center.borrow().fill_(1.0), torch.Tensor.sub_).done()
        center.drain()
    before = peak_bytes()
    with open_one(torch.distributed.FileStore(f"{path}/store", 2), parameters) as center:
        for _ in range(3):
            pending = center.exchange(center.borrow().copy_(parameters), torch.Tensor.sub_, scale=0.5)
            parameters.add_(pending.wait(), alpha=-0.5)
            pending.done()
        center.drain()
    return (peak_bytes() - before) / (4 * numel)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@each_way
def test_an_exchange_takes_two_vectors_of_memory(tmp_path, shared_memory):
    """What a process has mapped of the others' memory counts, too."""
    for vectors in run_replicas(_grow, 2, str(tmp_path), 32 << 20, shared_memory):
        assert 1.8 < vectors < 2.25


def test_a_wire_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"AllReduce\(wire='float16'\): must be one of 'float32', 'bfloat16', 'int8'"):
        AllReduce(wire="float16")
    with pytest.raises(ValueError, match=r"AllReduce\(shared_memory='no'\): must be True or False"):
        AllReduce(shared_memory="no")
    assert repr(AllReduce()) == "AllReduce()"
    assert repr(AllReduce(wire="int8")) == "AllReduce(wire='int8')"
    assert repr(AllReduce(shared_memory=False)) == "AllReduce(shared_memory=False)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_delta_is_whole_until_the_device_has_read_it():
    """The host is a whole step ahead of the device: that it has given the vector back says nothing of the device."""
    d = 5 * (16 << 20) // 4
    center = open_center(0, dist.HashStore(), torch.zeros(d, device="cuda"), num_replicas=1)
    with center:
        pending = center.exchange(center.borrow().fill_(1), torch.Tensor.sub_, scale=0.5)
        torch.cuda._sleep(2_000_000_000)
        kept = pending.wait().clone()  # queued behind the sleep
        pending.done()
        center.drain()
        assert torch.equal(kept, torch.ones(d, device="cuda"))
        assert torch.equal(center.value, torch.full((d,), 0.5, device="cuda"))
