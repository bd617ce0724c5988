"""The watcher: what one process says or suffers, the others learn without a call of their own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from lightning_easgd.communication import _rendezvous
from lightning_easgd.communication._rendezvous import Rendezvous
from tests.helpers import TIMEOUT

POLL = timedelta(milliseconds=20)


@contextmanager
def processes(count: int = 2) -> Iterator[list[Rendezvous]]:
    opened: list[Rendezvous] = []
    try:
        for rank in range(count):
            port = opened[0].port if opened else None
            opened.append(Rendezvous("127.0.0.1", port, rank=rank, world_size=count, timeout=TIMEOUT, poll=POLL))
        yield opened
    finally:
        for rendezvous in reversed(opened):
            rendezvous.close()


def eventually(condition, seconds: float = TIMEOUT.total_seconds()) -> bool:
    """Looks until the condition holds; the clock of the watcher is the only one there is to wait for."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return True
        waiting.wait(0.02)
    return False


def test_a_request_to_stop_reaches_all():
    with processes(3) as (first, second, third):
        second.request_stop()
        assert eventually(lambda: first.stop_requested and third.stop_requested)


def test_a_failure_reaches_all_and_the_first_one_stays():
    with processes(3) as (first, second, third):
        assert second.report_failure("KeyError: 'original'") is None
        assert third.report_failure("only lost its peer") == "rank 1: KeyError: 'original'"
        assert eventually(lambda: first.failure is not None)
        with pytest.raises(
            RuntimeError, match="on rank 0 because another process failed: rank 1: KeyError: 'original'"
        ):
            first.raise_if_failed()
        second.raise_if_failed()  # it raises its own error


def test_a_process_that_falls_silent_is_noticed(monkeypatch):
    monkeypatch.setattr(_rendezvous, "_SILENCE_S", 2.0)
    with processes(3) as (first, second, third):
        assert eventually(lambda: 1 in first._beats and 2 in first._beats)
        second.close()  # counts no more, as if dead
        assert eventually(lambda: first.failure is not None and third.failure is not None)
        assert first.failure == third.failure == "rank 1: no sign of life for 2 s"
