"""What goes on beside the caller: its end, its error and its seconds, whoever runs it."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest

from lightning_easgd.communication import Traffic, _flight
from lightning_easgd.communication._flight import Flight, in_daemon_thread
from tests.helpers import TIMEOUT

Start = Callable[[Callable[[], None]], object]


@pytest.fixture(params=["a thread of its own", "an executor"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    if request.param == "an executor":
        with ThreadPoolExecutor(1) as worker:
            yield worker.submit
    else:
        yield in_daemon_thread("flight")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list; it passes when somebody says so."""
    hands = [0.0]
    monkeypatch.setattr(_flight, "time", SimpleNamespace(perf_counter=lambda: hands[0]))
    return hands


def test_seconds_are_hidden_while_the_caller_computes(start, now):
    flight = Flight(lambda: None, start)
    assert flight.is_over(TIMEOUT)
    now[0] = 10.0
    traffic = Traffic()
    assert flight.finish(TIMEOUT, traffic)
    assert (traffic.hidden_s, traffic.exposed_s) == (0.0, 0.0)  # it took no time


def test_seconds_are_exposed_from_when_the_caller_waits(start, now):
    computed = threading.Event()

    def operation() -> None:
        assert computed.wait(TIMEOUT.total_seconds())
        now[0] = 7.0

    flight = Flight(operation, start)
    now[0] = 3.0
    traffic = Traffic()
    assert not flight.finish(timedelta(0), traffic)
    assert (traffic.hidden_s, traffic.exposed_s) == (3.0, 0.0)
    traffic = Traffic()
    threading.Timer(0.01, computed.set).start()
    assert flight.finish(TIMEOUT, traffic)
    assert (traffic.hidden_s, traffic.exposed_s) == (3.0, 4.0)


def test_an_error_is_kept_for_whoever_asks(start):
    landing = threading.Event()

    def operation() -> None:
        assert landing.wait(TIMEOUT.total_seconds())
        raise ValueError("as told")

    flight = Flight(operation, start)
    with pytest.raises(TimeoutError, match="not over"):
        flight.check()
    assert not flight.is_over()
    landing.set()
    assert flight.finish(TIMEOUT, Traffic())
    for _ in range(2):
        with pytest.raises(ValueError, match="as told"):
            flight.check()


def test_only_threads_of_their_own_let_the_process_end():
    flying = threading.Event()
    threads = []
    flight = Flight(lambda: threads.append(threading.current_thread()) or flying.set(), in_daemon_thread("all-reduce"))
    assert flying.wait(TIMEOUT.total_seconds())
    assert flight.is_over(TIMEOUT)
    assert threads[0].daemon
    assert threads[0].name == "all-reduce"
