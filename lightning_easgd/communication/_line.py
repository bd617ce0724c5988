"""One communicator for several centers on a CUDA device, used from one thread in one order on all ranks.

NCCL wants all operations on a device in one total order that is the same on all ranks. Where all replicas train, the
program is that order. A replica that is at a meeting while others train does not know whose exchange is next, so that
with several centers each exchange begins with a message that names its center. A replica that only answers asks in the
same message; where all replicas ask, all are at the meeting.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Group
from lightning_easgd.communication._transport import TransportError

__all__ = [
    "Enqueued",
    "Line",
    "Place",
    "await_event",
    "elapsed_s",
    "finite_or_zero_",
    "is_finite",
    "new_event",
    "new_stream",
]

_POLL_S = 5e-5


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns a stream of a CUDA device."""
    stream: Any = torch.cuda.Stream  # torch does not annotate its constructor
    made: torch.cuda.Stream = stream(device)
    return made


def new_event(*, timed: bool = False) -> torch.cuda.Event:
    """Returns an event, without a device until it is recorded."""
    event: Any = torch.cuda.Event  # torch does not annotate its constructor
    made: torch.cuda.Event = event(enable_timing=timed)
    return made


def await_event(event: torch.cuda.Event, timeout: timedelta) -> None:
    """Makes the host wait for an event, at most ``timeout``; ``RuntimeError`` if it is not over by then."""
    untyped: Any = event  # its methods are not annotated
    deadline = time.monotonic() + timeout.total_seconds()
    while not untyped.query():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the device has not come to it within {timeout.total_seconds():.0f} s")
        time.sleep(_POLL_S)
    untyped.synchronize()


def elapsed_s(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Returns the seconds from one timed event to another, both over; 0 where the device's events keep no time."""
    between: Any = getattr(begin, "elapsed_time", None)
    return 0.0 if between is None else max(0.0, between(end) / 1e3)


class Enqueued(Protocol):
    """A center whose exchange may be enqueued in part."""

    def enqueue_rest(self) -> None:
        """Enqueues what is left of the exchange that has begun."""
        ...


class Line:
    """The communicator of several centers, and which center's turn it is. Belongs to one thread.

    Args:
        group: over the replicas, for tensors on ``device``. Other collectives may run in it between the exchanges if
            all ranks start them at the same point.
        size: number of centers.
        device: a CUDA device.
        timeout: the longest wait of any operation.

    Attributes:
        stream: of all its centers.
        together: whether all replicas are at a meeting, and their abstentions have the program's order.
    """

    def __init__(self, group: Group, size: int, device: torch.device, timeout: timedelta) -> None:
        self.group, self.size, self._timeout = group, size, timeout
        self.stream = new_stream(device)
        self.together = False
        self._turn = torch.zeros(size, device=device)
        self._heard = torch.zeros(size, pin_memory=True)
        self._answers: int | None = None  # whose turn others have said it is
        self._last: Enqueued | None = None

    def place(self, index: int) -> "Place":
        """Returns what the ``index``-th center is opened with, 0 <= index < size."""
        return Place(self, index)

    def begin(self, index: int, center: Enqueued) -> None:
        """Says that the next operations are an exchange of the ``index``-th center. The host does not wait.

        What is left of another center's exchange comes first: for an abstention the host may wait for the others.
        """
        if self._last is not None and self._last is not center:
            self._last.enqueue_rest()
        self._last = center
        answers, self._answers = self._answers, None
        if self.size > 1 and not self.together and answers != index:
            self._say(index)

    @contextmanager
    def all_together(self) -> Iterator[None]:
        """Within it all replicas are at a meeting: the order of their exchanges is the program's."""
        self.together = True
        try:
            yield
        finally:
            self.together = False

    def forget(self, center: Enqueued) -> None:
        """Forgets a center that is closed."""
        if self._last is center:
            self._last = None

    def ask(self) -> int | None:
        """Returns the center whose exchange is to be answered next; None where all replicas ask.

        Collective with other replicas' exchanges. Blocks for them.

        Raises:
            TransportError: they did not come in time.
        """
        if self._last is not None:
            self._last.enqueue_rest()
        self._say(None)
        with torch.cuda.stream(self.stream):
            self._heard.copy_(self._turn, non_blocking=True)
            heard = new_event()
            heard.record(self.stream)
        try:
            await_event(heard, self._timeout)
        except RuntimeError as error:
            raise TransportError(f"no other replica has come to a meeting, or gone on: {error}") from error
        said = self._heard.nonzero().view(-1).tolist()
        self._answers = said[0] if said else None
        return self._answers

    def _say(self, index: int | None) -> None:
        with torch.no_grad(), torch.cuda.stream(self.stream):
            self._turn.zero_()
            if index is not None:
                self._turn[index : index + 1].fill_(1)
            self.group.allreduce([self._turn]).wait()


class Place:
    """One center's place in a line."""

    def __init__(self, line: Line, index: int) -> None:
        self.line, self.index = line, index

    @property
    def group(self) -> Group:
        """The line's communicator."""
        return self.line.group

    def begin(self, center: Enqueued) -> None:
        """See ``Line.begin``."""
        self.line.begin(self.index, center)

    def forget(self, center: Enqueued) -> None:
        """See ``Line.forget``."""
        self.line.forget(center)


def is_finite(vector: Tensor) -> Tensor:
    """Returns whether all numbers of a vector (d,), d >= 1, are finite: (), bool, on its device."""
    return torch.isfinite(torch.linalg.vector_norm(vector, float("inf")))


def finite_or_zero_(vector: Tensor) -> Tensor:
    """Sets a vector (d,), d >= 1, to zero if a number in it is not finite; returns what ``is_finite`` does of it."""
    finite = is_finite(vector)
    vector.masked_fill_(~finite, 0)
    return finite
