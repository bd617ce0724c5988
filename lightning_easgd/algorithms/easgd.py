"""Elastic averaging SGD: Zhang, Choromanska, LeCun, "Deep learning with Elastic Averaging SGD", arXiv:1412.6651.

Synchronous form, eqs. 5 and 6, all right-hand sides at time t (Jacobi order)::

    x^i <- x^i - eta g^i(x^i) - alpha (x^i - c)
    c   <- c   + alpha sum_i (x^i - c)                = (1 - beta) c + beta mean_i x^i

in every step t that ``period`` divides (at t = 0 all replicas are still at the center, and nothing moves), and
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

The gradient is taken at x *before* the elastic move and the center sees the same old x; so, with beta = p alpha, the
force that the replica feels is the one that the center receives, and ``sum_i x^i + c`` is conserved by an exchange (up
to rounding the sums).

Gauss-Seidel order (thesis, arXiv:1605.02216, chapter 6): the replica moves first, the gradient is taken at the moved x,
and the center sees the replica as it is at the end of the period::

    x^i <- x^i - alpha (x^i - c)
    x^i <- x^i - eta g^i(x^i)                     ``period`` times
    c   <- c + beta (mean_i x^i - c)              c as it was pulled

It joins the family: alpha = 1, beta = p is DOWNPOUR over a synchronous center, alpha = beta = 1 local SGD.

Drift: where every replica alone would move by d a period, all and the center come to move by
``beta / (alpha + beta) d``. With beta = p alpha that is p / (p + 1): the center weighs like one more replica, which has
no gradient. With two replicas a third of the learning rate is lost. So unless a rate is given, alpha is at most 0.1,
which the paper's own is from nine replicas on: the drift is at least 0.9 d. ``EASGD(center_rate=0.9)`` is the paper's
with any number of them. In Gauss-Seidel order the replica is pulled to a center that has seen it, next to nothing is
lost, and alpha is beta / p.

Departures: a run begins with t = 1, since all replicas start at the center; so the center after whole periods lacks one
step. alpha does not follow the learning rate's schedule (as in the authors' code; the paper's alpha = eta rho has a
constant eta), and alpha and beta may be given apart (thesis, arXiv:1605.02216, chapter 5). With ``early_exchange`` a
replica need not wait for its period's end: see ``equilibrium``.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms._stability import Order, stable_step_sizes
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.algorithms.equilibrium import Equilibrium
from lightning_easgd.interfaces import Center, Replica

__all__ = ["EASGD", "displacement_"]

CENTER_RATE = 0.9  # beta; section 5 of arXiv:1412.6651
MOST_MOVING_RATE = 0.1  # alpha, where no rate is given; see "Drift" above


def displacement_(x: Tensor, center: Tensor) -> None:
    """Replaces ``x`` by ``x - center``, what the elastic force is proportional to; both (d,) or one chunk of it."""
    x.sub_(center)


class EASGD(Algorithm):
    """Elastic averaging SGD with any optimizer inside (arXiv:1412.6651, eqs. 5 and 6).

    Reductions: ``moving_rate=0`` is ``num_replicas`` independent runs; one replica with ``period=1, center_rate=1,
    moving_rate=-m`` is heavy-ball momentum m. Its effective step size is set by the center rate and does not grow with
    the number of replicas. Extra memory: the force, one vector of the parameters' size, which is the message where the
    center lends its own (``AllReduce``); in Gauss-Seidel order two, with early exchange three, and then two passes and
    two norms more in every step.
    """

    def __init__(
        self,
        period: int = 10,
        moving_rate: float | None = None,
        center_rate: float | None = None,
        order: Order = "jacobi",
        early_exchange: bool = False,
        margin: float | None = None,
    ) -> None:
        """Creates the algorithm; nothing is allocated before the first exchange.

        Args:
            period: tau, optimizer steps from one exchange to the next, >= 1. Default 10 (section 5 of the paper, when
                the number of replicas varies).
            moving_rate: alpha. Default ``center_rate / num_replicas``, the paper's; in Jacobi order at most 0.1 unless
                ``center_rate`` is given. Independent of the learning rate's schedule.
            center_rate: beta. Default ``num_replicas * moving_rate`` if that is given, else 0.9 (section 5).
            order: "jacobi", the paper's, or "gauss_seidel".
            early_exchange: whether to exchange as soon as going on alone gains no more than ``margin``, and to count
                the period from there. Each replica decides by itself: for an asynchronous center and "jacobi".
            margin: of that; any number. Default: the optimizer's learning rate (Hermans' thesis).

        Raises:
            ValueError: ``period`` is not an integer >= 1, a rate is not finite, ``order`` is another, or the last two
                arguments do not fit.
        """
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ValueError(f"EASGD(period={period!r}): period must be an integer >= 1, in optimizer steps")
        for name, rate in (("moving_rate", moving_rate), ("center_rate", center_rate)):
            is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if rate is not None and not (is_number and abs(rate) < float("inf")):
                raise ValueError(f"EASGD({name}={rate!r}): {name} must be a finite number or None")
        if order not in ("jacobi", "gauss_seidel"):
            raise ValueError(f"EASGD(order={order!r}): order must be 'jacobi' or 'gauss_seidel'")
        if early_exchange and order != "jacobi":
            raise ValueError(f"EASGD(early_exchange=True, order={order!r}): order must be 'jacobi'")
        if margin is not None and (math.isnan(margin) or not early_exchange):
            given = f"EASGD(early_exchange={early_exchange}, margin={margin!r})"
            raise ValueError(f"{given}: margin must be a number and goes with early_exchange=True, or None")
        self.period = period
        self.moving_rate = moving_rate
        self.center_rate = center_rate
        self.order = order
        self._buffer: Tensor | None = None
        self._anchor: Tensor | None = None  # in Gauss-Seidel order: the center that was pulled, and its clock
        self._read_at = 0
        # Others must read the center in their first step: a period begins with it, or it tells when the next is due.
        self.initial_clock = 0 if early_exchange or order == "gauss_seidel" else 1
        self.asynchronous_only = early_exchange
        self.separable = not early_exchange  # whose trigger is a distance of the whole
        self._equilibrium = Equilibrium(margin) if early_exchange else None
        self._due_at = 0  # with early exchange: the clock at which the next one is due

    @property
    def is_due(self) -> bool:
        """Whether the next ``step`` reads the center: one a period, and with early exchange one that is early."""
        return self.clock % self.period == 0 if self._equilibrium is None else self.clock >= self._due_at

    @property
    def is_ending(self) -> bool:
        """Whether the next ``step`` adds to the center: one that is due, or in Gauss-Seidel order a period's last."""
        return self.is_due if self.order == "jacobi" else self.clock % self.period == self.period - 1

    @property
    def _has_default_rates(self) -> bool:
        return self.moving_rate is None and self.center_rate is None and self.order == "jacobi"

    def rates(self, num_replicas: int) -> tuple[float, float]:
        """Returns (alpha, beta) as they are with so many replicas."""
        if self.moving_rate is None:
            beta = CENTER_RATE if self.center_rate is None else self.center_rate
            at_most = MOST_MOVING_RATE if self._has_default_rates else math.inf
            return min(beta / num_replicas, at_most), beta
        beta = num_replicas * self.moving_rate if self.center_rate is None else self.center_rate
        return self.moving_rate, beta

    def bind(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Takes the optimizer whose learning rate may be the margin of an early exchange. See ``Algorithm.bind``."""
        del parameters
        if self._equilibrium is not None:
            self._equilibrium.bind(optimizer)

    def check(self, num_replicas: int) -> None:
        """Refuses rates that no step size makes stable, and warns beyond the paper's range.

        Stability is that of period 1; with a longer one it is the same where the loss is nearly flat, which is where
        a rate that is too large shows first.

        Raises:
            ValueError: with these rates the center diverges on every quadratic, however small the step size.
        """
        alpha, beta = self.rates(num_replicas)
        given = f"{self!r} with {num_replicas} replicas"
        stable = stable_step_sizes(num_replicas, alpha, beta, self.order)
        if stable is None:
            raise ValueError(
                f"{given}: no step size is stable with a moving rate of {alpha:g} and a center rate of {beta:g}; a "
                f"moving rate above 0 and below 2 / (num_replicas + 1) = {2 / (num_replicas + 1):g} can be, "
                f"{EASGD(order=self.order).rates(num_replicas)[0]:g} is the default"
            )
        if stable[0] > 0:
            warnings.warn(
                f"{given}: stable only where learning rate times curvature is between {stable[0]:g} and {stable[1]:g}: "
                "directions of smaller curvature diverge",
                stacklevel=2,
            )
        if beta > 1 and self.order == "jacobi":
            warnings.warn(
                f"{given}: a center rate of {beta:g} is beyond the paper's range (0 to 1): the center overshoots the "
                f"mean of the replicas and amplifies their noise; {CENTER_RATE} is the default",
                stacklevel=2,
            )

    def start(self, replica: Replica, center: Center) -> None:
        """Forgets the force of other parameters; see ``Algorithm.start``.

        Raises:
            ValueError: the margin of an early exchange is neither given nor bound.
        """
        super().start(replica, center)
        self._buffer = self._anchor = None
        if self._equilibrium is not None:
            self._equilibrium.start()
            self._due_at = self.clock  # it must read a center before it can do without

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration of Algorithm 1. Blocks only on an exchange, for the center's last additions."""
        if self.order == "gauss_seidel":
            self._step_gauss_seidel(replica, center, local_update)
            return
        exchange, equilibrium = self.is_due, self._equilibrium
        if exchange:
            alpha, beta = self.rates(center.num_replicas)
            self._due_at = self.clock + self.period
            # beta = p alpha where one of them is given, but p alpha / p is not alpha in floating point.
            apart = self._has_default_rates or (self.moving_rate is not None and self.center_rate is not None)
            gain = beta / center.num_replicas if apart else alpha
            x = replica.read(out=center.borrow() if equilibrium is None else self._buffer)  # before anything moves
            pending = center.exchange(x, displacement_, scale=gain)  # c <- c + alpha (x - c)
        if equilibrium is None:
            local_update()  # x <- x - eta g(x), at the x before the elastic move; the exchange goes on beside it
        else:
            equilibrium.around(replica, local_update, None if exchange else self._buffer)
        if exchange:
            replica.add_(pending.wait(), alpha=-alpha)  # x <- x - alpha (x_t - c_t)
            if equilibrium is not None:
                self._buffer = x
                equilibrium.reads(x)
            pending.done()
        if equilibrium is not None and equilibrium.holds(self.rates(center.num_replicas)[0]):
            self._due_at = self.clock + 1
        self.clock += 1

    def _step_gauss_seidel(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        alpha, beta = self.rates(center.num_replicas)
        is_ending = self.is_ending
        if self.is_due or self._anchor is None:
            snapshot = center.pull()
            self._anchor, self._read_at = snapshot.value.clone(), snapshot.clock
            self._buffer = replica.read(out=self._buffer).sub_(self._anchor)
            replica.add_(self._buffer, alpha=-alpha)  # x <- x - alpha (x - c)
        local_update()  # x <- x - eta g(x)
        if is_ending:
            force = self._buffer = replica.read(out=self._buffer)
            force.sub_(self._anchor).mul_(beta / center.num_replicas)
            center.push(force, read_at=self._read_at)  # c <- c + beta / p (x - c)
        self.clock += 1

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period, both rates in force with so many replicas, and an order other than the paper's."""
        alpha, beta = self.rates(num_replicas)
        order = {} if self.order == "jacobi" else {"order": self.order}
        early = {} if self._equilibrium is None else {"early_exchange": True, "margin": self._equilibrium.margin}
        return {**super().hyperparameters(num_replicas), "moving_rate": alpha, "center_rate": beta, **order, **early}

    def state_dict(self) -> dict[str, Any]:
        """Returns the clock; in Gauss-Seidel order or with early exchange the center that was read, too."""
        if self._equilibrium is not None:
            return {**super().state_dict(), "due_at": self._due_at, **self._equilibrium.state_dict()}
        if self._anchor is None:
            return super().state_dict()
        return {**super().state_dict(), "anchor": self._anchor.to("cpu", copy=True), "read_at": self._read_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        if self._equilibrium is not None and "due_at" in state:
            self._due_at = int(state["due_at"])
            self._equilibrium.load_state_dict(state)
            self._buffer = None if state["anchor"] is None else torch.empty_like(state["anchor"])
        elif "read_at" in state:
            self._anchor, self._read_at = state["anchor"].clone(), int(state["read_at"])

    def __repr__(self) -> str:
        """Returns the constructor call."""
        order = "" if self.order == "jacobi" else f", order={self.order!r}"
        early = "" if self._equilibrium is None else f", early_exchange=True, margin={self._equilibrium.margin}"
        rates = f"moving_rate={self.moving_rate}, center_rate={self.center_rate}"
        return f"EASGD(period={self.period}, {rates}{order}{early})"
