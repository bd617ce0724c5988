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

Departures: a run begins with t = 1, since all replicas start at the center; so the center after whole periods lacks one
step. alpha does not follow the learning rate's schedule (as in the authors' code; the paper's alpha = eta rho has a
constant eta), and alpha and beta may be given apart (thesis, arXiv:1605.02216, chapter 5). Unless a rate is given,
alpha is at most 0.1, since the paper's slows few replicas down (``_elastic``, "Drift"). Two other forms of the loop
have separate files: ``gauss_seidel``, where the replica moves first, and ``early_exchange``, where it need not wait for
its period's end.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms._accumulation import require_period
from lightning_easgd.algorithms._elastic import ElasticLoop, ElasticRates, displacement_
from lightning_easgd.algorithms._stability import Order
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.algorithms.early_exchange import EarlyExchange
from lightning_easgd.algorithms.gauss_seidel import GaussSeidel
from lightning_easgd.interfaces import Center, Replica

__all__ = ["EASGD", "Jacobi", "displacement_"]


class Jacobi(ElasticLoop):
    """The paper's loop: eqs. 5 and 6. It remembers nothing from one step to the next."""

    initial_clock = 1  # at 0 all replicas are still at the center

    def step(
        self, clock: int, replica: Replica, center: Center, local_update: Callable[[], None], rates: ElasticRates
    ) -> None:
        """Performs one iteration of Algorithm 1. The exchange goes on beside the local update."""
        if not self.is_due(clock):
            local_update()  # x <- x - eta g(x)
            return
        alpha, _ = rates.of(center.num_replicas)
        x = replica.read(out=center.borrow())  # before anything moves
        force = center.exchange(x, displacement_, scale=rates.gain(center.num_replicas))  # c <- c + alpha (x - c)
        local_update()  # x <- x - eta g(x)
        replica.add_(force.wait(), alpha=-alpha)  # x <- x - alpha (x_t - c_t)
        force.done()


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
        self.period = require_period("EASGD", period)
        self._rates = ElasticRates(moving_rate, center_rate, order)
        if order not in ("jacobi", "gauss_seidel"):
            raise ValueError(f"EASGD(order={order!r}): order must be 'jacobi' or 'gauss_seidel'")
        if early_exchange and order != "jacobi":
            raise ValueError(f"EASGD(early_exchange=True, order={order!r}): order must be 'jacobi'")
        if margin is not None and (math.isnan(margin) or not early_exchange):
            given = f"EASGD(early_exchange={early_exchange}, margin={margin!r})"
            raise ValueError(f"{given}: margin must be a number and goes with early_exchange=True, or None")
        self.moving_rate, self.center_rate, self.order = moving_rate, center_rate, order
        in_order = Jacobi if order == "jacobi" else GaussSeidel
        self._loop: ElasticLoop = EarlyExchange(period, margin) if early_exchange else in_order(period)
        self.initial_clock = self._loop.initial_clock
        self.asynchronous_only = self._loop.asynchronous_only
        self.separable = self._loop.separable

    @property
    def is_due(self) -> bool:
        """Whether the next ``step`` reads the center: one per period, and with early exchange also an early one."""
        return self._loop.is_due(self.clock)

    @property
    def is_ending(self) -> bool:
        """Whether the next ``step`` adds to the center: one that is due, or in Gauss-Seidel order a period's last."""
        return self._loop.is_ending(self.clock)

    def rates(self, num_replicas: int) -> tuple[float, float]:
        """Returns (alpha, beta) as they are with so many replicas."""
        return self._rates.of(num_replicas)

    def bind(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Takes the optimizer whose learning rate may be the margin of an early exchange. See ``Algorithm.bind``."""
        del parameters
        self._loop.bind(optimizer)

    def check(self, num_replicas: int) -> None:
        """Refuses rates that no step size makes stable, and warns beyond the paper's range.

        Stability is that of period 1; with a longer one it is the same where the loss is nearly flat, which is where
        a rate that is too large shows first.

        Raises:
            ValueError: with these rates the center diverges on every quadratic, however small the step size.
        """
        self._rates.check(repr(self), num_replicas)

    def start(self, replica: Replica, center: Center) -> None:
        """Forgets the force of other parameters; see ``Algorithm.start``.

        Raises:
            ValueError: the margin of an early exchange is neither given nor bound.
        """
        super().start(replica, center)
        self._loop.start(self.clock)

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks only on an exchange, for the center's last additions."""
        self._loop.step(self.clock, replica, center, local_update, self._rates)
        self.clock += 1

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period, both rates in force with so many replicas, and an order other than the paper's."""
        alpha, beta = self.rates(num_replicas)
        rates = {"moving_rate": alpha, "center_rate": beta}
        return {**super().hyperparameters(num_replicas), **rates, **self._loop.arguments()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the clock; in Gauss-Seidel order or with early exchange the center that was read, too."""
        return {**super().state_dict(), **self._loop.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._loop.load_state_dict(state)

    def __repr__(self) -> str:
        """Returns the constructor call."""
        given = {"period": self.period, "moving_rate": self.moving_rate, "center_rate": self.center_rate}
        arguments = {**given, **self._loop.arguments()}
        return f"EASGD({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
