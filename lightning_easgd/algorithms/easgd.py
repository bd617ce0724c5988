"""Elastic averaging SGD: Zhang, Choromanska, LeCun, "Deep learning with Elastic Averaging SGD", arXiv:1412.6651.

Synchronous form, eqs. 5 and 6, all right-hand sides at time t (Jacobi order)::

    x^i <- x^i - eta g^i(x^i) - alpha (x^i - c)
    c   <- c   + alpha sum_i (x^i - c)                = (1 - beta) c + beta mean_i x^i

every ``period`` steps, beginning with the first (a no-op there, since all replicas start at the center), and
``x^i <- x^i - eta g^i(x^i)`` in between. Algorithm 1 of the paper is the same loop over an asynchronous center.

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c, p             ``replica``, ``center``, ``num_replicas``
tau                   ``period``, in optimizer steps
alpha = eta rho       ``moving_rate``: what the replica moves by
beta = p alpha        ``center_rate``: what the center moves by, towards the mean of the replicas
eta g^i               ``local_update``: whatever the module's optimizer does, momentum and weight decay included
====================  =====================================================================================

The gradient is taken at x *before* the elastic move and the center sees the same old x; so the force that the replica
feels is to the last bit the one that the center receives, and ``sum_i x^i + c`` is conserved by an exchange.

Departures: alpha does not follow the learning rate's schedule (as in the authors' code; the paper's alpha = eta rho
has a constant eta), and alpha and beta may be given apart (thesis, arXiv:1605.02216, chapter 5).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lightning_easgd.algorithms._interfaces import Algorithm, Center, Replica

__all__ = ["EASGD", "elastic_force_", "stable_step_sizes"]

CENTER_RATE = 0.9  # beta; section 5 of arXiv:1412.6651


def elastic_force_(x: Tensor, center: Tensor, rate: float) -> None:
    """Replaces ``x`` by ``rate * (x - center)``; both (d,) or one chunk of it."""
    x.sub_(center).mul_(rate)


def stable_step_sizes(num_replicas: int, moving_rate: float, center_rate: float) -> tuple[float, float] | None:
    """Returns the open interval of e = eta h in which synchronous EASGD with period 1 is stable on a quadratic.

    h is a curvature. The mean replica and the center move by ``[[1-e-alpha, alpha], [beta, 1-beta]]``, the replicas'
    differences by ``1 - e - alpha``; the Jury conditions on the first and ``|.| < 1`` on the second are linear in e.
    With ``beta = p alpha`` the upper end solves ``alpha = 2 (2 - e) / (2 + p (2 - e))``.

    Args:
        num_replicas: p, >= 1.
        moving_rate: alpha, any sign.
        center_rate: beta.

    Returns:
        ``(low, high)``, or None where no step size is stable.
    """
    a, b = moving_rate, center_rate
    if b == 0:  # the center stays where it is
        return (max(0.0, -a), 2 - a) if a < 2 else None
    if b < 0:
        return None  # an eigenvalue stays beyond 1
    # Each condition reads: slope * e < bound.
    conditions = [
        (-1.0, 0.0),
        (2 - b, 4 - 2 * a - 2 * b),  # 1 + trace + det > 0
        (b - 1, a + b),  # det < 1
        (1 - b, 2 - a - b),  # det > -1
    ]
    if num_replicas > 1:
        conditions += [(1.0, 2 - a), (-1.0, a)]  # the differences between replicas
    low, high = 0.0, float("inf")
    for slope, bound in conditions:
        if slope > 0:
            high = min(high, bound / slope)
        elif slope < 0:
            low = max(low, bound / slope)
        elif bound <= 0:
            return None
    return (low, high) if low < high - 1e-9 else None  # rounding leaves a sliver where there is nothing


class EASGD(Algorithm):
    """Elastic averaging SGD with any optimizer inside (arXiv:1412.6651, eqs. 5 and 6).

    Reductions: ``moving_rate=0`` is ``num_replicas`` independent runs; one replica with ``period=1, center_rate=1,
    moving_rate=-m`` is heavy-ball momentum m. Its effective step size is set by the center rate and does not grow with
    the number of replicas. Extra memory: the force, one vector of the parameters' size.
    """

    def __init__(self, period: int = 10, moving_rate: float | None = None, center_rate: float | None = None) -> None:
        """Creates the algorithm; nothing is allocated before the first exchange.

        Args:
            period: tau, optimizer steps from one exchange to the next, >= 1. Default 10 (section 5 of the paper, when
                the number of replicas varies).
            moving_rate: alpha. Default ``center_rate / num_replicas``. Independent of the learning rate's schedule.
            center_rate: beta. Default ``num_replicas * moving_rate`` if that is given, else 0.9 (section 5).

        Raises:
            ValueError: ``period`` is not an integer >= 1, or a rate is not finite.
        """
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ValueError(f"EASGD(period={period!r}): period must be an integer >= 1, in optimizer steps")
        for name, rate in (("moving_rate", moving_rate), ("center_rate", center_rate)):
            is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if rate is not None and not (is_number and abs(rate) < float("inf")):
                raise ValueError(f"EASGD({name}={rate!r}): {name} must be a finite number or None")
        self.period = period
        self.moving_rate = moving_rate
        self.center_rate = center_rate
        self._force: Tensor | None = None

    def rates(self, num_replicas: int) -> tuple[float, float]:
        """Returns (alpha, beta) as they are with so many replicas."""
        if self.moving_rate is None:
            beta = CENTER_RATE if self.center_rate is None else self.center_rate
            return beta / num_replicas, beta
        beta = num_replicas * self.moving_rate if self.center_rate is None else self.center_rate
        return self.moving_rate, beta

    def check(self, num_replicas: int) -> None:
        """Refuses rates that no step size makes stable, and warns beyond the paper's range.

        Stability is that of period 1; with a longer one it is the same where the loss is nearly flat, which is where
        a rate that is too large shows first.

        Raises:
            ValueError: with these rates the center diverges on every quadratic, however small the step size.
        """
        alpha, beta = self.rates(num_replicas)
        given = f"{self!r} with {num_replicas} replicas"
        stable = stable_step_sizes(num_replicas, alpha, beta)
        if stable is None:
            raise ValueError(
                f"{given}: no step size is stable with a moving rate of {alpha:g} and a center rate of {beta:g}; a "
                f"moving rate above 0 and below 2 / (num_replicas + 1) = {2 / (num_replicas + 1):g} can be, "
                f"{CENTER_RATE / num_replicas:g} is the default"
            )
        if stable[0] > 0:
            warnings.warn(
                f"{given}: stable only where learning rate times curvature is between {stable[0]:g} and {stable[1]:g}: "
                "directions of smaller curvature diverge",
                stacklevel=2,
            )
        if beta > 1:
            warnings.warn(
                f"{given}: a center rate of {beta:g} is beyond the paper's range (0 to 1): the center overshoots the "
                f"mean of the replicas and amplifies their noise; {CENTER_RATE} is the default",
                stacklevel=2,
            )

    def start(self, replica: Replica, center: Center) -> None:
        """Forgets the force of other parameters; see ``Algorithm.start``."""
        super().start(replica, center)
        self._force = None

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration of Algorithm 1. Blocks only on an exchange, for the center's last additions."""
        exchange = self.is_due
        if exchange:
            alpha, beta = self.rates(center.num_replicas)
            # alpha = beta / p unless both are given, but p alpha / p is not alpha in floating point: then, what is
            # felt and what is received are one tensor.
            apart = self.moving_rate is not None and self.center_rate is not None
            rate, gain, pull = (1.0, beta / center.num_replicas, alpha) if apart else (alpha, 1.0, 1.0)
            x = self._force = replica.read(out=self._force)  # before anything moves
            force = center.exchange(x, partial(elastic_force_, rate=rate), scale=gain)  # c <- c + alpha (x - c)
        local_update()  # x <- x - eta g(x), at the x before the elastic move; the exchange goes on beside it
        if exchange:
            replica.add_(force.wait(), alpha=-pull)  # x <- x - alpha (x_t - c_t)
        self.clock += 1

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period and both rates as they are with so many replicas."""
        alpha, beta = self.rates(num_replicas)
        return {**super().hyperparameters(num_replicas), "moving_rate": alpha, "center_rate": beta}

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"EASGD(period={self.period}, moving_rate={self.moving_rate}, center_rate={self.center_rate})"
