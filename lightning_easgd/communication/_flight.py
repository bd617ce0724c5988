"""An operation that goes on in a thread beside the caller: how it begins and is waited for, and what it has cost."""

import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from lightning_easgd.communication._transport import Traffic

__all__ = ["Flight", "in_daemon_thread"]


class Flight:
    """One operation in a thread beside the caller, from its launch to its landing. Launched when it is made.

    Args:
        operation: what the thread does, once. What it raises is kept for the caller.
        start: has what it is given called in another thread: the ``submit`` of an executor, or ``in_daemon_thread``.

    Attributes:
        launched_at: when it was launched, by ``time.perf_counter``.
        error: what the operation has raised; None while it goes on.
    """

    def __init__(self, operation: Callable[[], None], start: Callable[[Callable[[], None]], object]) -> None:
        self.launched_at = time.perf_counter()
        self.error: BaseException | None = None
        self._landed_at = math.inf
        self._has_landed = threading.Event()
        start(lambda: self._fly(operation))

    def _fly(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except BaseException as error:
            self.error = error
        finally:
            self._landed_at = time.perf_counter()
            self._has_landed.set()

    def is_over(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits until it is over, at most ``timeout``, and returns whether it is. Safe from any thread."""
        return self._has_landed.wait(timeout.total_seconds())

    def finish(self, timeout: timedelta, traffic: Traffic) -> bool:
        """Waits until it is over, at most ``timeout``, and counts its seconds. Returns whether it is over.

        Args:
            timeout: the longest wait.
            traffic: told for how long the caller waited now, and for how long it has not.
        """
        began = time.perf_counter()
        is_over = self._has_landed.wait(timeout.total_seconds())
        traffic.exposed_s += time.perf_counter() - began
        traffic.hidden_s += max(0.0, min(self._landed_at, began) - self.launched_at)
        return is_over

    def check(self) -> None:
        """Raises what the operation has raised; ``TimeoutError`` if it is not over."""
        if not self.is_over():
            raise TimeoutError("the operation is not over")
        if self.error is not None:
            raise self.error


def in_daemon_thread(name: str) -> Callable[[Callable[[], None]], None]:
    """Returns a ``start`` for flights that must not hold up the end of the process: each has its own thread."""
    return lambda run: threading.Thread(target=run, name=name, daemon=True).start()
