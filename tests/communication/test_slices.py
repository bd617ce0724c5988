"""A center whose slices the members of a replica carry is the center of as many replicas of one rank each."""

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_easgd.communication import AllReduce, NonFiniteDeltaError, OpenCenter, Transport, TransportError, _slices
from lightning_easgd.communication._c10d import Group, PrefixStore, new_group
from lightning_easgd.communication._slices import SlicedCenter, open_sliced
from lightning_easgd.communication.shared_memory import SharedCenter, SharedMemory
from lightning_easgd.rules import Addition, CenterRule, MomentumCenter
from tests import centers
from tests.centers import Apart, meet
from tests.helpers import SOON_S, TIMEOUT, run_threads, shorten

NUM_SLOTS = 2
ASYNCHRONOUS = [SharedMemory(), Apart()]

each_asynchronous = pytest.mark.parametrize("transport", ASYNCHRONOUS, ids=repr)
each_transport = pytest.mark.parametrize("transport", [AllReduce(), *ASYNCHRONOUS], ids=repr)


def open_center(
    rank: int,
    store: dist.Store,
    replica_size: int = 2,
    *,
    num_replicas: int = 2,
    size: int = 7,
    transport: Transport | None = None,
    rule: CenterRule | None = None,
    timeout: timedelta = TIMEOUT,
    dtype: torch.dtype = torch.float32,
    group: Group | None = None,
) -> SlicedCenter:
    replica, member = divmod(rank, replica_size)

    def open_slice(initial: torch.Tensor) -> OpenCenter:
        return centers.open_center(
            transport or AllReduce(),
            replica,
            PrefixStore(f"slice/{member}", store),
            num_replicas,
            initial=initial,
            rule=rule,
            timeout=timeout,
            num_slots=NUM_SLOTS,
        )

    return open_sliced(
        torch.arange(size, dtype=dtype) + 10 * replica,
        open_slice,
        group or members(rank, store, replica_size, timeout),
        member=member,
        replica_size=replica_size,
        timeout=timeout,
    )


def members(rank: int, store: dist.Store, replica_size: int, timeout: timedelta = TIMEOUT) -> Group:
    replica, member = divmod(rank, replica_size)
    return new_group(PrefixStore(f"members/{replica}", store), member, replica_size, torch.device("cpu"), timeout)


def pull_towards_(x: torch.Tensor, center: torch.Tensor) -> None:
    x.sub_(center)


def replace_by_one_(x: torch.Tensor, center: torch.Tensor) -> None:
    x.copy_(torch.ones_like(center))


def train(center: OpenCenter, replica: int) -> list[Any]:
    """All that may be done with a center; replica 1 abstains once, then all do. Returns what was read."""
    generator = torch.Generator().manual_seed(replica)
    size, read = center.value.numel(), []
    for n in range(8):
        center.announcement[:] = torch.tensor([replica + 1.0, 10.0 * n])
        if n == 5 or (n == 3 and replica == 1):
            center.abstain()
        elif n % 2:
            center.push(torch.randn(size, generator=generator), read_at=center.pull().clock)
        else:
            x = torch.randn(size, generator=generator)
            read.append(center.exchange(x, pull_towards_, scale=0.3).wait().clone())
        snapshot = center.pull()
        read += [snapshot.value.clone(), center.announced.clone(), torch.tensor(snapshot.clock)]
    return [*read, torch.tensor(center.traffic.exchanges)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("num_replicas", "replica_size"), [(2, 2), (3, 1), (1, 3), (2, 3)])
def test_it_is_the_center_of_as_many_replicas_of_one_rank(num_replicas, replica_size, size):
    """To the last bit among two replicas, whose sum has one order; a ring of more sums a slice in another one."""

    def sliced(rank, store):
        rule = MomentumCenter(0.9)
        with open_center(rank, store, replica_size, num_replicas=num_replicas, size=size, rule=rule) as center:
            replica, member = divmod(rank, replica_size)
            if member > 0:  # whose word does not count
                center.announcement = center.announcement.new_full((NUM_SLOTS,), float("nan"))
            return train(center, replica)

    def plain(replica, store):
        with centers.open_center(
            AllReduce(), replica, store, num_replicas, size, rule=MomentumCenter(0.9), num_slots=NUM_SLOTS
        ) as center:
            return train(center, replica)

    expected = run_threads(plain, num_replicas)
    found = run_threads(sliced, num_replicas * replica_size)
    for rank, read in enumerate(found):
        first = found[rank - rank % replica_size]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(read, first, strict=True))
        tolerance = 0.0 if num_replicas <= 2 else 1e-6
        torch.testing.assert_close(read, expected[rank // replica_size], rtol=tolerance, atol=tolerance)


def test_each_number_crosses_between_replicas_once():
    """The members' bytes are a plain replica's, but for the slots and the count of deltas, which each slice has."""
    sockets = AllReduce(shared_memory=False)

    def sliced(rank, store):
        with open_center(rank, store, size=1001, transport=sockets) as center:
            train(center, rank // 2)
            return center.traffic.bytes_sent

    def plain(replica, store):
        with centers.open_center(sockets, replica, store, size=1001, num_slots=NUM_SLOTS) as center:
            train(center, replica)
            return center.traffic.bytes_sent

    expected, _ = run_threads(plain, 2)
    found = run_threads(sliced, 4)
    assert found[0] + found[1] == found[2] + found[3] == expected + 8 * 4 * (1 + NUM_SLOTS)


def test_the_gathering_is_counted_as_time_stood_still(monkeypatch):
    behind = [0.0]  # seconds that the gatherings add to the clock
    clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: time.perf_counter() + behind[0])
    monkeypatch.setattr(_slices, "time", clock)

    class _Slow:
        def __init__(self, group: Any) -> None:
            self._group = group

        def allgather(self, *tensors: Any) -> Any:
            behind[0] += 1000  # a slow link
            return self._group.allgather(*tensors)

    def body(rank, store):
        with open_center(rank, store, 1, num_replicas=1, group=_Slow(members(rank, store, 1))) as center:
            before = center.traffic.exposed_s
            center.push(torch.ones(7), read_at=0)
            pushed = center.traffic.exposed_s
            center.drain()
            return pushed - before, center.traffic.exposed_s - pushed

    ((pushing, draining),) = run_threads(body, 1)
    assert pushing < 1000 <= draining


def test_nothing_is_gathered_until_an_exchange_is_completed():
    """What stands in the vector meanwhile is somebody else's: a replica and its center may have changed places."""

    def body(rank, store, trade):
        with open_center(rank, store, rule=MomentumCenter(0.9)) as center:
            center.push(torch.full((7,), 1.0 + rank // 2), read_at=center.pull().clock)
            center.drain()
            if trade:
                kept = center.value.clone()
                center.value.fill_(-1.0)
                center.drain()
                assert torch.equal(center.pull().value, torch.full((7,), -1.0))
                center.value.copy_(kept)
            center.push(torch.ones(7), read_at=center.pull().clock)
            return center.pull().value.clone()

    for found, expected in zip(run_threads(body, 4, True), run_threads(body, 4, False), strict=True):
        assert torch.equal(found, expected)


@each_transport
def test_a_restored_center_goes_on_as_if_it_had_never_stopped(transport):
    def body(rank, store):
        def push(center, name):
            center.push(torch.full((7,), 4.0), read_at=center.pull().clock)
            center.drain()
            meet(store, name, 4)
            return center.pull().value.clone()

        with open_center(rank, PrefixStore("0", store), transport=transport, rule=MomentumCenter(0.5)) as center:
            push(center, "first")
            state, value = center.state_dict(), center.value.clone()
            meet(store, "saved", 4)
            expected = push(center, "second")
        with open_center(rank, PrefixStore("1", store), transport=transport, rule=MomentumCenter(0.5)) as center:
            center.load_state_dict(state, value)
            restored = center.value.clone(), center.clock, center.traffic.exchanges
            meet(store, "restored", 4)
            return value, restored, expected, push(center, "third"), center.traffic.exchanges

    for value, restored, expected, found, exchanges in run_threads(body, 4):
        assert torch.equal(restored[0], value)
        assert restored[1:] == (2, 1)
        assert torch.equal(found, expected)
        assert exchanges == 2


@each_asynchronous
@pytest.mark.parametrize("size", [1, 1000])
def test_asynchronous_slices_lose_nothing_and_the_members_read_the_same(transport, size):
    def body(rank, store):
        replica, member = divmod(rank, 2)
        generator = torch.Generator().manual_seed(replica)
        added, read = torch.zeros(size, dtype=torch.float64), []
        with open_center(rank, store, size=size, transport=transport, dtype=torch.float64) as center:
            center.announcement.fill_((replica + 1.0) if member == 0 else float("nan"))
            for n in range(30):
                x = torch.randn(size, generator=generator, dtype=torch.float64)
                if n % 3:
                    added += 0.1 * center.exchange(x, pull_towards_, scale=0.1).wait()
                    read.append(x)
                else:
                    snapshot = center.pull()
                    read.append(snapshot.value.clone())
                    center.push(x, read_at=snapshot.clock)
                    added += x
                read.append(center.announced.clone())
            center.drain()
            meet(store, "done", 4)
            value = center.pull().value.clone()
            return read, added, value, center.clock, center.announced.clone(), center.traffic.exchanges

    found = run_threads(body, 4)
    for mine, theirs in (found[0:2], found[2:4]):
        assert all(torch.equal(a, b) for a, b in zip(mine[0], theirs[0], strict=True))
    total = torch.arange(size, dtype=torch.float64) + found[0][1] + found[2][1]
    for _, _, value, clock, announced, exchanges in found:
        torch.testing.assert_close(value, total)
        assert (clock, exchanges) == (60, 30)
        assert announced.tolist() == [3.0, 3.0]


@each_asynchronous
@pytest.mark.parametrize("drain", [False, True])
def test_another_operation_completes_an_exchange(transport, drain):
    def body(rank, store):
        with open_center(rank, store, transport=transport) as center:
            x = torch.zeros(7)
            pending = center.exchange(x, replace_by_one_)
            if drain:
                center.drain(TIMEOUT)
            else:
                center.abstain()
            completed = x.clone()
            assert pending.wait() is x
            return completed

    for completed in run_threads(body, 4):
        assert torch.equal(completed, torch.ones(7))


def test_a_drain_gives_its_timeout_to_the_slice(monkeypatch):
    given, drain = [], SharedCenter.drain

    def record(center, timeout=None):
        given.append(timeout)
        drain(center, timeout)

    monkeypatch.setattr(SharedCenter, "drain", record)

    def body(rank, store):
        with open_center(rank, store, transport=SharedMemory()) as center:
            center.exchange(torch.zeros(7), replace_by_one_)
            center.drain(timedelta(seconds=3))
            center.drain(timedelta(seconds=4))

    run_threads(body, 4)
    assert [given.count(timedelta(seconds=s)) for s in (3, 4)] == [4, 4]


def test_drift_is_measured_on_request():
    def body(rank, store):
        replica = rank // 2
        with open_center(rank, store, size=8, transport=SharedMemory()) as center:
            read_at = center.pull().clock
            meet(store, "read", 4)
            if replica == 1:
                center.push(torch.full((8,), 3.0), read_at=read_at)
                store.set(f"pushed/{rank}", "")
                return None
            store.wait(["pushed/2", "pushed/3"], TIMEOUT)
            center.measures_drift = True
            center.push(torch.ones(8), read_at=read_at)
            return center.traffic.drift, center.traffic.staleness

    assert run_threads(body, 4) == [(6.0, 1), (6.0, 1), None, None]  # of four numbers each


@each_transport
@pytest.mark.parametrize("by_exchange", [False, True])
def test_all_members_refuse_a_delta_that_is_not_finite(transport, by_exchange):
    """Though only member 1's slice has such a number."""

    def body(rank, store):
        with open_center(rank, store, transport=transport) as center:
            delta, read_at = torch.ones(7), center.pull().clock
            if rank >= 2:
                delta[6] = float("nan")
                push = partial(center.push, delta, read_at=read_at)
                exchange = partial(center.exchange, delta, pull_towards_)
                with pytest.raises(NonFiniteDeltaError, match="replica 1: 1 of 7 numbers in its delta are not finite"):
                    (exchange if by_exchange else push)()
                center.abstain()
            elif by_exchange:
                center.exchange(delta, replace_by_one_).wait()
            else:
                center.push(delta, read_at=read_at)
            center.drain()
            meet(store, "pushed", 4)
            return center.pull().value.clone()

    for value in run_threads(body, 4):
        assert torch.equal(value, torch.arange(7.0) + 1)


@pytest.mark.parametrize("complete", ["wait", "pull", "drain"])
def test_all_members_raise_if_one_slice_refuses_a_difference(complete):
    """Finite numbers whose difference is not: in the slice of member 1, which alone can see it."""

    def body(rank, store):
        with open_center(rank, store, num_replicas=1, transport=SharedMemory()) as center:
            far = torch.zeros(7)
            far[6] = -3e38
            center.push(far, read_at=center.pull().clock)
            before = center.pull().value.clone()
            pending = center.exchange(-far, pull_towards_)
            whose = "1 of 3 numbers" if rank else r"member 0 of 2: .* slices of the members \[1\] are not finite"
            with pytest.raises(NonFiniteDeltaError, match=whose):
                {"wait": pending.wait, "pull": center.pull, "drain": center.drain}[complete]()
            if complete != "wait":
                with pytest.raises(NonFiniteDeltaError, match=whose):
                    pending.wait()
            center.abstain()  # it goes on
            value = center.pull().value.clone()
            center.exchange(torch.zeros(7), replace_by_one_).wait()
            return before, value, center.pull().value.clone()

    for before, value, after in run_threads(body, 2):
        assert torch.equal(value[4:], before[4:])
        assert torch.equal(after, value + 1)


def expect_the_end(center: SlicedCenter, operation: Callable[[], object], text: str = "") -> None:
    """The operation fails, before it would by itself; the value stays whole, and nothing else can be done."""
    value, began = center.value.clone(), time.monotonic()
    with pytest.raises(TransportError, match=rf"replica \d of \d.*{text}"):
        operation()
    assert time.monotonic() - began < SOON_S
    assert torch.equal(center.value, value)
    assert center.announced.tolist() == [0.0] * NUM_SLOTS
    center.drain()
    for other in (
        center.pull,
        center.abstain,
        partial(center.push, torch.ones(7), read_at=0),
        partial(center.exchange, torch.ones(7), replace_by_one_),
        partial(center.load_state_dict, center.state_dict(), value),
    ):
        with pytest.raises(TransportError, match=r"cannot go on after a failure"):
            other()


@pytest.mark.parametrize("closes", [False, True])
def test_a_replica_that_is_gone_ends_the_exchange_of_all_members(closes):
    def body(rank, store):
        with open_center(rank, store) as center:
            if rank < 2:
                shorten(center, timedelta(seconds=1))
                center.push(torch.ones(7), read_at=center.pull().clock)
                expect_the_end(center, center.pull)
                if store.add("ended", 1) == 2:
                    store.set("over", "")
            elif not closes:
                store.wait(["over"], TIMEOUT)

    run_threads(body, 4)


def test_a_slice_that_fails_fails_all_members_at_once():
    """Member 1 of replica 0 is gone: its peer in replica 1 tells its own replica, which need not wait for anything."""

    def body(rank, store):
        group = members(rank, store, 2)
        center = open_center(rank, store, group=group)
        del group
        with center:
            if rank == 1:
                return
            center.push(torch.ones(7), read_at=center.pull().clock)
            text = r"member 0 of 2: the exchange of the members \[1\] failed" if rank == 2 else ""
            expect_the_end(center, center.drain, text)

    run_threads(body, 4)


@each_transport
def test_a_member_that_does_not_come_is_missed_within_the_timeout(transport):
    def body(rank, store):
        with open_center(rank, store, num_replicas=1, transport=transport) as center:
            if rank == 0:
                center.push(torch.ones(7), read_at=center.pull().clock)
                if not center.synchronous:
                    center.exchange(torch.ones(7), replace_by_one_)
                drain = partial(center.drain, timedelta(seconds=1))
                expect_the_end(center, drain, "the exchange of the members' slices was not gathered")
                began = time.monotonic()
                center.close()  # and with it the group
                assert time.monotonic() - began < SOON_S
            else:
                center.pull()
            meet(store, "over", 2)

    run_threads(body, 2)


@each_transport
def test_a_closed_center_says_so(transport):
    def body(rank, store):
        center = open_center(rank, store, transport=transport)
        center.push(torch.ones(7), read_at=center.pull().clock)
        center.drain()
        meet(store, "pushed", 4)
        center.close()
        center.close()
        assert center.value.numel() == 0
        for operation in (
            center.pull,
            center.abstain,
            partial(center.push, torch.ones(7), read_at=0),
            partial(center.exchange, torch.ones(7), replace_by_one_),
            partial(center.load_state_dict, {}, torch.ones(7)),
        ):
            with pytest.raises(TransportError, match=r"replica \d of 2, member \d of 2: the sliced center is closed"):
                operation()

    run_threads(body, 4)


def test_an_outstanding_exchange_is_given_up_at_close():
    def body(rank, store):
        center = open_center(rank, store)
        shorten(center, timedelta(seconds=2))  # what is queued, but has not begun, lasts until its timeout
        center.push(torch.ones(7), read_at=center.pull().clock)
        center.close()
        center.drain()
        center = open_center(rank, PrefixStore("asynchronous", store), transport=SharedMemory())
        pending = center.exchange(torch.ones(7), replace_by_one_)
        center.close()
        center.drain()
        with pytest.raises(TransportError, match=r"replica \d of 2, member \d of 2: .* closed before its exchange was"):
            pending.wait()

    began = time.monotonic()
    run_threads(body, 4)
    assert time.monotonic() - began < SOON_S


@pytest.mark.parametrize("member", [-1, 2])
def test_a_member_that_cannot_be_is_named(member):
    with pytest.raises(ValueError, match=rf"member={member}\): must be at least 0 and below replica_size=2"):
        open_sliced(
            torch.ones(3),
            lambda part: pytest.fail("opened"),
            members(0, dist.HashStore(), 1),
            member=member,
            replica_size=2,
            timeout=TIMEOUT,
        )


def test_a_slice_is_closed_if_the_members_do_not_come():
    """Rank 1 opens its slice, but never the whole."""
    opened = []

    def body(rank, store):
        group = members(rank, store, 2)
        if rank == 1:
            store.wait(["over"], TIMEOUT)
            return

        def open_slice(initial):
            opened.append(
                SharedMemory().open(
                    initial, replica=0, num_replicas=1, rule=Addition(), store=dist.HashStore(), timeout=TIMEOUT
                )
            )
            return opened[0]

        with pytest.raises(TransportError, match="the opening of the members' slices was not gathered"):
            open_sliced(torch.ones(7), open_slice, group, member=0, replica_size=2, timeout=timedelta(seconds=1))
        store.set("over", "")

    run_threads(body, 2)
    with pytest.raises(TransportError, match="closed"):
        opened[0].pull()
