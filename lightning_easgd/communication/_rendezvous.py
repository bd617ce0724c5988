"""Where the processes of a job find each other, and learn that one of them failed or wants to stop.

Training steps between two exchanges make no network call, so a process would learn of a peer's end only by its next
exchange. A thread of its own therefore looks into a store about once a second. What it finds it leaves in plain
attributes, ``failure``, ``stop_requested`` and ``end_requested``, which cost the training loop nothing to read.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from datetime import timedelta

from lightning_easgd.communication._c10d import TCPStore

__all__ = ["Rendezvous"]

log = logging.getLogger(__name__)

_FAILURE, _STOP, _END = "failure", "stop", "end"
_FAREWELL = timedelta(seconds=10)  # the others look once a second; a busy machine may stand still
# A watcher counts about once a second, whatever its main thread does, unless something holds Python's lock.
_SILENCE_S = 30.0


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _progress(rank: int) -> str:
    return f"progress/{rank}"


def _seen(rank: int) -> str:
    return f"failure/seen/{rank}"


class Rendezvous:
    """A key-value store that the process of rank 0 serves, and the thread that watches it.

    Args:
        host: where rank 0 is reached.
        port: the store's port; None in rank 0, which takes a free one (read it from ``port``).
        rank: this process.
        world_size: number of processes.
        timeout: the longest wait for the store.
        poll: time between two looks.
        grace: how long a process may go on after a peer's failure before it is ended the hard way.

    Attributes:
        store: for others to use under a prefix, from the main thread.
        failure: what ended a peer, once known.
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
    ) -> None:
        self.rank, self._world_size = rank, world_size
        self.failure: str | None = None
        self.stop_requested = self.end_requested = False
        self.progress = 0
        self._told_progress = -1
        self._host, self._timeout, self._poll, self._grace = host, timeout, poll, grace
        self.store = TCPStore(
            host, port or 0, is_master=port is None, timeout=timeout, wait_for_workers=False, use_libuv=True
        )
        self.port = self.store.port
        self._over = threading.Event()
        self._beats: dict[int, tuple[int, float]] = {}  # in rank 0: a rank's last count, and when it changed
        self._last_look = time.monotonic()
        self._watcher = threading.Thread(target=self._watch, name="lightning_easgd-watcher", daemon=True)
        if world_size > 1:
            self._watcher.start()

    def report_failure(self, message: str) -> str | None:
        """Tells all processes that this one fails, and returns what another process reported before it, if one did.

        Never raises, since it is called while failing. Rank 0, with which the store ends, waits a moment until the
        others have read it.
        """
        own = f"rank {self.rank}: {message}"
        try:
            first = self.store.compare_set(_FAILURE, "", own).decode()
        except RuntimeError as error:
            log.info("rank %d could not tell the others that it fails: %s", self.rank, error)
            return self.failure
        if self.rank == 0:
            others = [_seen(rank) for rank in range(1, self._world_size)]
            try:
                self.store.wait(others, _FAREWELL)
            except RuntimeError as error:
                log.info("not all processes have read that rank 0 fails: %s", error)
        return None if first == own else first

    def request_stop(self) -> None:
        """Asks all processes to stop. Safe in a signal handler: the watcher tells the others, within ``poll``."""
        self.stop_requested = True

    def request_end(self) -> None:
        """Asks all processes to end training in good order. The watcher tells the others, within ``poll``."""
        self.end_requested = True

    def progress_of_all(self) -> list[int]:
        """Returns how far every process was when its watcher last looked. One request; blocks for nobody."""
        keys = [_progress(rank) for rank in range(self._world_size)]
        known = [key for key in keys if self.store.check([key])]
        return [int(value) for value in self.store.multi_get(known)] if known else []

    def raise_if_failed(self) -> None:
        """Raises ``RuntimeError`` with a peer's error if one failed. Local; costs an attribute."""
        if self.failure is not None:
            raise RuntimeError(f"training ends on rank {self.rank} because another process failed: {self.failure}")

    def retire(self) -> None:
        """Stops watching, for good: from here on peers may end as they like."""
        self._over.set()

    def close(self) -> None:
        """Stops the thread. The store ends with its server's last reference."""
        self.retire()
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join(timeout=5)

    def _silent(self, store: TCPStore) -> int | None:
        """Returns a rank whose watcher once counted and has stopped to: its process is dead, however it ended."""
        now = time.monotonic()
        if now - self._last_look > _SILENCE_S / 4:  # this process itself was stopped, and maybe all with it
            self._beats.clear()
        self._last_look = now
        for rank in range(1, self._world_size):
            beat = store.add(_beat(rank), 0)
            if beat and self._beats.get(rank, (0, now))[0] != beat:
                self._beats[rank] = beat, now
            elif beat and now - self._beats[rank][1] > _SILENCE_S:
                return rank
        return None

    def _watch(self) -> None:
        try:
            # A store's client serialises its calls, and a blocking one would hold up the main thread's.
            store = TCPStore(self._host, self.port, is_master=False, timeout=self._timeout)
            while not self._over.wait(self._poll.total_seconds()):
                if store.check([_STOP]):
                    self.stop_requested = True
                elif self.stop_requested:
                    store.set(_STOP, str(self.rank))
                if store.check([_END]):
                    self.end_requested = True
                elif self.end_requested:
                    store.set(_END, str(self.rank))
                if self.progress != self._told_progress:
                    self._told_progress = self.progress
                    store.set(_progress(self.rank), str(self._told_progress))
                if store.check([_FAILURE]):
                    failure = store.get(_FAILURE).decode()
                    store.set(_seen(self.rank), "1")
                    break
                store.add(_beat(self.rank), 1)
                silent = self._silent(store) if self.rank == 0 else None
                if silent is not None:
                    # Not in the name of rank 0, which must end like all others.
                    store.compare_set(_FAILURE, "", f"rank {silent}: no sign of life for {_SILENCE_S:.0f} s")
            else:
                return
        except RuntimeError as error:  # DistNetworkError, DistStoreError: the server's process is gone
            if self._over.wait(self._poll.total_seconds()):
                return
            failure = f"rank 0, which serves the store, is gone ({error})"
        if not failure.startswith(f"rank {self.rank}:"):
            self.failure = failure
        if not self._over.wait(self._grace.total_seconds()):
            # The main thread is held up, in a collective that a lost peer never answers.
            print(
                f"[lightning_easgd] rank {self.rank}: {failure}; the main thread did not end within "
                f"{self._grace.total_seconds():.0f} s, so this process is ended. Its stacks:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)
