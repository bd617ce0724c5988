"""Beyond the conformance suite: many processes at once, death at any moment, and what is left in the file system."""

import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_easgd.communication import NonFiniteDeltaError, TransportError, _mapping
from lightning_easgd.communication._mapping import FREE_LOCK
from lightning_easgd.communication.shared_memory import SharedCenter, SharedMemory
from lightning_easgd.rules import Addition, CenterRule
from tests import centers
from tests.helpers import SOON_S, TIMEOUT, Replicas, run_replicas, run_threads

CHUNK = 64  # numbers
SMALL_CHUNKS = SharedMemory(chunk_bytes=4 * CHUNK)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of the test's own, in which centers lie, in place of those of the machine."""
    found = [tmp_path / "first", tmp_path / "second"]
    for folder in found:
        folder.mkdir()
    monkeypatch.setattr(_mapping, "_folders", lambda: found)
    return found


def open_center(
    store: dist.Store,
    replica: int,
    num_replicas: int,
    *,
    initial: torch.Tensor | None = None,
    transport: SharedMemory = SMALL_CHUNKS,
    rule: CenterRule | None = None,
    timeout: timedelta = TIMEOUT,
    num_slots: int = 0,
) -> SharedCenter:
    return centers.open_center(
        transport,
        replica,
        store,
        num_replicas,
        initial=torch.zeros(20 * CHUNK) if initial is None else initial,
        rule=rule,
        timeout=timeout,
        num_slots=num_slots,
    )


def attach(path: str, replica: int, num_replicas: int = 2, timeout: timedelta = TIMEOUT) -> SharedCenter:
    return SharedCenter(path, replica=replica, num_replicas=num_replicas, num_slots=0, rule=Addition(), timeout=timeout)


def create(num_replicas: int = 2, size: int = 20 * CHUNK) -> str:
    return SharedCenter.create(
        torch.zeros(size), num_replicas=num_replicas, num_slots=0, rule=Addition(), chunk_bytes=4 * CHUNK
    )


def set_to_one(x: torch.Tensor, center: torch.Tensor) -> None:
    x.fill_(1.0)


# --- under load -----------------------------------------------------------------------------------------------------


def _load(replica: int, path: str, num_exchanges: int) -> tuple[torch.Tensor, int, float]:
    """Adds vectors that are constant in each chunk, so that a chunk with two different numbers was torn."""
    store = dist.FileStore(path, 8)
    generator = torch.Generator().manual_seed(replica)
    total = 0.0
    with open_center(store, replica, 8) as center:
        x = torch.zeros(20 * CHUNK)
        for n in range(num_exchanges):
            amount = float(torch.randn((), generator=generator))
            if n % 2:
                snapshot = center.pull()
                chunks = snapshot.value.view(20, CHUNK)
                assert torch.equal(chunks, chunks[:, :1].expand_as(chunks)), "a torn read"
                center.push(x.fill_(amount), read_at=snapshot.clock)
            else:

                def move(chunk: torch.Tensor, center: torch.Tensor, amount: float = amount) -> None:
                    assert bool((center == center[0]).all()), "a torn read"
                    chunk.fill_(amount)

                center.exchange(x, move).wait()
            total += amount
        centers.meet(store, "finished", 8, 2 * TIMEOUT)
        snapshot = center.pull()
        result = snapshot.value.clone(), snapshot.clock, total
        centers.meet(store, "read", 8)
    return result


@pytest.mark.slow
def test_under_load_the_center_is_the_start_plus_all_deltas(tmp_path):
    results = run_replicas(_load, 8, str(tmp_path / "store"), 1250)
    total = sum(total for _, _, total in results)
    for value, clock, _ in results:
        assert clock == 10_000
        torch.testing.assert_close(value, torch.full_like(value, total), rtol=1e-4, atol=1e-3)


def _victim_and_others(replica: int, path: str) -> None:
    """Replica 2 is killed from inside of its 50th exchange, after some chunks were added."""
    store = dist.FileStore(path, 3)
    center = open_center(store, replica, 3)
    folder = store.get("path").decode()
    x = torch.zeros(20 * CHUNK)
    done = 0

    def ones_or_death(chunk: torch.Tensor, _: torch.Tensor) -> None:
        nonlocal done
        done += 1
        if replica == 2 and done == 50 * 20 - 7:
            os.kill(os.getpid(), signal.SIGKILL)
        chunk.fill_(1.0)

    deadline = time.monotonic() + TIMEOUT.total_seconds()
    n = 0
    while n < 200 or center.lost() != [2]:  # the others have to do with the victim's whole life, and with what follows
        center.exchange(x, ones_or_death).wait()
        n += 1
        assert time.monotonic() < deadline, f"lost: {center.lost()}"
    store.set(f"exchanges/{replica}", str(n))
    others = int(store.get("exchanges/0")) + int(store.get("exchanges/1"))
    value, lost = center.pull().value - others, center.lost()
    centers.meet(store, "read")
    center.close()
    torch.save((value, lost, folder), f"{path}-{replica}.pt")


def test_the_others_go_on_when_one_is_killed_in_the_middle_of_an_addition(tmp_path):
    path = str(tmp_path / "store")
    replicas = Replicas(_victim_and_others, 3, path)
    assert replicas.join() == [0, 0, -signal.SIGKILL], replicas.error(0) + replicas.error(1)
    for replica in (0, 1):
        value, lost, folder = torch.load(f"{path}-{replica}.pt")
        assert lost == [2]
        assert not Path(folder).exists()
        per_chunk = value.view(20, CHUNK)
        assert torch.equal(per_chunk, per_chunk[:, :1].expand_as(per_chunk))
        # 49 whole additions, and of the 50th the 12 chunks before the one in which it died
        assert sorted(per_chunk[:, 0].tolist()) == [49.0] * 8 + [50.0] * 12


# --- DOWNPOUR's delayed recurrence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 3, 7])
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_downpour_in_turns_is_the_delayed_recurrence(delay, factor):
    """c <- c - e c_{t-D}, stable iff 0 < e < 2 sin(pi / (2 (2 D + 1))); D + 1 replicas push in turns."""
    e = factor * 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    num_replicas = delay + 1
    initial = torch.ones(3, dtype=torch.float64)
    path = SharedCenter.create(initial, num_replicas=num_replicas, num_slots=0, rule=Addition(), chunk_bytes=16)
    centers = [attach(path, replica, num_replicas) for replica in range(num_replicas)]
    try:
        snapshots = [center.pull() for center in centers]
        expected = [1.0] * num_replicas  # all have read the start
        for t in range(400 * num_replicas):
            replica = t % num_replicas
            center, snapshot = centers[replica], snapshots[replica]
            center.push(-e * snapshot.value, read_at=snapshot.clock)
            assert center.traffic.staleness == min(t, delay)
            snapshots[replica] = center.pull()
            expected.append(expected[-1] + -e * expected[-1 - delay])
            assert snapshots[replica].value.tolist() == [expected[-1]] * 3
    finally:
        for center in centers:
            center.close()
    tail, head = max(map(abs, expected[-4 * num_replicas :])), max(map(abs, expected[: 40 * num_replicas]))
    assert tail < head / 10 if factor < 1 else tail > 10 * head


# --- locks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [0, FREE_LOCK])
def test_a_lock_that_is_never_given_back_runs_into_the_timeout(lock):
    path = create()
    with attach(path, 0, timeout=timedelta(seconds=0.3)) as center, attach(path, 1) as other:
        snapshot = center.pull()
        assert other._mapping.try_lock(lock, shared=False)
        began = time.monotonic()
        for operation, call in (
            ("push", lambda: center.push(torch.ones(20 * CHUNK), read_at=snapshot.clock)),
            ("exchange", lambda: center.exchange(torch.ones(20 * CHUNK), set_to_one)),
            ("pull", center.pull),
        ):
            with pytest.raises(TransportError, match=rf"replica 0 of 2: its {operation} waited \d+\.\d s for a lock"):
                call()
        assert 0.9 < time.monotonic() - began < SOON_S
        assert center.traffic.wait_s > 0.8
        other._mapping.unlock(lock)
        assert center.pull().clock == 0  # what failed does not count
        center.push(torch.ones(20 * CHUNK), read_at=0)
        assert (center.clock, center.traffic.staleness) == (1, 0)


def test_a_busy_chunk_is_left_for_later():
    """The lock on one chunk in sixteen is taken until all others have been visited."""
    path = create()
    with attach(path, 0) as center, attach(path, 1) as other:
        assert other._mapping.try_lock(3, shared=False)
        visited = []

        def visit(chunk: int) -> None:
            visited.append(chunk)
            if len(visited) == 18:
                other._mapping.unlock(3)

        center._visit("visit", visit)
        assert sorted(visited) == list(range(20))
        assert set(visited[-2:]) == {3, 19}


def test_replicas_begin_at_different_chunks():
    path = create(num_replicas=4)
    centers = [attach(path, replica, 4) for replica in range(4)]
    assert [center._order[0] for center in centers] == [0, 5, 10, 15]
    assert all(sorted(center._order) == list(range(20)) for center in centers)
    for center in centers:
        center.close()


# --- what is not finite ---------------------------------------------------------------------------------------------


class Remembering(Addition):
    num_vectors = 1


@pytest.mark.parametrize("rule", [Addition(), Remembering()])
def test_a_late_number_that_is_not_finite_leaves_nothing_of_the_exchange(rule):
    with open_center(dist.HashStore(), 0, 1, rule=rule) as center:
        x = torch.ones(20 * CHUNK)
        x[-1] = float("nan")
        with pytest.raises(NonFiniteDeltaError, match="replica 0: 1 of 1280 numbers"):
            center.exchange(x, lambda x, c: x.mul_(3))
        assert torch.equal(center.pull().value, torch.zeros(20 * CHUNK))
        assert center.clock == 0
        assert center.traffic.exchanges == 0


def test_a_difference_that_overflows_is_refused():
    with open_center(dist.HashStore(), 0, 1, initial=torch.full((20 * CHUNK,), -3e38)) as center:
        x = torch.zeros(20 * CHUNK)
        x[-1] = 3e38
        with pytest.raises(NonFiniteDeltaError, match="replica 0: 1 of 64 numbers"):
            center.exchange(x, lambda x, c: x.sub_(c))
        assert torch.isfinite(center.pull().value).all()


def test_finite_numbers_whose_sum_overflows_are_added():
    with open_center(dist.HashStore(), 0, 1) as center:
        center.push(torch.full((20 * CHUNK,), 3e38), read_at=0)
        assert torch.equal(center.pull().value, torch.full((20 * CHUNK,), 3e38))


# --- measures -------------------------------------------------------------------------------------------------------


def test_drift_is_what_the_center_moved_between_reading_and_adding():
    path = create()
    with attach(path, 0) as center, attach(path, 1) as other:
        read_at = center.pull().clock
        other.push(torch.full((20 * CHUNK,), 0.5), read_at=0)
        center.measures_drift = True
        center.push(torch.ones(20 * CHUNK), read_at=read_at)
        assert center.traffic.drift == pytest.approx(0.5 * math.sqrt(20 * CHUNK))
        assert (center.traffic.staleness, center.traffic.bytes_sent) == (1, 0)
        assert center.traffic.exposed_s > 0
        center.exchange(torch.ones(20 * CHUNK), set_to_one)
        assert (center.traffic.staleness, center.traffic.drift) == (0, 0.0)


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_last_to_close_removes_the_files(folders):
    def body(replica, store):
        center = open_center(store, replica, 2)
        assert center.lost() == []
        if replica == 0:
            center.close()
            store.set("closed", "")
        else:
            store.wait(["closed"], TIMEOUT)
            assert center.lost() == []  # it has left
            assert len(list(folders[0].iterdir())) == 1
            center.push(torch.ones(20 * CHUNK), read_at=0)
            assert torch.equal(center.pull().value, torch.ones(20 * CHUNK))
            center.close()

    run_threads(body, 2)
    assert list(folders[0].iterdir()) == []


def _die_together(replica: int, path: str) -> None:
    store = dist.FileStore(path, 2)
    open_center(store, replica, 2).push(torch.ones(20 * CHUNK), read_at=0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_replicas_left_is_removed_by_the_next_to_open(tmp_path):
    path = str(tmp_path / "store")
    replicas = Replicas(_die_together, 2, path)
    assert replicas.join() == [-signal.SIGKILL] * 2, replicas.error(0)
    left = Path(dist.FileStore(path, 2).get("path").decode())
    assert (left / "center").exists()
    with open_center(dist.HashStore(), 0, 1):
        assert not left.exists()


def test_nobody_removes_what_another_uses(folders):
    path = create()  # no handle yet
    with open_center(dist.HashStore(), 0, 1):
        assert Path(path).exists()
        with attach(path, 1):
            with open_center(dist.HashStore(), 0, 1):
                assert len(list(folders[0].iterdir())) == 3
            assert len(list(folders[0].iterdir())) == 2
        assert len(list(folders[0].iterdir())) == 1


def test_a_folder_taken_for_abandoned_before_it_is_held_is_made_anew(folders, monkeypatch):
    """Another process looks between a folder's making and its locking, and is quicker."""
    hold = _mapping._hold
    taken = []

    def late(folder):
        if not taken:
            taken.append(folder)
            _mapping._remove_abandoned(folder.parent)
        return hold(folder)

    monkeypatch.setattr(_mapping, "_hold", late)
    path = create()
    assert not taken[0].exists()
    with attach(path, 0) as center:
        assert center.clock == 0


def test_without_room_in_memory_the_file_lies_on_disk(folders, monkeypatch):
    statvfs = os.statvfs

    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full if Path(path) == folders[0] else statvfs(path))
    with open_center(dist.HashStore(), 0, 1):
        assert list(folders[0].iterdir()) == []
        assert len(list(folders[1].iterdir())) == 1


def test_without_room_anywhere_every_replica_says_so(folders, monkeypatch):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    def body(replica, store):
        with pytest.raises(
            TransportError, match=f"replica {replica} of 2 .* no room for .*first: No space left on dev"
        ):
            open_center(store, replica, 2)

    run_threads(body, 2)
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python's, since the test process has threads
def test_a_forked_child_keeps_no_lock(folders):
    """A loader's worker may outlive its replica; what it inherited must not look like a replica that lives."""
    path = create()
    center, other = attach(path, 0), attach(path, 1)
    forked_reader, forked_writer = os.pipe()
    over_reader, over_writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(forked_writer, b"!")
        os.close(over_writer)
        os.read(over_reader, 1)  # lives until the parent closes its end
        os._exit(0)
    try:
        assert os.read(forked_reader, 1) == b"!"
        for fd in center._mapping._fds:
            os.close(fd)  # as the kernel does when the replica is killed
        center._mapping._fds = []
        assert other.lost() == [0]
    finally:
        os.close(over_writer)
        os.waitpid(child, 0)
        for fd in (forked_reader, forked_writer, over_reader):
            os.close(fd)
        other.close()
        center.close()
    assert list(folders[0].iterdir()) == []


# --- opening --------------------------------------------------------------------------------------------------------


def test_a_replica_on_another_host_is_told_what_to_use(monkeypatch):
    """It does not find the file."""
    init = _mapping.Mapping.__init__

    def elsewhere(self, path, replica):
        init(self, path + "-of-another-host" * (replica == 1), replica)

    monkeypatch.setattr(_mapping.Mapping, "__init__", elsewhere)

    def body(replica, store):
        with pytest.raises(TransportError, match="replica 1 of 2 does not find .* one host.* use ParameterServer"):
            open_center(store, replica, 2)
        return Path(store.get("path").decode())

    assert not any(path.exists() for path in run_threads(body, 2))


@pytest.mark.parametrize(
    ("initial", "num_slots", "text"),
    [
        (torch.zeros(9), 0, "replica 1 has 9 numbers of torch.float32, the center 10 of torch.float32"),
        (torch.zeros(10, dtype=torch.float64), 0, "replica 1 has 10 numbers of torch.float64, the center 10 of"),
        (torch.zeros(10), 3, "replica 1 of 2: num_slots is 3 here and 0 in the center's file"),
    ],
)
def test_replicas_that_differ_are_named_on_all(initial, num_slots, text):
    def body(replica, store):
        own = initial if replica == 1 else torch.zeros(10)
        with pytest.raises(TransportError, match=text):
            open_center(store, replica, 2, initial=own, num_slots=num_slots if replica == 1 else 0)

    run_threads(body, 2)


def test_a_replica_has_one_handle_at_a_time():
    path = create()
    with attach(path, 0):
        with pytest.raises(TransportError, match="replica 0 of 2 has a handle on the center in .* already"):
            attach(path, 0)
        with attach(path, 1):
            pass
        with attach(path, 1) as again:  # a session may come again
            assert again.pull().clock == 0


@pytest.mark.parametrize("chunk_bytes", [0, 7, 64.0, True, "64"])
def test_a_chunk_size_that_cannot_be_is_refused(chunk_bytes):
    with pytest.raises(ValueError, match=r"SharedMemory\(chunk_bytes=.*must be an integer >= 8"):
        SharedMemory(chunk_bytes=chunk_bytes)


def test_a_closed_center_says_so():
    center = open_center(dist.HashStore(), 0, 1)
    center.close()
    for call in (
        center.pull,
        center.abstain,
        center.state_dict,
        lambda: center.push(torch.ones(20 * CHUNK), read_at=0),
        lambda: center.exchange(torch.ones(20 * CHUNK), set_to_one),
        lambda: center.load_state_dict({}, torch.ones(20 * CHUNK)),
    ):
        with pytest.raises(TransportError, match="replica 0: the center in shared memory is closed"):
            call()
    assert center.lost() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_vector_on_a_device_is_exchanged_beside_the_caller():
    start = torch.arange(20.0 * CHUNK, device="cuda")
    with open_center(dist.HashStore(), 0, 1, initial=start) as center:
        assert torch.equal(center.pull().value, start)
        delta = center.exchange(start + 8, lambda x, c: x.sub_(c), scale=0.5).wait()
        assert torch.equal(delta, torch.full_like(start, 8))
        center.push(torch.ones_like(start), read_at=center.clock)
        assert torch.equal(center.pull().value, start + 5)
        assert center.clock == 2
        with pytest.raises(NonFiniteDeltaError, match="replica 0: 1280 of 1280"):
            center.exchange(torch.full_like(start, float("nan")), lambda x, c: None)
        assert torch.equal(center.pull().value, start + 5)


def test_borrowing_reads_nothing():
    """An exchange needs no private copy of the center: whoever only exchanges never allocates one."""
    with open_center(dist.HashStore(), 0, 1) as center:
        x = center.borrow().fill_(2)
        center.exchange(x, set_to_one).wait()
        assert center._snapshot is None
        assert center.borrow().data_ptr() == x.data_ptr()
