"""ADAG, asynchronous distributed adaptive gradients: Hermans, thesis, CERN 2017, combined with AGN as he recommends.

Each replica, every ``period`` steps::

    x^i <- x^i - eta g^i(x^i)   period times, from where it stood
    c_t <- pull;   f = 1 / ((c_t - a^i)^2 / gamma + 1)      elementwise: how far the center has moved since
    d   =  f (x^i - a^i) / lambda
    c   <- c + d                                            push
    a^i <- x^i <- c_t + d                                   goes on from there

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c                ``replica``, ``center``
a^i                   the center as this replica knew it when the period began, its own last delta included
lambda                ``period``, in optimizer steps
gamma                 ``scale``; the thesis has the learning rate eta or 1e-4 in its place
eta g^i               ``local_update``: whatever the module's optimizer does
====================  =====================================================================================

Staleness here is the distance that the center has gone, not a count: where the others have not moved a weight, an old
delta of it is as good as a new one.

Sum type; damped where the replicas move the same weights. A number of the vector is never scaled by more
than 1 / lambda.

Departures: the thesis writes a squared norm and calls it a factor per weight, its code squares elementwise; this is
elementwise. Of the three implementations that it lists this is the one at the replica, which needs no memory at the
center: it reads, scales and goes on from what it has read. So its scale is not taken under the center's lock: what
others add between its read and its push is not seen.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_easgd.algorithms._accumulation import require_period
from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.interfaces import Center, Replica

__all__ = ["ADAG", "damping"]


def damping(center: Tensor, anchor: Tensor, scale: float) -> Tensor:
    """Returns ``1 / ((center - anchor)^2 / scale + 1)``, elementwise, in (0, 1]."""
    return (center - anchor).square_().div_(scale).add_(1).reciprocal_()


class ADAG(Algorithm):
    """AGN with each number of the delta damped by how far the center has gone from under it.

    Reductions: one replica is AGN, up to rounding. Effective step size: sum type, damped. Extra memory: the anchor and
    what is pushed, two vectors of the parameters' size, and a third while it exchanges.
    """

    reads_late = True

    def __init__(self, period: int = 5, scale: float = 1e-4) -> None:
        """Creates the algorithm.

        Args:
            period: lambda, optimizer steps from one exchange to the next, >= 1. Default 5 (dist-keras).
            scale: gamma, the squared distance at which a delta is halved, > 0. Default 1e-4 (thesis).

        Raises:
            ValueError: an argument is out of range.
        """
        self.period = require_period("ADAG", period)
        if not 0 < scale < float("inf"):
            raise ValueError(f"ADAG(scale={scale!r}): must be a finite number above 0")
        self.scale = scale
        self._anchor: Tensor | None = None
        self._delta: Tensor | None = None

    @property
    def is_due(self) -> bool:
        """Whether the next ``step`` is the last of a period and exchanges."""
        return self.clock % self.period == self.period - 1

    def start(self, replica: Replica, center: Center) -> None:
        """Begins from where the replica stands, which is the center. See ``Algorithm.start``."""
        super().start(replica, center)
        self._anchor, self._delta = replica.read(), None

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks only at the end of a period, for the center."""
        is_due = self.is_due
        anchor = self._anchor = replica.read() if self._anchor is None else self._anchor
        local_update()  # x <- x - eta g(x)
        if is_due:
            snapshot = center.pull()
            delta = self._delta = replica.read(out=self._delta).sub_(anchor).div_(self.period)
            delta.mul_(damping(snapshot.value, anchor, self.scale))
            self._anchor = snapshot.value + delta
            center.push(delta, read_at=snapshot.clock)
            replica.write_(self._anchor)  # x <- c + d
        self.clock += 1

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period and scale."""
        return {**super().hyperparameters(num_replicas), "scale": self.scale}

    def state_dict(self) -> dict[str, Any]:
        """Returns clock and anchor."""
        return {**super().state_dict(), "anchor": saved(self._anchor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._anchor = restored(state["anchor"])

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"ADAG(period={self.period}, scale={self.scale})"
