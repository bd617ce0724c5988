"""Sums through memory that the replicas of one host share: what is added up, and when it is sockets after all."""

import gc
import logging
import mmap
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lightning_easgd.communication import AllReduce, TransportError, _shared_vectors
from lightning_easgd.communication._shared_vectors import SharedVectors
from lightning_easgd.rules import Addition, CenterRule, OuterOptimizer
from tests import centers
from tests.helpers import TIMEOUT, run_replicas, run_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


def open_center(replica, store, numel, *, num_replicas=2, rule: CenterRule | None = None, dtype=torch.float32):
    initial = torch.zeros(numel, dtype=dtype)
    return centers.open_center(AllReduce(), replica, store, num_replicas, initial=initial, rule=rule, num_slots=0)


def open_vectors(replica, store, numel=5, num_replicas=2):
    return SharedVectors.open(torch.zeros(numel), store, replica, num_replicas, TIMEOUT)


def descriptors() -> int:
    """Returns how many descriptors of such memory this process has."""
    found = 0
    for each in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found += "memfd:lightning_easgd" in os.readlink(f"/proc/self/fd/{each}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_replicas", [2, 3, 5])
@pytest.mark.parametrize("numel", [1, 2, 1024, 1025, 5000, 300_000])
def test_the_center_receives_all_deltas(numel, num_replicas, dtype, monkeypatch):
    """More replicas than pages, parts that end within one, windows of one page, blocks: every number once."""
    monkeypatch.setattr(_shared_vectors, "_WINDOW_BYTES", mmap.PAGESIZE)
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, num_replicas, numel, dtype=dtype, generator=generator)

    def body(replica, store):
        with open_center(replica, store, numel, num_replicas=num_replicas, dtype=dtype) as center:
            assert center._shared is not None
            values = []
            for each in deltas:
                center.push(each[replica], read_at=center.clock)
                values.append(center.pull().value.clone())
            return torch.stack(values)

    found = run_threads(body, num_replicas)
    torch.testing.assert_close(found[0], deltas.sum(1).cumsum(0))
    assert all(torch.equal(values, found[0]) for values in found)


def plain_sgd() -> OuterOptimizer:
    return OuterOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=1.0))


@pytest.mark.parametrize("rule", [Addition, plain_sgd])
def test_what_lies_in_the_memory_of_one_who_abstains_is_not_added(rule):
    def body(replica, store):
        with open_center(replica, store, 3000, num_replicas=3, rule=rule()) as center:
            values = []
            for turn in range(6):
                if turn % 3 == replica or turn == 4:  # in turn 4 all do
                    center.borrow().fill_(float("nan"))
                    center.abstain()
                else:
                    center.exchange(center.borrow().fill_(2.0**turn), lambda x, _: None, scale=0.5).done()
                values.append(center.pull().value.clone())
            return torch.stack(values)

    expected = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0, 32.0]).cumsum(0)[:, None].expand(6, 3000)
    for values in run_threads(body, 3):
        assert torch.equal(values, expected)


def test_factors_of_the_replicas_own_are_applied():
    def body(replica, store):
        with open_center(replica, store, 10, num_replicas=3) as center:
            center.exchange(center.borrow().fill_(1.0), lambda x, _: None, scale=10.0**replica).done()
            first = center.pull().value.clone()
            center.exchange(center.borrow().fill_(1.0), lambda x, _: None, scale=0.0).done()
            return first, center.pull().value.clone()

    for first, second in run_threads(body, 3):
        assert torch.equal(first, torch.full((10,), 111.0))
        assert torch.equal(second, first)


def _in_processes(replica: int, path: str, numel: int) -> tuple[bool, torch.Tensor, int, int, bool]:
    center = open_center(replica, torch.distributed.FileStore(f"{path}/store", 3), numel, num_replicas=3)
    center.push(torch.full((numel,), 10.0**replica), read_at=0)
    value, is_shared = center.pull().value.clone(), center._shared is not None
    own = descriptors()
    center.close()
    del center
    gc.collect()
    is_mapped = "memfd:lightning_easgd" in Path("/proc/self/maps").read_text()
    return is_shared, value, own, descriptors(), is_mapped


def test_processes_share_and_leave_nothing_behind(tmp_path):
    for is_shared, value, own, left, is_mapped in run_replicas(_in_processes, 3, str(tmp_path), 100_000):
        assert is_shared
        assert torch.equal(value, torch.full((100_000,), 111.0))
        assert own == 3  # Python keeps one for each mapping
        assert left == 0
        assert not is_mapped


def refuse(*_: object, **__: object) -> int:
    raise OSError("not here")


@pytest.mark.parametrize("name", ["_new_file", "_open_file"])
def test_where_one_cannot_share_all_use_sockets(name, monkeypatch, caplog):
    """One of them, at its own memory or at another's; the sum is the same."""
    original, calls = getattr(_shared_vectors, name), []

    def sometimes(*args, **kwargs):
        calls.append(0)
        return refuse() if len(calls) == 2 else original(*args, **kwargs)

    monkeypatch.setattr(_shared_vectors, name, sometimes)

    def body(replica, store):
        with open_center(replica, store, 5) as center:
            center.push(torch.ones(5), read_at=0)
            return center._shared, center.pull().value.clone()

    gc.collect()
    before = descriptors()
    with caplog.at_level(logging.INFO):
        for shared, value in run_threads(body, 2):
            assert shared is None
            assert torch.equal(value, torch.full((5,), 2.0))
    gc.collect()
    assert descriptors() == before
    assert len(calls) >= 2
    assert caplog.messages == ["the replicas sum through sockets, not through shared memory: not here"]


def test_a_refusal_without_a_word_is_one(monkeypatch):
    calls, original = [], _shared_vectors._open_file

    def sometimes(*args):
        calls.append(0)
        if len(calls) == 1:
            raise OSError
        return original(*args)

    monkeypatch.setattr(_shared_vectors, "_open_file", sometimes)
    assert run_threads(open_vectors, 2) == [None, None]


@pytest.mark.parametrize("second", ["boot pid:[4] net:[6]", "boot pid:[7] net:[5]", "other pid:[4] net:[5]", ""])
def test_hosts_are_apart_where_a_network_is_between_them(second, monkeypatch):
    """Or another table of processes: a descriptor's number would mean something else there."""
    hosts = iter(["boot pid:[4] net:[5]" if second else "", second])
    monkeypatch.setattr(_shared_vectors, "_host", lambda: next(hosts))
    monkeypatch.setattr(_shared_vectors, "_open_file", refuse)  # nobody even tries
    assert run_threads(open_vectors, 2) == [None, None]


def test_the_host_is_boot_processes_and_network():
    boot, *namespaces = _shared_vectors._host().split()
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert [each.partition(":")[0] for each in namespaces] == ["pid", "net"]


def test_memory_that_is_not_the_peers_is_refused():
    file = _shared_vectors._new_file(4096, bytes(range(16)))
    try:
        os.close(_shared_vectors._open_file(os.getpid(), file, bytes(range(16)).hex()))
        before = descriptors()
        with pytest.raises(OSError, match="not what the process has told of"):
            _shared_vectors._open_file(os.getpid(), file, bytes(16).hex())
        assert descriptors() == before
    finally:
        os.close(file)


def test_vectors_of_different_sizes_are_refused_by_all():
    def body(replica, store):
        with pytest.raises(TransportError, match=r"different vectors: 5 numbers of torch.float32, 6 numbers of"):
            open_center(replica, store, 5 + replica)

    run_threads(body, 2)
    gc.collect()


def test_memory_that_may_not_be_given_back_is_kept(monkeypatch):
    """Under mlockall the kernel refuses."""

    class Locked(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(_shared_vectors.mmap, "mmap", Locked)

    def body(replica, store):
        with open_center(replica, store, 5) as center:
            center.push(torch.ones(5), read_at=0)
            return center.pull().value.clone()

    for value in run_threads(body, 2):
        assert torch.equal(value, torch.full((5,), 2.0))


def test_no_room_is_no_descriptor(monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = descriptors()
    assert run_threads(open_vectors, 2) == [None, None]
    assert descriptors() == before
