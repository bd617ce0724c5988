"""ADMM, linearized and in turns: the comparison of arXiv:1412.6651, section 4, eqs. 9 to 11.

One replica at a time, in the order of their indices; lambda is already divided by rho::

    lambda^i <- lambda^i - (x^i - c)
    x^i      <- (x^i - eta g^i(x^i) + eta rho (lambda^i + c)) / (1 + eta rho)
    c        <- mean_j (x^j - lambda^j)                    all j; only i has changed

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c, p             ``replica``, ``center``, ``num_replicas``
alpha = eta rho       ``moving_rate``
eta g^i               ``local_update``: whatever the module's optimizer does
lambda^i              the multiplier, private to the replica
====================  =====================================================================================

Mean type: the effective step size does not grow with the number of replicas. It is here for the comparison: with three
replicas or more there are step sizes at which a cycle of turns is unstable on every quadratic, however gentle, while
EASGD's is stable; the paper's figure 1 is eta = 1e-3, rho = 2.5.

Departures: alpha does not follow the learning rate's schedule. With a ``period`` above 1 a replica makes local updates
between its turns. Over a synchronous center all take their turn at once, with the same c (Jacobi order).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_easgd.algorithms._accumulation import require_period
from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.gates import Gate, RoundRobin
from lightning_easgd.interfaces import Center, Replica

__all__ = ["ADMM"]


class ADMM(Algorithm):
    """Linearized ADMM over a center, in round-robin turns where the center is asynchronous.

    Reductions: the linear maps of section 4, and their spectral radii. Effective step size: mean type. Extra memory, in
    vectors of the parameters' size: the multiplier, what the center holds of this replica, and two in an exchange.
    """

    def __init__(self, period: int = 1, moving_rate: float = 0.1) -> None:
        """Creates the algorithm.

        Args:
            period: optimizer steps from one turn of a replica to its next, >= 1. Default 1 (the paper).
            moving_rate: alpha = eta rho, > 0. Default 0.1, which has no source.

        Raises:
            ValueError: an argument is out of range.
        """
        self.period = require_period("ADMM", period)
        if not 0 < moving_rate < float("inf"):
            raise ValueError(f"ADMM(moving_rate={moving_rate!r}): must be a finite number above 0")
        self.moving_rate = moving_rate
        self._multiplier: Tensor | None = None
        self._held: Tensor | None = None  # x - lambda as of the last turn: p times what the center holds of it

    def gate(self, num_replicas: int) -> Gate | None:
        """Returns the turns."""
        del num_replicas
        return RoundRobin()

    def start(self, replica: Replica, center: Center) -> None:
        """Begins with a multiplier of zero. See ``Algorithm.start``."""
        super().start(replica, center)
        x = replica.read()
        self._multiplier = x.new_zeros(x.shape)
        if self._held is None or self._held.shape != x.shape:
            self._held = x  # a replica that starts anew is still held as it was

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks only in a turn, for the center."""
        if self._multiplier is None or self._held is None:
            raise RuntimeError("ADMM.step: call start(replica, center) first")
        if not self.is_due:
            local_update()
            self.clock += 1
            return
        snapshot = center.pull()
        c = snapshot.value.clone()
        multiplier = self._multiplier.sub_(replica.read()).add_(c)  # lambda <- lambda - (x - c)
        local_update()  # x <- x - eta g(x)
        x = replica.read().add_(multiplier + c, alpha=self.moving_rate).div_(1 + self.moving_rate)
        replica.write_(x)
        held = x.sub_(multiplier)
        center.push((held - self._held).div_(center.num_replicas), read_at=snapshot.clock)
        self._held = held
        self.clock += 1

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period and moving rate."""
        return {**super().hyperparameters(num_replicas), "moving_rate": self.moving_rate}

    def state_dict(self) -> dict[str, Any]:
        """Returns clock, multiplier and what the center holds of this replica."""
        return {**super().state_dict(), "multiplier": saved(self._multiplier), "held": saved(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._multiplier, self._held = restored(state["multiplier"]), restored(state["held"])

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"ADMM(period={self.period}, moving_rate={self.moving_rate})"
