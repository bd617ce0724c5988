"""The watcher: what one process says or suffers, the others learn without a call of their own."""

import ctypes
import os
import resource
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_easgd.communication import TransportError, _rendezvous
from lightning_easgd.communication._contact import Line, listen
from lightning_easgd.communication._rendezvous import Rendezvous
from lightning_easgd.communication._roll_call import RollCall, gather
from tests.helpers import CONTEXT, PROCESSES_S, SOON_S, TIMEOUT, _start_server, run_replicas, run_threads

POLL = timedelta(milliseconds=20)
SHORT = timedelta(seconds=2)


@contextmanager
def processes(count: int = 2, missing: int = 0, **kwargs) -> Iterator[list[Rendezvous]]:
    """Opens what ``count`` processes would, of as many and ``missing`` more."""
    opened: list[Rendezvous] = []
    arguments = {"world_size": count + missing, "timeout": TIMEOUT, "poll": POLL, **kwargs}
    try:
        for rank in range(count):
            port = opened[0].port if opened else None
            opened.append(Rendezvous("127.0.0.1", port, rank=rank, **arguments))
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
        assert not first.end_requested
        third.request_end()
        assert eventually(lambda: first.end_requested and second.end_requested)


def test_a_failure_reaches_all_and_the_first_one_stays():
    with processes(3) as (first, second, third):
        assert second.report_failure("KeyError: 'original'") is None
        assert third.report_failure("only lost its peer") == "rank 1: KeyError: 'original'"
        assert first.report_failure("only lost its peer") == "rank 1: KeyError: 'original'"
        with pytest.raises(
            RuntimeError, match="on rank 0 because another process failed: rank 1: KeyError: 'original'"
        ):
            first.raise_if_failed()
        second.raise_if_failed()  # it raises its own error


def test_rank_0_stays_until_all_have_heard_that_it_fails():
    with processes(3) as (first, second, third):
        assert first.report_failure("OSError: original") is None
        assert second.failure == third.failure == "rank 0: OSError: original"


def test_all_know_how_far_all_are():
    with processes(3) as (first, second, third):
        first.progress, second.progress, third.progress = 5, 7, 9
        assert eventually(lambda: all(each.progress_of_all() == [5, 7, 9] for each in (first, second, third)))


def test_who_leaves_in_good_order_is_not_missed_and_rank_0_leaves_last():
    with processes(3) as (first, second, third):
        second.close()
        leaving = threading.Thread(target=first.close, daemon=True)
        leaving.start()
        third.request_stop()  # and can still speak
        assert eventually(lambda: first.stop_requested)
        assert leaving.is_alive()
        third.close()
        leaving.join(SOON_S)
        assert not leaving.is_alive()
        assert first.failure is second.failure is third.failure is None


def test_where_the_policy_says_so_all_go_on_without_one_that_is_lost_and_know_it(monkeypatch):
    monkeypatch.setattr(_rendezvous, "_ARRIVAL_S", 1.0)
    asked = []

    def go_on(rank: int, why: str) -> bool:
        asked.append((rank, why))
        return False

    with processes(3, missing=1, policy=go_on) as (first, second, third):
        assert eventually(lambda: first.lost == second.lost == third.lost == [3])
        second.request_end()
        assert eventually(lambda: first.end_requested and third.end_requested)
        assert first.failure is second.failure is third.failure is None
    assert asked == [(3, "rank 3: it did not come within 1 s")]


def test_a_rank_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(_rendezvous, "_ARRIVAL_S", 1.0)
    with processes(2, missing=1) as (first, second):
        assert eventually(lambda: first.failure is not None and second.failure is not None)
        assert first.failure == second.failure == "rank 2: it did not come within 1 s"


def test_a_process_that_falls_silent_is_named(monkeypatch):
    with processes(3, max_silence=SHORT) as (first, second, third):
        monkeypatch.setattr(second, "_tell", lambda news: None)  # as if stopped: its connection stands
        assert eventually(lambda: first.failure is not None and third.failure is not None)
        assert first.failure == third.failure == "rank 1: no sign of life for 2 s"


def test_a_stranger_is_not_let_in():
    with processes(2) as (first, second):
        for words in (b'{"rank": 1}\n', b'{"rank": "x"}\n', b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", first.port), SOON_S) as stranger:
                stranger.sendall(words)
                stranger.settimeout(SOON_S)
                assert stranger.recv(1) == b""
        second.request_stop()
        assert eventually(lambda: first.stop_requested)
        assert first.failure is None


def test_where_rank_0_is_gone_nobody_waits_for_its_store():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1: rank 0, which serves the store, is gone"):
        Rendezvous("127.0.0.1", port, rank=1, world_size=2, timeout=timedelta(hours=1))
    assert time.monotonic() - began < SOON_S


def _member(end: str, there: Any) -> None:
    there.send("ready")
    rendezvous = Rendezvous("127.0.0.1", there.recv(), rank=1, world_size=2, timeout=TIMEOUT, poll=POLL)
    child = os.fork() if end == "orphan" else None
    if child == 0:
        signal.alarm(int(PROCESSES_S))
        signal.pause()  # with all that it has inherited; killed by the test
    there.send(child)
    if end == "busy":
        ctypes.PyDLL(None).sleep(4)  # holds Python's lock, as a huge JSON file would
    there.recv()
    if end == "busy":
        rendezvous.close()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def member(end: str, **kwargs: Any) -> Iterator[tuple[Rendezvous, Callable[[], None]]]:
    """Opens rank 0 here and rank 1 in a process of its own, which ends as it is told to and when."""
    _start_server()
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_member, args=(end, there), daemon=True)
    process.start()
    assert here.poll(PROCESSES_S)
    here.recv()
    arguments = {"rank": 0, "world_size": 2, "timeout": TIMEOUT, "poll": POLL, **kwargs}
    rendezvous, child = Rendezvous("127.0.0.1", None, **arguments), None
    try:
        here.send(rendezvous.port)
        assert here.poll(SOON_S)
        child = here.recv()
        yield rendezvous, lambda: here.send("end")
        process.join(SOON_S)
        assert process.exitcode is not None
    finally:
        process.kill()
        if child is not None:
            os.kill(child, signal.SIGKILL)
        rendezvous.close()


@pytest.mark.processes
@pytest.mark.parametrize("end", ["killed", "orphan"])
def test_a_death_is_named_at_once(end):
    """Also where a child of the dead process lives on with all that it has inherited."""
    with member(end) as (rendezvous, may_end):
        may_end()
        assert eventually(lambda: rendezvous.failure is not None, SOON_S)
        assert rendezvous.failure == "rank 1: its process is gone"


@pytest.mark.processes
def test_a_death_ends_nobody_where_the_policy_says_so():
    with member("killed", policy=lambda rank, why: False) as (rendezvous, may_end):
        may_end()
        assert eventually(lambda: rendezvous.lost == [1], SOON_S)
        rendezvous.raise_if_failed()


@pytest.mark.processes
def test_a_process_that_holds_pythons_lock_is_alive():
    with member("busy") as (rendezvous, may_end):
        time.sleep(2)  # the quiet that the test is about: many times what passes between two messages
        assert rendezvous.failure is None
        may_end()


def test_a_line_carries_whole_messages_and_what_was_said_before_the_end():
    listener = listen()
    with socket.create_connection(("127.0.0.1", listener.getsockname()[1]), SOON_S) as sock:
        assert eventually(lambda: _accepts(listener))
        line = Line(_accepted.pop())
        sock.sendall(b'{"a": ')
        assert line.hear() == []
        sock.sendall(b'1}\n{"b": 2}\n{"c"')
        heard: list = []
        assert eventually(lambda: heard.extend(line.hear()) or len(heard) == 2)
        assert heard == [{"a": 1}, {"b": 2}]
        assert not line.is_closed
    assert eventually(lambda: line.hear() == [] and line.is_closed)
    line.close()
    listener.close()


_accepted: list[socket.socket] = []


def _accepts(listener: socket.socket) -> bool:
    try:
        _accepted.append(listener.accept()[0])
    except BlockingIOError:
        return False
    return True


def test_a_roll_call_gives_each_what_all_have_brought():
    def body(rank, store):
        mine = RollCall(store, rank=rank, world_size=3, timeout=TIMEOUT, check=lambda: None)
        return [mine.gather("meet", f"{rank}.{n}") for n in range(10)]

    for heard in run_threads(body, 3):
        assert heard == [[f"{rank}.{n}" for rank in range(3)] for n in range(10)]


def test_a_roll_call_names_who_is_missing_and_ends_when_it_is_pointless():
    def failed() -> None:
        raise RuntimeError("a peer failed")

    second = timedelta(seconds=1)
    mine = RollCall(dist.HashStore(), rank=1, world_size=3, timeout=second, check=lambda: None)
    with pytest.raises(TransportError, match=r"rank 1 of 3: the ranks could not agree, since \[0, 2\] did not come"):
        mine.gather("agree", "")
    with pytest.raises(RuntimeError, match="a peer failed"):
        RollCall(dist.HashStore(), rank=1, world_size=3, timeout=TIMEOUT, check=failed).gather("agree", "")


def test_a_gathering_names_who_is_missing():
    with pytest.raises(TransportError, match=r"replica 1 of 3 could not agree: \[0, 2\] did not come within 0 s"):
        gather(
            dist.HashStore(), "topic", "", replica=1, num_replicas=3, timeout=timedelta(seconds=0.2), purpose="agree"
        )


def _without_descriptors(replica: int) -> bool:
    """Returns whether its watcher can wait when this process has used up its descriptors."""
    ours, theirs = socket.socketpair()
    theirs.send(b".")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (ours.fileno() + 20, hard))
    held: list[int] = []
    with suppress(OSError):  # too many open files
        while len(held) < 1000:
            held.append(os.dup(ours.fileno()))
    assert len(held) < 1000
    try:
        _rendezvous._wait_for([ours], 0.0)
    finally:
        for each in held:
            os.close(each)
    return True


@pytest.mark.skipif(not hasattr(selectors, "PollSelector"), reason="every selector takes a descriptor here")
def test_who_has_used_up_its_descriptors_is_still_heard():
    assert run_replicas(_without_descriptors, 1) == [True]
