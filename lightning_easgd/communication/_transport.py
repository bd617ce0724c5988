"""The transport's interface: a transport opens a center for one replica and delivers the deltas.

A ``Transport`` is inert and picklable; ``open`` gives the ``OpenCenter`` through which one replica pulls and pushes
until it is closed. A transport makes its own process groups over a store. It never uses torch's default group, which
belongs to Lightning.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication.membership import Membership
from lightning_easgd.interfaces import Exchange, Snapshot
from lightning_easgd.rules import CenterRule

__all__ = [
    "Completed",
    "NonFiniteDeltaError",
    "OpenCenter",
    "Outstanding",
    "Traffic",
    "Transport",
    "TransportError",
    "check_open",
]


_REMEDY = (
    "it was kept out of the center. Lower the learning rate or clip gradients, or let such a replica start again from "
    "the center with on_nonfinite='reset'"
)


class TransportError(RuntimeError):
    """A pull or push that could not be completed: names the replica and the operation."""


class NonFiniteDeltaError(ValueError):
    """A delta with an infinity or a NaN was refused. Nothing of it stays in the center."""


@dataclass
class Traffic:
    """What one replica's exchanges have cost so far.

    Attributes:
        exchanges: deltas that this replica has added; abstentions are not counted.
        bytes_sent: bytes that left this replica for others, payload and slots, without the network's headers. What
            goes through memory that they share is not sent.
        exposed_s: seconds that the replica stood still for communication.
        hidden_s: seconds of communication that went on while the replica computed.
        wait_s: seconds spent waiting for a lock, or for a server to answer; part of the two above.
        staleness: additions that the center saw between the last delta's reading and its addition.
        drift: Euclidean distance that the center moved between these two moments; measured only on request.
    """

    exchanges: int = 0
    bytes_sent: int = 0
    exposed_s: float = 0.0
    hidden_s: float = 0.0
    wait_s: float = 0.0
    staleness: int = 0
    drift: float = 0.0


class Completed:
    """An exchange that was over when it was asked for.

    Args:
        delta: (d,) what was added.
    """

    def __init__(self, delta: Tensor) -> None:
        self._delta = delta

    def wait(self) -> Tensor:
        """Returns the delta at once."""
        return self._delta

    def done(self) -> None:
        """Does nothing: the delta is the caller's own."""


def _nothing() -> None:
    pass


class Outstanding:
    """An exchange of which something is still to come.

    Args:
        delta: (d,) the caller's vector, or the one that the center has lent.
        complete: called by ``wait``: blocks until ``delta`` is there, and raises if it is not to be. By default it is.
        release: called by ``done``: takes back what was lent. By default the delta is the caller's own.
    """

    def __init__(
        self, delta: Tensor, *, complete: Callable[[], None] = _nothing, release: Callable[[], None] = _nothing
    ) -> None:
        self._delta, self._complete, self._release = delta, complete, release

    def wait(self) -> Tensor:
        """Completes the exchange and returns its delta."""
        self._complete()
        return self._delta

    def done(self) -> None:
        """Gives a vector that was lent back."""
        self._release()


class OpenCenter(ABC):
    """The center as one replica reaches it, from ``Transport.open`` to ``close``. Use from one thread.

    Besides the vector, an exchange carries a few *slots*: numbers that are summed over the replicas together with the
    deltas, so that an agreement needs no extra message. A *synchronous* center sums what all announce in the same
    exchange; an asynchronous one what each replica has announced last.

    Attributes:
        synchronous: whether the replicas' n-th exchanges are one operation, for which all wait.
        membership: which replicas share the center now.
        announcement: (num_slots,) what this replica adds to the slots with each push or abstention; write to it.
        announced: (num_slots,) on the CPU, the slots' sum as of the last completed exchange; zeros before the first.
        traffic: what the exchanges have cost.
        measures_drift: whether the next exchange measures ``traffic.drift``, which costs a pass; write to it.
        verdict: (), bool, on the center's device: whether the next delta is finite, where a caller that sees more of it
            has looked; None where the center is to look. For a synchronous center on a device.
    """

    synchronous: ClassVar[bool]
    verdict: Tensor | None = None

    def __init__(self, *, replica: int, num_replicas: int, num_slots: int, dtype: torch.dtype) -> None:
        self.membership = Membership.constant(replica=replica, num_replicas=num_replicas)
        self.announcement = torch.zeros(num_slots, dtype=dtype)
        self.announced = torch.zeros(num_slots, dtype=dtype)
        self.traffic = Traffic()
        self.measures_drift = False
        self._lent: Tensor | None = None

    @property
    def replica(self) -> int:
        """Index of this replica, 0 <= replica < num_replicas."""
        return self.membership.mine

    @property
    def num_replicas(self) -> int:
        """How many replicas share the center now."""
        return self.membership.size

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """(d,) the center as of the last completed pull, without waiting for an outstanding one. Not a copy.

        A synchronous center's is after the last completed exchange. Where the center lives elsewhere this is the
        replica's private copy; where there is none, since nothing was pulled yet or an exchange has used its memory, it
        pulls. Ask for it again after an exchange.
        """

    @property
    @abstractmethod
    def clock(self) -> int:
        """The additions that the center had seen in the last completed operation of this replica."""

    @property
    def additions(self) -> int:
        """The deltas that the center had received then: the clock, where abstentions do not count."""
        return self.clock

    @abstractmethod
    def pull(self) -> Snapshot:
        """Completes what is outstanding and returns the center. Blocks at most the timeout.

        Raises:
            TransportError: a peer is gone, or the timeout ran out.
        """

    @abstractmethod
    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds ``delta`` to the center; returns before delivery. See ``Center.push``.

        Raises:
            NonFiniteDeltaError: ``delta`` is refused; nothing was sent, ``abstain`` may be called instead.
            TransportError: an exchange that was outstanding could not be completed.
        """

    def borrow(self) -> Tensor:
        """Lends (d,) memory for the x of an exchange; see ``Center.borrow``. Here it is a vector more, kept."""
        if self._lent is None:
            self._lent = self.new_vector()
        return self._lent

    @abstractmethod
    def new_vector(self) -> Tensor:
        """Returns (d,) memory like the center, where the replica is, without a look at the center."""

    @abstractmethod
    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """Reads the center and adds to it as one. See ``Center.exchange``; raises like ``push``."""

    def announce_late(self, first: int, numbers: Tensor) -> None:
        """Announces numbers that are on the center's device, from the next push or abstention on.

        Args:
            first: the slot of the first of them.
            numbers: (n,) the host does not read them where the center is on a device. Not written to afterwards.
        """
        self.announcement[first : first + numbers.numel()] = numbers

    @abstractmethod
    def abstain(self) -> None:
        """Sends the slots as with ``push`` without adding anything; a synchronous center takes this replica's turn."""

    @abstractmethod
    def lost(self) -> list[int]:
        """Returns the replicas that are known to have ended without ``close``. Costs little; never waits for a peer."""

    @abstractmethod
    def drain(self, timeout: timedelta | None = None) -> None:
        """Completes what is outstanding. Blocks at most ``timeout`` (default: the center's own).

        Raises:
            TransportError: it could not be completed; the center keeps its value from before.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive a restart besides the value: clock, the rule's memory, traffic. Drained before."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], value: Tensor) -> None:
        """Restores the center's ``value`` (d,) and what ``state_dict`` returned. Collective: every replica does so."""

    @abstractmethod
    def close(self) -> None:
        """Releases groups and buffers without waiting for peers; what is outstanding is given up. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_nonfinite(self, delta: Tensor) -> None:
        """Raises ``NonFiniteDeltaError`` unless every number is finite. One pass; on CUDA it waits for the device."""
        # A sum is finite only if all numbers are, and far cheaper than the look at each; but it may overflow by itself.
        if not (math.isfinite(float(delta.sum())) or bool(torch.isfinite(delta).all())):
            bad = int((~torch.isfinite(delta)).sum())
            raise NonFiniteDeltaError(
                f"replica {self.replica}: {bad} of {delta.numel()} numbers in its delta are not finite; {_REMEDY}"
            )

    def _refuse_late(self) -> NoReturn:
        """Raises ``NonFiniteDeltaError`` for the delta of the exchange before, as a device has found it."""
        raise NonFiniteDeltaError(
            f"replica {self.replica}: not all numbers in its delta of the exchange before were finite; {_REMEDY}"
        )


class Transport(ABC):
    """How a replica reaches the center. Inert and picklable until ``open``.

    Attributes:
        synchronous: whether the centers that it opens are.
    """

    synchronous: ClassVar[bool]

    @abstractmethod
    def open(
        self,
        initial: Tensor,
        *,
        replica: int,
        num_replicas: int,
        rule: CenterRule,
        store: Store,
        timeout: timedelta,
        num_slots: int = 0,
    ) -> OpenCenter:
        """Opens the center. Collective and blocking: every replica calls it with the same arguments but ``replica``.

        Args:
            initial: (d,) float32 or float64; replica 0's becomes the center. Neither kept nor modified.
            replica: index of the caller, 0 <= replica < num_replicas.
            num_replicas: how many replicas share the center.
            rule: what the center does with a delta.
            store: where the replicas find each other; used with the caller's prefix, by this center alone.
            timeout: the longest wait of any operation.
            num_slots: numbers that ride along with each exchange.

        Raises:
            ValueError: an argument is out of range.
            TransportError: not all replicas came in time.
        """


def check_open(transport: Transport, initial: Tensor, replica: int, num_replicas: int, rule: CenterRule) -> None:
    """Raises ``ValueError`` if these are no arguments for ``open`` of the transport."""
    name = type(transport).__name__
    if not 0 <= replica < num_replicas:
        raise ValueError(f"{name}.open(replica={replica}): must be at least 0 and below {num_replicas}")
    if initial.ndim != 1 or initial.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}.open(initial=<{initial.dtype}, shape {tuple(initial.shape)}>): must be one flat vector of "
            "float32 or float64"
        )
    if rule.synchronous_only and not transport.synchronous:
        raise ValueError(
            f"{name}.open(rule={rule!r}): this rule must see the whole center with the sum of all deltas; it needs a "
            "synchronous transport, such as AllReduce()"
        )
