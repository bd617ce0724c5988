"""Overlap Local-SGD: Wang, Liang, Joshi, "Overlap Local-SGD", arXiv:2002.09539.

Local SGD towards an anchor that is a period old, so that computing it hides behind a period of compute. Every
``period`` steps, before the first of them::

    x^i <- x^i - alpha (x^i - c)                         pull back; c is the anchor
    v   <- beta v + mean_i (x^i - c)                     x^i as it is now
    c   <- c + v                                         what the next exchange finds

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c (paper: z), p  ``replica``, ``center``, ``num_replicas``
tau                   ``period``, in optimizer steps
alpha                 ``moving_rate``: what the replica moves by
beta                  ``anchor_momentum``
inner optimizer       ``local_update``; its state stays with the replica
====================  =====================================================================================

It is EASGD with momentum, and with a center that goes all the way to the mean of the replicas after they have moved.
With respect to the replicas before they move, the center rate is 1 - alpha. Mean type: the effective step size does not
grow with the number of replicas; the anchor's momentum multiplies it by 1 / (1 - beta).

Departures: the authors' code keeps v / eta, which rescales v when the learning rate eta changes; here it does not, as
with SlowMo.
"""

from collections.abc import Callable
from typing import Any

from lightning_easgd.algorithms._accumulation import require_period
from lightning_easgd.algorithms._elastic import displacement_
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.interfaces import Center, Replica
from lightning_easgd.rules import Addition, CenterRule, MomentumCenter

__all__ = ["OverlapLocalSGD"]


class OverlapLocalSGD(Algorithm):
    """Pulls each replica back to an anchor, the replicas' mean of one period ago, with momentum.

    Reductions: ``moving_rate=0`` is ``num_replicas`` independent runs; without momentum it is EASGD in Gauss-Seidel
    order whose center sees the replica where it has moved to. Effective step size: mean type. Extra memory: the message
    where the center lends none, and the anchor's velocity.
    """

    synchronous_only = True  # the anchor moves by all replicas' mean
    separable = True

    def __init__(self, period: int = 2, moving_rate: float = 0.6, anchor_momentum: float = 0.7) -> None:
        """Creates the algorithm; the defaults are those of the authors' CIFAR-10 runs.

        Args:
            period: tau, optimizer steps from one exchange to the next, >= 1.
            moving_rate: alpha, in [0, 1). 1 would take back every step.
            anchor_momentum: beta, in [0, 1).

        Raises:
            ValueError: an argument is out of range.
        """
        self.period = require_period("OverlapLocalSGD", period)
        for name, value in (("moving_rate", moving_rate), ("anchor_momentum", anchor_momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"OverlapLocalSGD({name}={value!r}): must be at least 0 and below 1")
        self.moving_rate = moving_rate
        self.anchor_momentum = anchor_momentum

    def rule(self, num_replicas: int) -> CenterRule:
        """Returns the anchor's step."""
        del num_replicas
        return MomentumCenter(self.anchor_momentum, nesterov=False) if self.anchor_momentum else Addition()

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks only on an exchange, for the anchor of the one before."""
        if self.is_due:
            x = replica.read(out=center.borrow())
            # Where x has moved to it is 1 - alpha times as far away; the sum over replicas is to be the mean.
            scale = (1 - self.moving_rate) / center.num_replicas
            pending = center.exchange(x, displacement_, scale=scale)  # v <- beta v + mean (x - c);  c <- c + v
            replica.add_(pending.wait(), alpha=-self.moving_rate)  # x <- x - alpha (x - c)
            pending.done()
        local_update()  # x <- x - eta g(x)
        self.clock += 1

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period, moving rate and the anchor's momentum."""
        rates = {"moving_rate": self.moving_rate, "anchor_momentum": self.anchor_momentum}
        return {**super().hyperparameters(num_replicas), **rates}

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return (
            f"OverlapLocalSGD(period={self.period}, moving_rate={self.moving_rate}, "
            f"anchor_momentum={self.anchor_momentum})"
        )
