"""Elastic-SGD, as the Parle paper compares itself with: arXiv:1707.00424.

Every step, c the mean of the replicas::

    x^a <- x^a - eta [g^a(x^a) + (1 / rho) (x^a - c)]
    c   <-  mean_a x^a;  rho <- max(min, s rho)

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^a, c                ``replica``, ``center``
eta g^a               ``local_update``: the module's optimizer
rho, s                ``coupling``, ``scoping``
====================  =====================================================================================

The elastic force enters the gradient, as in the authors' experiment code (``pratikac/distributed-ensembles``): it gets
the optimizer's learning rate, momentum and preconditioning. EASGD's does not: it moves replica and center by a rate of
its own, and its center is a running average instead of the mean.

Mean type: the effective step size does not grow with the number of replicas. With SGD on a quadratic of curvature h the
mean of the replicas is multiplied by ``1 - eta h`` per step, their differences by ``1 - eta (h + 1 / rho)``.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_easgd.algorithms._local_entropy import annealed, check_annealing, nesterov_bound, scoping_in_force
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.interfaces import Center, ProximalTerm, Replica

__all__ = ["ElasticSGD"]


class ElasticSGD(Algorithm):
    """Replicas that are drawn to their mean in every step, ever harder (arXiv:1707.00424).

    Reductions: ``coupling=inf`` is the optimizer alone, and so is one replica, up to rounding. Effective step size:
    mean type. Extra memory: one vector of the parameters' size. One all-reduce per step, hidden only behind the work
    between two steps.
    """

    synchronous_only = True  # the center is the replicas' mean

    def __init__(self, coupling: float = 1.0, min_coupling: float = 0.1, scoping: float | None = None) -> None:
        """Creates the algorithm.

        Args:
            coupling: rho, > 0; infinity for independent replicas. Default 1, as in Parle.
            min_coupling: least rho, > 0; 1 / rho is the elastic stiffness. Default 0.1, as in Parle.
            scoping: s, in (0, 1], the factor of rho per step. Default 1 - 1 / (2 B), with B mini-batches in an epoch of
                one replica.

        Raises:
            ValueError: an argument is out of range.
        """
        check_annealing("ElasticSGD", scoping, coupling=(coupling, min_coupling))
        self.period = 1
        self.coupling, self.min_coupling = coupling, min_coupling
        self.scoping = scoping
        self.needs_batches_per_epoch = scoping is None
        self._optimizer: Optimizer | None = None
        self._anchor: Tensor | None = None
        self._delta: Tensor | None = None

    @property
    def current_coupling(self) -> float:
        """The current coupling rho."""
        return annealed(self.coupling, self.min_coupling, scoping_in_force(self, self.scoping), self.clock)

    def bind(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Takes the optimizer, for a look at its learning rate. See ``Algorithm.bind``."""
        del parameters
        self._optimizer = optimizer

    def start(self, replica: Replica, center: Center) -> None:
        """Prepares for the first step; warns where SGD cannot follow the stiffest coupling. See ``Algorithm.start``."""
        super().start(replica, center)
        self._delta = None
        if center.num_replicas == 1 or math.isinf(self.coupling) or not isinstance(self._optimizer, SGD):
            return
        stiffness = 1 / (self.coupling if self.scoping == 1 else self.min_coupling)
        for i, group in enumerate(self._optimizer.param_groups):
            lr, momentum = float(group["lr"]), group["momentum"]
            bound = nesterov_bound(momentum) if group["nesterov"] else 2 * (1 + momentum)
            if lr * stiffness >= bound:
                warnings.warn(
                    f"ElasticSGD(coupling={self.coupling}, min_coupling={self.min_coupling}): with lr={lr:g} and "
                    f"momentum={momentum:g} in parameter group {i} the replicas' differences grow once the coupling is "
                    f"at its least; the lowest that can be stable is {lr / bound:g}",
                    stacklevel=2,
                )

    def proximal_term(self) -> ProximalTerm | None:
        """Returns ``||x - c||^2 / (2 rho)``; None where rho is infinite, and but in a local update."""
        if self._anchor is None or math.isinf(self.coupling):
            return None
        return ProximalTerm(1 / self.current_coupling, self._anchor)

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks at its begin, for the center.

        Raises:
            ValueError: scoping follows the number of batches in an epoch, and that is not known.
        """
        scoping_in_force(self, self.scoping)
        snapshot = center.pull()
        self._anchor = snapshot.value  # lent until the push
        try:
            local_update()  # x <- x - eta [g(x) + (x - c) / rho]
        finally:
            self._anchor = None
        x = self._delta = replica.read(out=self._delta)
        center.push(x.sub_(snapshot.value).div_(center.num_replicas), read_at=snapshot.clock)  # c <- mean x
        self.clock += 1

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period and all arguments; ``scoping`` is the one in force, None while unknown."""
        known = self.scoping is not None or self.batches_per_epoch is not None
        return {
            **super().hyperparameters(num_replicas),
            "coupling": self.coupling,
            "min_coupling": self.min_coupling,
            "scoping": scoping_in_force(self, self.scoping) if known else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the clock and the number of batches in an epoch."""
        return {**super().state_dict(), "batches_per_epoch": self.batches_per_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.batches_per_epoch = state["batches_per_epoch"]

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"ElasticSGD(coupling={self.coupling}, min_coupling={self.min_coupling}, scoping={self.scoping})"
