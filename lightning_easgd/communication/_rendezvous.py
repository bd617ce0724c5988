"""Where the processes of a job find each other, and learn that one of them failed, is gone, or wants to stop.

Training steps between two exchanges make no network call, so a process would learn of a peer's end only by its next
exchange. A thread in every process, the watcher, therefore listens. Every process has a line to rank 0
(``_contact.py``), and rank 0 passes on what a process says. The watcher leaves its news in the plain attributes
``failure``, ``stop_requested`` and ``end_requested``. Reading them costs the training loop nothing.

The line itself tells whether a process is alive, not the messages on it: the kernel closes the line when the process
dies, and keeps the line open while the process computes, holds Python's lock or waits. A time limit is needed only for
a line that stays open and silent for minutes, because its process is stopped for good or holds the lock for ever.
"""

import faulthandler
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from lightning_easgd.communication._c10d import PrefixStore, TCPStore, new_store_server
from lightning_easgd.communication._contact import Line, keep_from_children, listen
from lightning_easgd.communication._roll_call import RollCall

__all__ = ["MAX_SILENCE", "Rendezvous", "end_the_job"]

log = logging.getLogger(__name__)

# How long a process may say nothing although its line stands.
_SILENCE_S = 300.0
MAX_SILENCE = timedelta(seconds=_SILENCE_S)
# Within how long the others have their line to rank 0, once all know where it is.
_ARRIVAL_S = 30.0
# How long rank 0 stays for the others: until they have heard that it fails, or have left in good order.
_HEARD_S, _FAREWELL_S = 10.0, 60.0


def end_the_job(rank: int, why: str) -> bool:
    """The policy that ends a job with the first process that is lost. See ``Rendezvous``."""
    del rank, why
    return True


@dataclass
class _Peer:
    """What is known of a process at the other end of a line.

    Attributes:
        line: None before it has come, and after it has left.
        heard_at: when it said something last.
        has_left: whether it has said goodbye.
        knows: whether it has heard of the failure.
    """

    line: Line | None = None
    heard_at: float = field(default_factory=time.monotonic)
    has_left: bool = False
    knows: bool = False


class Rendezvous:
    """A key-value store that the process of rank 0 serves, and the thread that listens for news of the others.

    All ranks are expected from the beginning. All others name a process that dies within a second or two, a host that
    vanishes within about a minute, and a process that never comes after ``arrival``. Then each process has ``grace`` to
    end by itself; the watcher kills a process that does not.

    Args:
        host: where rank 0 is reached.
        port: of rank 0; None in rank 0, which takes a free one (read it from ``port``).
        rank: this process.
        world_size: number of processes.
        timeout: the longest wait for the store.
        poll: time between two messages.
        grace: how long a process may go on after a peer's failure before it is ended the hard way.
        max_silence: how long a living process may be stopped, or hold Python's lock in one call, before it is given up;
            default 5 minutes.
        arrival: how long rank 0 waits for each of the others. Default 30 seconds, which suits processes that all begin
            at the same time. It must be longer where processes first import their modules.

    Raises:
        RuntimeError: rank 0 is not there.

    Attributes:
        store: for others to use under a prefix, from the main thread.
        roll_call: of all ranks, over it.
        failure: what ended a peer, once known.
        lost: the ranks that are gone, and without which the others go on.
        stop_requested: whether some process asked all to stop at once.
        end_requested: whether some process asked all to end training in good order.
        progress: anything that grows while this process does; the others see it by ``progress_of_all``.
    """

    def __init__(
        self,
        host: str,
        port: int | None,
        *,
        rank: int,
        world_size: int,
        timeout: timedelta,
        poll: timedelta = timedelta(seconds=1),
        grace: timedelta = timedelta(seconds=20),
        max_silence: timedelta | None = None,
        arrival: timedelta | None = None,
        policy: Callable[[int, str], bool] = end_the_job,
    ) -> None:
        self.rank, self._world_size, self._policy = rank, world_size, policy
        self.lost: list[int] = []
        self.failure: str | None = None
        self.stop_requested = self.end_requested = False
        self.progress = 0
        self._poll_s, self._grace_s = poll.total_seconds(), grace.total_seconds()
        self._silence_s = _SILENCE_S if max_silence is None else max_silence.total_seconds()
        self._arrival_s = _ARRIVAL_S if arrival is None else arrival.total_seconds()
        self._progress = [0] * world_size
        self._own_failure: str | None = None  # what this process reports
        self._first: str | None = None  # the failure that all hear of
        self._first_at = 0.0
        self._has_first = threading.Event()
        self._is_leaving = False
        self._ears: socket.socket | None = None  # what wakes the watcher, and what it hears it by
        self._mouth: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._strangers: list[Line] = []  # connected, but without a known rank yet
        self._reported: list[str] = []  # failures that others have just told of
        self._peers: dict[int, _Peer] = {}
        self._watcher = threading.Thread(target=self._watch, name="lightning_easgd-watcher", daemon=True)
        if port is None:
            self.store = new_store_server(host, timeout)
            self.port = self.store.port
            if world_size > 1:
                self._listener = listen()
                self.port = int(self._listener.getsockname()[1])
                self._peers = {other: _Peer() for other in range(world_size) if other != rank}
                self._start_watching()
        else:
            self.port = port
            # The line first: a store's client knocks at a closed door until its timeout.
            self._peers = {0: _Peer(self._call(host, port))}
            store_port = self._introduce(self._peers[0])
            self._start_watching()
            try:
                self.store = TCPStore(host, store_port, is_master=False, timeout=timeout)
            except RuntimeError:
                self.close()
                raise
        self.roll_call = RollCall(
            PrefixStore("roll call", self.store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            check=self.raise_if_failed,
        )

    # --- the caller's side ------------------------------------------------------------------------------------------

    def report_failure(self, message: str) -> str | None:
        """Tells all processes that this one fails, and returns what another process reported before it, if one did.

        Never raises, since it is called while failing. Rank 0, with which the store ends, waits a moment until the
        others have heard it.
        """
        own = self._own_failure = f"rank {self.rank}: {message}"
        if not self._watcher.is_alive():
            return self.failure
        self._wake()
        if not self._has_first.wait(_HEARD_S):
            log.info("rank %d could not tell the others that it fails", self.rank)
        if self.rank == 0:
            deadline = time.monotonic() + _HEARD_S
            while self._watcher.is_alive() and not all(p.knows or p.line is None for p in self._peers.values()):
                if time.monotonic() > deadline:
                    log.info("not all processes have heard that rank 0 fails")
                    break
                time.sleep(0.01)  # between two looks at what the watcher has heard
        return None if self._first == own else self._first

    def request_stop(self) -> None:
        """Asks all processes to stop. Safe in a signal handler: the watcher tells the others at once."""
        self.stop_requested = True
        self._wake()

    def request_end(self) -> None:
        """Asks all processes to end training in good order. The watcher tells the others at once."""
        self.end_requested = True
        self._wake()

    def progress_of_all(self) -> list[int]:
        """Returns how far every process was when it was heard last. Local; blocks for nobody."""
        self._progress[self.rank] = self.progress
        return list(self._progress)

    def raise_if_failed(self) -> None:
        """Raises ``RuntimeError`` with a peer's error if one failed. Local; costs an attribute."""
        if self.failure is not None:
            raise RuntimeError(f"training ends on rank {self.rank} because another process failed: {self.failure}")

    def close(self) -> None:
        """Leaves in good order. Idempotent.

        The store ends with the process of rank 0. Rank 0 therefore waits until the others have left, a minute at most;
        it does not wait after a failure. From then on peers may end as they like.
        """
        self._is_leaving = True
        self._wake()
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join(_FAREWELL_S + _HEARD_S)

    def _start_watching(self) -> None:
        self._ears, self._mouth = socket.socketpair()
        for end in (self._ears, self._mouth):
            keep_from_children(end).setblocking(False)
        self._watcher.start()

    def _wake(self) -> None:
        if self._mouth is not None:
            with suppress(OSError):  # it is awake, or has ended
                self._mouth.send(b".")

    # --- the watcher's ----------------------------------------------------------------------------------------------

    def _call(self, host: str, port: int) -> Line:
        try:
            return Line.to(host, port, timedelta(seconds=_ARRIVAL_S))
        except OSError as error:
            raise RuntimeError(f"rank {self.rank}: {self._gone(0)} ({error})") from error

    def _introduce(self, first: _Peer) -> int:
        """Says who this is, and returns the store's port as soon as rank 0 has answered."""
        line = first.line
        assert line is not None
        line.tell({"rank": self.rank, **self._news()})
        deadline = time.monotonic() + self._silence_s
        while time.monotonic() < deadline and not line.is_closed:
            _wait_for([line], self._poll_s)
            for message in line.hear():
                if "store" in message:
                    first.heard_at = time.monotonic()
                    return int(message["store"])
        line.close()
        raise RuntimeError(f"rank {self.rank}: {self._gone(0)} (it did not answer)")

    def _watch(self) -> None:
        looked_at = told_at = time.monotonic()
        news: dict[str, Any] = {}
        farewell: float | None = None
        in_order = False
        try:
            while True:
                own_failure = self._own_failure  # before listening: news of earlier losses comes first
                self._listen()
                now = time.monotonic()
                if now - looked_at > max(self._silence_s / 4, 5 * self._poll_s):
                    # This process itself was stopped, and maybe all with it: what was said meanwhile comes first.
                    for peer in self._peers.values():
                        peer.heard_at = now
                looked_at = now
                for rank, peer in self._peers.items():
                    self._judge(rank, peer, now)
                # A process that is gone without a word comes first: other processes may have failed because of it.
                for failure in self._reported:
                    self._learn(failure)
                self._reported.clear()
                if own_failure is not None and (self.rank == 0 or self._peers[0].line is None):
                    self._learn(own_failure)  # else rank 0 knows which one was the first
                if self._is_leaving and farewell is None:
                    farewell = now
                before, news = news, self._news()
                if news != before or now - told_at >= self._poll_s:
                    told_at = now
                    self._tell(news)
                if farewell is not None and self._may_leave(now - farewell):
                    in_order = True
                    return
                if farewell is None and self._first is not None and now - self._first_at > self._grace_s:
                    self._end_process()
        finally:
            self._hang_up(in_order=in_order)

    def _listen(self) -> None:
        """Waits for news, ``poll`` at most, and takes in all that there are."""
        assert self._ears is not None
        lines = [peer.line for peer in self._peers.values() if peer.line is not None]
        sockets: list[Any] = [self._ears, *lines, *self._strangers]
        if self._listener is not None:
            sockets.append(self._listener)
        _wait_for(sockets, self._poll_s)
        with suppress(BlockingIOError):  # nobody has woken it
            self._ears.recv(4096)
        self._let_in()
        for rank, peer in self._peers.items():
            if peer.line is not None:
                for message in peer.line.hear():
                    self._hear(rank, peer, message)

    def _let_in(self) -> None:
        """Answers processes that connect, and gives each line to the rank that its process says it is."""
        while self._listener is not None:
            try:
                self._strangers.append(Line(self._listener.accept()[0]))
            except BlockingIOError:
                break
            except OSError as error:  # it has gone again, or there are no descriptors left
                log.info("a connection could not be accepted: %s", error)
                break
        for line in list(self._strangers):
            messages = line.hear()
            rank = messages[0].get("rank") if messages else None
            peer = self._peers.get(rank) if isinstance(rank, int) else None
            if peer is not None and peer.line is None and not peer.has_left:
                self._strangers.remove(line)
                peer.line = line
                line.tell({"store": self.store.port, **self._news()})
                for message in messages:
                    self._hear(int(rank or 0), peer, message)
            elif messages or line.is_closed:
                self._strangers.remove(line)
                line.close()

    def _hear(self, rank: int, peer: _Peer, message: dict[str, Any]) -> None:
        peer.heard_at = time.monotonic()
        if message.get("stop"):  # only ever set: the main thread may set it at the same moment
            self.stop_requested = True
        if message.get("end"):
            self.end_requested = True
        peer.has_left = peer.has_left or bool(message.get("bye"))
        progress = message.get("progress", 0)
        if self.rank == 0:
            self._progress[rank] = progress
        elif progress:
            self._progress = progress
        peer.knows = peer.knows or bool(message.get("knows"))
        self.lost += [lost for lost in message.get("lost", ()) if lost not in self.lost]
        if message.get("failure"):
            self._reported.append(str(message["failure"]))

    def _judge(self, rank: int, peer: _Peer, now: float) -> None:
        """Finds the processes that are gone or silent."""
        if peer.has_left:
            if peer.line is not None and (self.rank == 0 or peer.line.is_closed):
                peer.line.close()
                peer.line = None
            return
        if peer.line is not None and peer.line.is_closed:
            peer.line.close()
            peer.line, peer.has_left = None, True
            self._lose(rank, self._gone(rank))
        elif peer.line is None and now - peer.heard_at > self._arrival_s:
            peer.has_left = True
            self._lose(rank, f"rank {rank}: it did not come within {self._arrival_s:.0f} s")
        elif now - peer.heard_at > self._silence_s:
            peer.heard_at = now
            self._lose(rank, f"rank {rank}: no sign of life for {self._silence_s:.0f} s")

    @staticmethod
    def _gone(rank: int) -> str:
        return "rank 0, which serves the store, is gone" if rank == 0 else f"rank {rank}: its process is gone"

    def _lose(self, rank: int, why: str) -> None:
        """Does what the policy says of a process that is lost."""
        if rank == 0 or self._policy(rank, why):
            self._learn(why)
        elif rank not in self.lost:
            log.warning("%s; the others go on", why)
            self.lost.append(rank)

    def _learn(self, failure: str) -> None:
        """Keeps the first failure."""
        if self._first is not None:
            return
        self._first, self._first_at = failure, time.monotonic()
        if not failure.startswith(f"rank {self.rank}:"):
            self.failure = failure
        self._has_first.set()

    def _news(self) -> dict[str, Any]:
        """Returns what the others are to know. All of it each time: a message may be missed."""
        news: dict[str, Any] = {"stop": self.stop_requested, "end": self.end_requested}
        if self.rank == 0:
            self._progress[0] = self.progress
            return {**news, "failure": self._first, "progress": list(self._progress), "lost": list(self.lost)}
        knows = self._first is not None
        return {**news, "failure": self._own_failure, "knows": knows, "progress": self.progress}

    def _tell(self, news: dict[str, Any]) -> None:
        for peer in self._peers.values():
            if peer.line is not None:
                peer.line.tell(news)

    def _may_leave(self, waited_s: float) -> bool:
        """Whether this process may go: at once, but for rank 0, on whom the others depend."""
        if self.rank != 0 or all(peer.line is None for peer in self._peers.values()):
            return True
        if self._first is not None:
            return all(peer.knows or peer.line is None for peer in self._peers.values()) or waited_s > _HEARD_S
        if waited_s > _FAREWELL_S:
            log.warning("rank 0 leaves with the store although not all others have said goodbye")
            return True
        return False

    def _hang_up(self, *, in_order: bool) -> None:
        """Says goodbye, and waits until it has been heard: what a closed connection has not delivered may be lost.

        Args:
            in_order: whether this process may leave. If not, the watcher has failed, and the others are to notice.
        """
        deadline = time.monotonic() + 2
        for peer in self._peers.values():
            if peer.line is None:
                continue
            peer.line.tell({**self._news(), "bye": in_order})
            peer.line.hang_up()
            while not peer.line.is_closed and time.monotonic() < deadline:
                _wait_for([peer.line], 0.1)
                peer.line.hear()
            peer.line.close()
        for sock in (self._listener, self._ears, self._mouth, *self._strangers):
            if sock is not None:
                sock.close()

    def _end_process(self) -> None:
        # The main thread is held up, in a collective that a lost peer never answers.
        print(
            f"[lightning_easgd] rank {self.rank}: {self._first}; the main thread did not end within "
            f"{self._grace_s:.0f} s, so this process is ended. Its stacks:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


# A selector that takes no file descriptor, where the system has one: a process that has used up its descriptors is
# still alive, and must say so.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.DefaultSelector)


def _wait_for(sockets: Sequence[Any], timeout_s: float) -> None:
    """Returns when one of them can be read or is closed, after ``timeout_s`` at most."""
    with _Selector() as selector:
        for each in sockets:
            if each.fileno() >= 0:
                selector.register(each, selectors.EVENT_READ)
        selector.select(timeout_s)
