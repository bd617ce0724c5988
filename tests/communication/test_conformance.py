"""What every transport must do. A new transport adds one line to ``TRANSPORTS`` and passes, or is not merged.

Where an asynchronous center does otherwise by nature, a test asserts either side. Its steps are then ordered through
the store; a synchronous center needs no order, and is not disturbed by one.
"""

import os
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from lightning_easgd.algorithms import Snapshot
from lightning_easgd.communication import (
    AllReduce,
    NonFiniteDeltaError,
    ParameterServer,
    Transport,
    TransportError,
)
from lightning_easgd.communication.shared_memory import SharedMemory
from lightning_easgd.rules import Addition, CenterRule, OuterOptimizer
from tests.centers import Apart, InPairs, meet, open_center
from tests.helpers import SOON_S, TIMEOUT, Replicas, run_replicas, run_threads, shorten

TRANSPORTS = [AllReduce(), AllReduce(shared_memory=False), SharedMemory(), Apart(), InPairs()]

pytestmark = pytest.mark.parametrize("transport", TRANSPORTS, ids=repr)


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
                meet(store, f"{n} pushed")
                read.append(copy(center.pull()))
                meet(store, f"{n} pulled")
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
            center.drain()
            meet(store, "pushed")
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.arange(100_000.0) + 2)


def test_an_empty_vector_is_a_center_too(transport):
    def body(replica, store):
        with open_center(transport, replica, store, size=0) as center:
            center.push(torch.empty(0), read_at=center.pull().clock)
            center.drain()
            meet(store, "pushed")
            return center.pull().clock

    assert run_threads(body, 2) == [2, 2]


class Halving(CenterRule):
    """Halves each delta."""

    def weight(self, staleness: int) -> float:
        return 0.5

    def apply_(self, center: torch.Tensor, delta: torch.Tensor, *memory: torch.Tensor, alpha: float = 1.0) -> None:
        center.add_(delta, alpha=alpha)


@pytest.mark.parametrize("by_exchange", [False, True])
def test_the_rules_weight_is_applied_once(transport, by_exchange):
    def body(replica, store):
        with open_center(transport, replica, store, rule=Halving()) as center:
            if by_exchange:
                center.exchange(torch.ones(5), lambda x, c: None).wait()
            else:
                center.push(torch.ones(5), read_at=center.pull().clock)
            center.drain()
            meet(store, "pushed")
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.arange(5.0) + 1.0)


class ByStaleness(CenterRule):
    """Divides a delta by the additions since its reading, itself included; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def weight(self, staleness: int) -> float:
        self.asked.append(staleness)
        return 1 / (1 + staleness)

    def apply_(self, center: torch.Tensor, delta: torch.Tensor, *memory: torch.Tensor, alpha: float = 1.0) -> None:
        center.add_(delta, alpha=alpha)


def test_staleness_counts_the_additions_since_the_reading(transport):
    """All read, then replica 0 adds, then 1, then 2: with no lock step, each comes later than the one before."""

    def body(replica, store):
        rule = ByStaleness()
        with open_center(transport, replica, store, rule=rule, num_replicas=3) as center:
            read_at = center.pull().clock
            meet(store, "read", 3)
            if replica > 0 and not transport.synchronous:
                store.wait([f"added/{replica - 1}"], TIMEOUT)
            center.push(torch.full((5,), 6.0), read_at=read_at)
            center.drain()
            store.set(f"added/{replica}", "")
            meet(store, "added", 3)
            return rule.asked, copy(center.pull()), center.traffic.staleness

    asked, snapshots, staleness = zip(*run_threads(body, 3), strict=True)
    expected = [0, 0, 0] if transport.synchronous else [0, 1, 2]
    if not isinstance(transport, ParameterServer):  # whose server has a copy of the rule
        assert asked == tuple([n] for n in expected)
    assert staleness == tuple(expected)
    for snapshot in snapshots:
        assert torch.equal(snapshot.value, torch.arange(5.0) + sum(6 / (1 + n) for n in expected))
        assert snapshot.clock == 3


def halve_the_distance(x: torch.Tensor, center: torch.Tensor) -> None:
    x.sub_(center).mul_(0.5)


def test_an_exchange_reads_and_adds_as_one(transport):
    """Both at once where the center is synchronous; else replica 1 meets the center that replica 0 has moved."""

    def body(replica, store):
        with open_center(transport, replica, store) as center:
            if replica == 1 and not transport.synchronous:
                store.wait(["first"], TIMEOUT)
            x = torch.full((5,), 8.0 * (replica + 1))
            delta = center.exchange(x, halve_the_distance, scale=0.25).wait()
            same = delta.data_ptr() == x.data_ptr()
            center.drain()
            if replica == 0:
                store.set("first", "")
            meet(store, "exchanged")
            return delta.clone(), same, copy(center.pull()), center.traffic.exchanges

    (delta0, same0, snapshot0, n0), (delta1, same1, snapshot1, n1) = run_threads(body, 2)
    start = torch.arange(5.0)
    assert (same0, same1, n0, n1) == (True, True, 1, 1)
    assert torch.equal(delta0, (8 - start) / 2)
    seen_by_1 = start if transport.synchronous else start + delta0 / 4
    assert torch.equal(delta1, (16 - seen_by_1) / 2)
    for snapshot in (snapshot0, snapshot1):
        assert torch.equal(snapshot.value, start + delta0 / 4 + delta1 / 4)
        assert snapshot.clock == 2


def test_borrowing_reads_nothing(transport):
    """To learn how long the vector is, nobody needs the center's numbers."""

    def body(replica, store):
        with open_center(transport, replica, store) as center:
            before = center.clock, center.traffic.bytes_sent
            if replica == 0 and not transport.synchronous:
                center.push(torch.ones(5), read_at=0)
                center.drain()
            meet(store, "added")
            x = center.borrow()
            assert (x.shape, x.dtype) == ((5,), torch.float32)
            assert center.borrow().data_ptr() == x.data_ptr()
            after = center.clock, center.traffic.bytes_sent
            meet(store, "borrowed")
            return before, after

    before, after = run_threads(body, 2)[1]
    assert after == before


def test_slots_are_summed_with_the_exchange(transport):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            before = center.announced.clone()
            center.announcement[replica] = 3.0
            center.push(torch.zeros(5), read_at=center.pull().clock)
            center.drain()
            meet(store, "announced")
            center.pull()
            return before, center.announced.clone()

    for before, after in run_threads(body, 2):
        assert torch.equal(before, torch.zeros(2))
        assert torch.equal(after, torch.tensor([3.0, 3.0]))


def test_the_slots_hold_what_each_announced_last(transport):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            for n in range(3):
                center.announcement.fill_(10.0 * n + replica)
                center.abstain()
                center.drain()
            meet(store, "announced")
            center.pull()
            return center.announced.clone()

    for announced in run_threads(body, 2):
        assert torch.equal(announced, torch.tensor([41.0, 41.0]))


def test_an_abstention_adds_nothing_and_answers_a_push(transport):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            snapshot = center.pull()
            if replica == 0:
                center.push(torch.ones(5), read_at=snapshot.clock)
            else:
                center.abstain()
            center.drain()
            meet(store, "pushed")
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
            center.drain()
            meet(store, "pushed")
            return copy(center.pull())

    for snapshot in run_threads(body, 2):
        assert torch.equal(snapshot.value, torch.arange(5.0) + 1)
        assert snapshot.clock == (2 if transport.synchronous else 1)  # a turn is a turn; else nothing was added


def test_an_exchange_that_is_not_finite_leaves_the_center_alone(transport):
    def body(replica, store):
        with open_center(transport, replica, store, size=300_000) as center:
            if replica == 1:
                x = torch.ones(300_000)
                x[299_000] = float("nan")
                x[7] = float("inf")
                with pytest.raises(NonFiniteDeltaError, match=r"replica 1: 2 of 300000 numbers in its delta"):
                    center.exchange(x, halve_the_distance).wait()
                center.abstain()
            else:
                center.exchange(torch.arange(300_000.0) + 2, halve_the_distance).wait()
            center.drain()
            meet(store, "exchanged")
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        torch.testing.assert_close(value, torch.arange(300_000.0) + 1, rtol=1e-6, atol=1e-6)


def test_a_replica_that_never_comes_is_missed_within_the_timeout(transport):
    began = time.monotonic()
    with pytest.raises(TransportError, match="replica 0 of 2 could not open the"):
        open_center(transport, 0, dist.HashStore(), timeout=timedelta(seconds=1))
    assert time.monotonic() - began < SOON_S


def test_a_replica_that_never_pushes_holds_up_only_a_synchronous_center(transport):
    def body(replica, store):
        with open_center(transport, replica, store) as center:
            if replica == 0:
                if transport.synchronous:
                    shorten(center, timedelta(seconds=2))
                began = time.monotonic()
                center.push(torch.ones(5), read_at=center.pull().clock)
                if transport.synchronous:
                    with pytest.raises(TransportError, match="replica 0 of 2: the all-reduce .* did not complete"):
                        center.pull()
                else:
                    center.drain()
                    center.pull()
                store.set("over", "1")
                return time.monotonic() - began, center.value.clone()
            store.get("over")
            return 0.0, center.value.clone()

    (waited, value), _ = run_threads(body, 2)
    assert waited < SOON_S
    # Nothing of a failed exchange is applied.
    assert torch.equal(value, torch.arange(5.0) + (0 if transport.synchronous else 1))


def test_close_is_idempotent_and_the_transport_opens_again(transport):
    def body(replica, store):
        values = []
        for n in range(2):
            center = open_center(transport, replica, dist.PrefixStore(str(n), store))
            center.push(torch.ones(5), read_at=center.pull().clock)
            center.drain()
            meet(store, f"{n} pushed")
            values.append(center.pull().value.clone())
            center.close()
            center.close()
            with pytest.raises(TransportError, match="closed"):
                center.push(torch.ones(5), read_at=2)
            with pytest.raises(TransportError, match="closed"):
                center.abstain()
            with pytest.raises(TransportError, match="closed"):
                center.exchange(torch.ones(5), halve_the_distance)
        return values

    for first, second in run_threads(body, 2):
        assert torch.equal(first, torch.arange(5.0) + 2)
        assert torch.equal(first, second)


class Momentum(CenterRule):
    """Remembers a vector, so that what comes depends on what came before."""

    num_vectors = 1

    def weight(self, staleness: int) -> float:
        return 1.0

    def apply_(self, center: torch.Tensor, delta: torch.Tensor, *memory: torch.Tensor, alpha: float = 1.0) -> None:
        center.add_(memory[0].mul_(0.5).add_(delta, alpha=alpha))


def test_an_exchange_in_which_all_abstain_is_none_for_the_rule(transport):
    """A rule with momentum would move the center once more."""

    def body(replica, store):
        with open_center(transport, replica, store, rule=Momentum()) as center:
            if replica == 0:
                center.push(torch.ones(5), read_at=center.pull().clock)
            else:
                center.abstain()
            center.drain()
            meet(store, "pushed")
            before = center.pull().value.clone()
            center.abstain()
            center.drain()
            meet(store, "abstained")
            return before, center.pull().value.clone()

    for before, after in run_threads(body, 2):
        assert torch.equal(before, torch.arange(5.0) + 1)
        assert torch.equal(after, before)


def test_a_restored_center_goes_on_as_if_it_had_never_stopped(transport):
    """Value, clock and the rule's vector; where they differ, those of replica 0 count."""

    def body(replica, store):
        def push(center, name):
            center.push(torch.full((5,), 4.0), read_at=center.pull().clock)
            center.drain()
            meet(store, name)
            return copy(center.pull())

        with open_center(transport, replica, dist.PrefixStore("0", store), rule=Momentum()) as center:
            push(center, "first")
            state, value = center.state_dict(), center.value.clone()
            meet(store, "saved")
            expected = push(center, "second")
        with open_center(transport, replica, dist.PrefixStore("1", store), rule=Momentum()) as center:
            center.load_state_dict(state, value)
            restored = center.clock, center.value.clone(), center.traffic.exchanges
            meet(store, "restored")
            return state["clock"], value, restored, expected, push(center, "third")

    for clock, value, restored, expected, found in run_threads(body, 2):
        assert restored[0] == clock == 2
        assert torch.equal(restored[1], value)
        assert restored[2] == 1
        assert torch.equal(found.value, expected.value)
        assert found.clock == expected.clock == 4


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


def test_a_rule_that_needs_all_deltas_at_once_is_refused_where_they_come_apart(transport):
    store = dist.HashStore()
    rule = OuterOptimizer(partial(torch.optim.SGD, lr=0.5))
    if transport.synchronous:
        with open_center(transport, 0, store, num_replicas=1, rule=rule) as center:
            center.push(torch.ones(5), read_at=0)
            assert torch.equal(center.pull().value, torch.arange(5.0) + 0.5)
    else:
        with pytest.raises(ValueError, match=r"open\(rule=.*needs a synchronous transport"):
            open_center(transport, 0, store, num_replicas=1, rule=rule)


def _sum_in_processes(replica: int, transport: Transport, path: str) -> torch.Tensor:
    store = dist.FileStore(path, 3)
    with open_center(transport, replica, store, num_replicas=3, size=1000) as center:
        for _ in range(20):
            center.push(torch.full((1000,), 0.125 * (replica + 1)), read_at=center.pull().clock)
        center.drain()
        meet(store, "pushed", 3)
        return center.pull().value.clone()


def test_processes_hold_the_same_center_to_the_last_bit(transport, tmp_path):
    values = run_replicas(_sum_in_processes, 3, transport, str(tmp_path / "store"))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert torch.equal(values[0], torch.arange(1000.0) + 15.0)  # all of it exact, in any order


def _lose_a_peer(replica: int, transport: Transport, path: str) -> None:
    store = dist.FileStore(path, 2)
    center = open_center(transport, replica, store)
    center.push(torch.ones(5), read_at=center.pull().clock)
    center.drain()
    meet(store, "pushed")
    assert center.lost() == []
    meet(store, "looked")
    if replica == 1:
        os._exit(3)  # as if killed: no destructor runs
    deadline = time.monotonic() + SOON_S
    with center:
        while not transport.synchronous and center.lost() != [1]:
            assert time.monotonic() < deadline, f"lost: {center.lost()}"
            time.sleep(0.01)  # between two looks
        try:
            center.push(torch.ones(5), read_at=2)
            assert torch.equal(center.pull().value, torch.arange(5.0) + 3)
        except TransportError:
            if time.monotonic() > deadline:
                os._exit(4)
            raise


def test_the_death_of_a_peer_is_noticed_at_once(transport, tmp_path):
    """A synchronous center cannot go on and raises; another names the replica and goes on."""
    replicas = Replicas(_lose_a_peer, 2, transport, str(tmp_path / "store"))
    if transport.synchronous:
        assert replicas.join() == [1, 3]
        assert "TransportError: replica 0 of 2" in replicas.error(0)
    else:
        assert replicas.join() == [0, 3], replicas.error(0)
