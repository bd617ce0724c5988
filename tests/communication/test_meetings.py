"""Replicas that come to a meeting at different times, with different reasons, or not at all."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_easgd.communication import TransportError
from lightning_easgd.communication._meetings import Meetings
from tests.helpers import TIMEOUT, run_threads


def meetings(store, replica, num_replicas=2, timeout=TIMEOUT, progress=lambda: 0, check=lambda: None) -> Meetings:
    return Meetings(store, replica=replica, num_replicas=num_replicas, timeout=timeout, progress=progress, check=check)


def test_all_learn_all_reasons_meeting_after_meeting():
    def body(replica, store):
        mine = meetings(store, replica, 3)
        return [mine.meet(f"{replica}.{n}") for n in range(20)]

    for heard in run_threads(body, 3):
        assert heard == [[f"{replica}.{n}" for replica in range(3)] for n in range(20)]


def test_nobody_leaves_before_all_have_come():
    def body(replica, store):
        mine = meetings(store, replica)
        if replica == 1:
            assert not store.check(["left"])
        mine.meet("first")
        store.set("left", "1")
        return True

    assert all(run_threads(body, 2))


def test_a_replica_that_moves_is_waited_for_longer_than_the_timeout():
    looks = iter(range(100))
    store = dist.HashStore()
    seen = []

    def progress():
        seen.append(next(looks))
        if len(seen) == 3:
            store.set("1/1", "late")
        return seen[-1]

    mine = meetings(store, 0, timeout=timedelta(seconds=1), progress=progress)
    assert mine.meet("early") == ["early", "late"]
    assert len(seen) == 3  # about a second each


def test_who_is_missing_and_does_not_move_is_named():
    mine = meetings(dist.HashStore(), 0, 3, timeout=timedelta(seconds=1))
    with pytest.raises(TransportError, match=r"replica 0 waits at 'here' for the replicas \[1, 2\]"):
        mine.meet("here")


def test_waiting_ends_when_it_has_become_pointless():
    def failed() -> None:
        raise RuntimeError("a peer failed")

    with pytest.raises(RuntimeError, match="a peer failed"):
        meetings(dist.HashStore(), 0, check=failed).meet("here")
