"""What every transport must do. A new transport adds one line to ``TRANSPORTS`` and passes, or is not merged."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_easgd.algorithms import Snapshot
from lightning_easgd.communication import AllReduce, NonFiniteDeltaError, OpenCenter, Transport, TransportError
from lightning_easgd.rules import Addition, CenterRule
from tests.helpers import TIMEOUT, Replicas, run_replicas, run_threads

TRANSPORTS = [AllReduce()]

pytestmark = pytest.mark.parametrize("transport", TRANSPORTS, ids=repr)


def open_center(
    transport: Transport,
    replica: int,
    store: dist.Store,
    *,
    size: int = 5,
    num_replicas: int = 2,
    rule: CenterRule | None = None,
    timeout: timedelta = TIMEOUT,
    dtype: torch.dtype = torch.float32,
    num_slots: int = 2,
) -> OpenCenter:
    return transport.open(
        torch.arange(size, dtype=dtype) + 10 * replica,
        replica=replica,
        num_replicas=num_replicas,
        rule=rule or Addition(),
        store=store,
        timeout=timeout,
        num_slots=num_slots,
    )


def copy(snapshot: Snapshot) -> Snapshot:
    return Snapshot(snapshot.value.clone(), snapshot.clock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_all_replicas_begin_with_replica_0s_value(transport, num_replicas, dtype):
    def body(replica, store):
        with open_center(transport, replica, store, num_replicas=num_replicas, dtype=dtype) as center:
            return copy(center.pull())

    for snapshot in run_threads(body, num_replicas):
        assert torch.equal(snapshot.value, torch.arange(5, dtype=dtype))
        assert snapshot.clock == 0


def test_deltas_add_up_and_the_clock_counts_them(transport):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            read = []
            for n in range(1, 4):
                center.push(torch.full((5,), float(n * (replica + 1))), read_at=center.pull().clock)
                center.drain()
                read.append(copy(center.pull()))
            return read

    for read in run_threads(body, 2):
        for n, snapshot in enumerate(read, start=1):
            assert torch.equal(snapshot.value, torch.arange(5.0) + 3 * n * (n + 1) / 2)
            assert snapshot.clock == 2 * n


def test_the_caller_may_overwrite_its_delta(transport):
    def body(replica, store):
        with open_center(transport, replica, store, size=100_000) as center:
            delta = torch.ones(100_000)
            center.push(delta, read_at=center.pull().clock)
            delta.fill_(float("nan"))
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.arange(100_000.0) + 2)


def test_an_empty_vector_is_a_center_too(transport):
    def body(replica, store):
        with open_center(transport, replica, store, size=0) as center:
            center.push(torch.empty(0), read_at=center.pull().clock)
            return center.pull().clock

    assert run_threads(body, 2) == [2, 2]


class Halving(CenterRule):
    """Counts how often its weight is asked for and applied."""

    def weight(self, staleness: int) -> float:
        assert staleness == 0
        return 0.5

    def apply_(self, center: torch.Tensor, delta: torch.Tensor, *memory: torch.Tensor) -> None:
        center.add_(delta)


def test_the_rules_weight_is_applied_once(transport):
    def body(replica, store):
        with open_center(transport, replica, store, rule=Halving()) as center:
            center.push(torch.ones(5), read_at=center.pull().clock)
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.arange(5.0) + 1.0)


def test_slots_are_summed_with_the_exchange(transport):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            before = center.announced.clone()
            center.announcement[replica] = 3.0
            center.push(torch.zeros(5), read_at=center.pull().clock)
            center.pull()
            return before, center.announced.clone()

    for before, after in run_threads(body, 2):
        assert torch.equal(before, torch.zeros(2))
        assert torch.equal(after, torch.tensor([3.0, 3.0]))


def test_an_abstention_adds_nothing_and_answers_a_push(transport):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            snapshot = center.pull()
            if replica == 0:
                center.push(torch.ones(5), read_at=snapshot.clock)
            else:
                center.abstain()
            return center.pull().value.clone(), center.traffic.exchanges

    (value0, exchanges0), (value1, exchanges1) = run_threads(body, 2)
    assert torch.equal(value0, torch.arange(5.0) + 1)
    assert torch.equal(value1, value0)
    assert (exchanges0, exchanges1) == (1, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_delta_that_is_not_finite_is_refused_and_named(transport, bad):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            delta = torch.ones(5)
            snapshot = center.pull()
            if replica == 1:
                delta[2] = bad
                with pytest.raises(NonFiniteDeltaError, match=r"replica 1: 1 of 5 numbers in its delta are not finite"):
                    center.push(delta, read_at=snapshot.clock)
                center.abstain()
            else:
                center.push(delta, read_at=snapshot.clock)
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.arange(5.0) + 1)


def test_a_replica_that_never_pushes_runs_the_others_into_the_timeout(transport):
    def body(replica, store):
        with open_center(transport, replica, store, timeout=timedelta(seconds=2)) as center:
            began = time.monotonic()
            if replica == 0:
                center.push(torch.ones(5), read_at=center.pull().clock)
                with pytest.raises(TransportError, match="replica 0 of 2: the all-reduce .* did not complete"):
                    center.pull()
                store.set("raised", "1")
                return time.monotonic() - began, center.value.clone()
            store.get("raised")
            return 0.0, center.value.clone()

    (waited, value), _ = run_threads(body, 2)
    assert waited < 8
    assert torch.equal(value, torch.arange(5.0))  # nothing of the failed exchange was applied


def test_close_is_idempotent_and_the_transport_opens_again(transport):
    def body(replica, store):
        values = []
        for n in range(2):
            center = open_center(transport, replica, dist.PrefixStore(str(n), store))
            center.push(torch.ones(5), read_at=center.pull().clock)
            values.append(center.pull().value.clone())
            center.close()
            center.close()
            with pytest.raises(TransportError, match="closed"):
                center.push(torch.ones(5), read_at=2)
        return values

    for first, second in run_threads(body, 2):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("initial", "replica", "text"),
    [
        (torch.zeros(3), 2, r"replica=2\): must be at least 0 and below 2"),
        (torch.zeros(3, dtype=torch.bfloat16), 0, r"initial=<torch.bfloat16, shape \(3,\)>\): must be one flat vector"),
        (torch.zeros(3, 3), 0, r"shape \(3, 3\)>"),
    ],
)
def test_bad_arguments_are_named(transport, initial, replica, text):
    with pytest.raises(ValueError, match=text):
        transport.open(
            initial, replica=replica, num_replicas=2, rule=Addition(), store=dist.HashStore(), timeout=TIMEOUT
        )


def _sum_in_processes(replica: int, transport: Transport, path: str) -> torch.Tensor:
    store = dist.FileStore(path, 3)
    with open_center(transport, replica, store, num_replicas=3, size=1000) as center:
        for _ in range(20):
            center.push(torch.full((1000,), 0.1 * (replica + 1)), read_at=center.pull().clock)
        return center.pull().value.clone()


def test_processes_hold_the_same_center_to_the_last_bit(transport, tmp_path):
    values = run_replicas(_sum_in_processes, 3, transport, str(tmp_path / "store"))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    torch.testing.assert_close(values[0], torch.arange(1000.0) + 12.0)


def _lose_a_peer(replica: int, transport: Transport, path: str) -> None:
    center = open_center(transport, replica, dist.FileStore(path, 2), timeout=timedelta(seconds=30))
    center.push(torch.ones(5), read_at=center.pull().clock)
    center.pull()
    if replica == 1:
        import os

        os._exit(3)  # as if killed: no destructor runs
    with center:
        center.push(torch.ones(5), read_at=2)
        center.pull()


def test_the_death_of_a_peer_is_noticed_at_once(transport, tmp_path):
    began = time.monotonic()
    replicas = Replicas(_lose_a_peer, 2, transport, str(tmp_path / "store"))
    assert replicas.join() == [1, 3]
    assert "TransportError: replica 0 of 2" in replicas.error(0)
    assert time.monotonic() - began < 25
