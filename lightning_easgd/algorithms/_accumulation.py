"""The loop of all methods in which a replica begins a period at the center and pushes its steps of that period.

Every ``period`` steps::

    x^i <- c                                     pull; a^i is the center that was pulled, the anchor
    x^i <- x^i - eta g^i(x^i)   period times     the module's optimizer, whatever it is
    c   <- rule(c, gain (x^i - a^i))             push

They differ in the gain (1 for DOWNPOUR, 1/tau for AGN, 1/p for local SGD) and in what the center does with a delta.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.interfaces import Center, Replica

__all__ = ["Accumulation", "require_period"]


def require_period(owner: str, period: int) -> int:
    """Returns ``period``; raises ``ValueError`` unless it is an integer >= 1."""
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"{owner}(period={period!r}): period must be an integer >= 1, in optimizer steps")
    return period


class Accumulation(Algorithm):
    """The loop above. Abstract; extra memory: the anchor and what is pushed, two vectors of the parameters' size.

    The push is the last thing in a period and the pull the first in the next, so that over a synchronous center the
    all-reduce goes on beside whatever lies between two steps, and that after a whole number of periods the center
    contains all that was done.
    """

    separable = True

    def __init__(self, period: int) -> None:
        self.period = require_period(type(self).__name__, period)
        self._anchor: Tensor | None = None
        self._read_at = 0
        self._delta: Tensor | None = None
        self._has_begun = False

    @property
    def is_ending(self) -> bool:
        """Whether the next ``step`` is the last of a period and pushes."""
        return self.clock % self.period == self.period - 1

    @abstractmethod
    def gain(self, num_replicas: int) -> float:
        """Returns the factor of what is pushed."""

    def start(self, replica: Replica, center: Center) -> None:
        """Forgets what was accumulated: the next step begins at the center. See ``Algorithm.start``."""
        super().start(replica, center)
        self._anchor = self._delta = None
        self._has_begun = False

    def begin(self, replica: Replica, center: Center) -> None:
        """Puts the replica on the center where the next step begins a period. See ``Algorithm.begin``."""
        self._begin(replica, center)

    def _begin(self, replica: Replica, center: Center) -> Tensor:
        """Returns the anchor of the period that the next step belongs to."""
        if self._anchor is None or (self.is_due and not self._has_begun):
            snapshot = center.pull()
            self._anchor, self._read_at = snapshot.value.clone(), snapshot.clock
            self._adopt(replica, self._anchor)
        self._has_begun = True
        return self._anchor

    def _adopt(self, replica: Replica, center: Tensor) -> None:
        """Takes the replica to the center (d,) that a period has begun with."""
        replica.write_(center)  # x <- c

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks only at the beginning of a period, for the center."""
        is_ending = self.is_ending
        anchor = self._begin(replica, center)
        local_update()  # x <- x - eta g(x)
        if is_ending:
            self._delta = replica.read(out=self._delta).sub_(anchor)
            gain = self.gain(center.num_replicas)
            center.push(self._delta if gain == 1 else self._delta.mul_(gain), read_at=self._read_at)
        self.clock += 1
        self._has_begun = False

    def state_dict(self) -> dict[str, Any]:
        """Returns clock and anchor."""
        return {**super().state_dict(), "anchor": saved(self._anchor), "read_at": self._read_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._anchor = restored(state["anchor"])
        self._read_at = int(state["read_at"])
        self._has_begun = False

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"{type(self).__name__}(period={self.period})"
