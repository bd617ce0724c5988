"""Parle: Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar, Oberman, arXiv:1707.00424.

Replicas that each descend their local entropy, and attract each other. Replica a, with mini-batches counted by k::

    y^a <- y^a - eta' [g^a(y^a) + (y^a - x^a) / gamma]         every step
    z^a <- alpha z^a + (1 - alpha) y^a                         every step
    x^a <- x^a - eta [(x^a - z^a) + (1 / rho) (x^a - x)]       every L steps, with Nesterov momentum mu
    x   <-  mean_a x^a
    y^a <- x^a;  z^a <- x^a;  gamma <- max(min, s gamma);  rho <- max(min, s rho)

====================  =====================================================================================
symbol                name
====================  =====================================================================================
y^a                   ``replica``: the module's parameters
x^a, z^a, x           the outer point, the average, ``center``
L                     ``period``, in optimizer steps
eta, mu               ``outer_lr`` times what the module's scheduler does to the rate, ``outer_momentum``
eta' g^a              ``local_update``: the module's optimizer; eta' is ``inner_lr``
gamma, rho, alpha, s  ``scope``, ``coupling``, ``averaging_decay``, ``scoping``
====================  =====================================================================================

With SGD inside, Nesterov momentum included, this is the paper's algorithm. The force (y - x) / gamma joins the
gradient, so that Adam preconditions it like the gradient; the outer loop is the same with any optimizer inside.

Mean type: the effective step size does not grow with the number of replicas. On a quadratic without momentum the mean
of the replicas shrinks by ``eta (1 - zc)`` per period, their differences by ``eta (1 - zc + 1 / rho)``, where z = zc x.

Departures: the paper's x in the elastic term is the default; ``elastic_target="averages"`` is the authors' codes',
which put mean_a z^a there and so multiply the mean's rate by 1 + 1 / rho. The authors' codes need a second all-reduce
for that; this class needs none (``_averages_target``). In ``ucla-vision/parle`` the scopes shrink once per parameter
tensor, the outer step begins at y, z is never set back to x and Nesterov's step is g + v instead of g + mu v; here they
shrink once per outer step, x is restored and z set back, and Nesterov's step is torch's. The outer velocity contains
its rate: it shrinks where the rate falls, and does not grow where it rises.
"""

import math
import warnings
from typing import Any, Literal, get_args

from lightning_easgd.algorithms._averages_target import AveragesTarget
from lightning_easgd.algorithms._local_entropy import InnerRate, LocalEntropy, check_annealing, nesterov_bound
from lightning_easgd.interfaces import Center, Replica

__all__ = ["Parle"]

ElasticTarget = Literal["replicas", "averages"]


class Parle(LocalEntropy):
    """Local entropy in each replica, and elastic coupling between them once per period (arXiv:1707.00424).

    Reductions: one replica with ``coupling=inf`` is ``EntropySGD`` without noise, bit for bit; ``period=1,
    scope=inf, averaging_decay=0, coupling=inf``, without momenta, is SGD with step eta eta'. Effective step size: mean
    type. Extra memory, in vectors of the parameters' size: the outer point, the average, the outer velocity and a
    buffer; with ``elastic_target="averages"`` two more, the mean velocity and the center that was pulled.

    One all-reduce per period. With ``elastic_target="replicas"`` it goes on beside the whole next period. With
    "averages" it must be over when the next period begins: only what lies between two steps hides it, and the replicas
    make their outer steps then, while the center has made its own already.
    """

    def __init__(
        self,
        period: int = 25,
        outer_lr: float = 0.1,
        outer_momentum: float = 0.9,
        scope: float = 100.0,
        coupling: float = 1.0,
        min_scope: float = 1.0,
        min_coupling: float = 0.1,
        averaging_decay: float = 0.75,
        scoping: float | None = None,
        elastic_target: ElasticTarget = "replicas",
        inner_lr: InnerRate = "constant",
    ) -> None:
        """Creates the algorithm; nothing is allocated before ``start``.

        The defaults are those of the authors' codes, which give gamma and rho as stiffnesses, their reciprocals.

        Args:
            period: L, optimizer steps from one outer step to the next, >= 1. Default 25.
            outer_lr: eta, > 0, as long as the module's scheduler leaves the learning rate at its reference; it is
                multiplied by the first parameter group's rate over its ``max_lr`` or ``initial_lr``. Default 0.1.
            outer_momentum: mu, in [0, 1). Default 0.9.
            scope: gamma, > 0; infinity for no force towards the outer point. Default 100.
            coupling: rho, > 0; infinity for independent replicas. Default 1.
            min_scope: least gamma, > 0. Default 1.
            min_coupling: least rho, > 0; 1 / rho is the elastic stiffness. Default 0.1.
            averaging_decay: alpha, in [0, 1). Default 0.75 (the paper; 0 in the code of its experiments).
            scoping: s, in (0, 1], the factor of gamma and rho an outer step. Default 1 - 1 / (2 B), with B mini-batches
                in an epoch of one replica.
            elastic_target: "replicas", the mean of x^a, or "averages", the mean of z^a.
            inner_lr: "constant", the reference of each parameter group's learning rate, while the scheduler's moves the
                outer rate (the paper); or "scheduled", the scheduler's for both.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(period, outer_lr, outer_momentum, scope, min_scope, averaging_decay, scoping, inner_lr)
        check_annealing("Parle", scoping, coupling=(coupling, min_coupling))
        if elastic_target not in get_args(ElasticTarget):
            raise ValueError(f"Parle(elastic_target={elastic_target!r}): must be 'replicas' or 'averages'")
        self.coupling, self.min_coupling = coupling, min_coupling
        self.elastic_target: ElasticTarget = elastic_target
        self.reads_late = elastic_target == "replicas"
        self._averages = AveragesTarget() if elastic_target == "averages" else None

    @property
    def is_due(self) -> bool:
        """Whether the next ``step`` reads the center: the last of a period, or the first where the target is new."""
        return self.is_ending if self._averages is None else self.clock % self.period == 0

    @property
    def current_coupling(self) -> float:
        """The current coupling rho."""
        return self._annealed(self.coupling, self.min_coupling)

    @property
    def current_stiffness(self) -> float:
        """The current 1 / rho; 0 without coupling."""
        return 1 / self.current_coupling

    def check(self, num_replicas: int) -> None:
        """Refuses a coupling whose differences between replicas grow on every loss, warns where some do.

        Raises:
            ValueError: ``outer_lr`` times the largest elastic stiffness is not below 2 (1 + mu) / (1 + 2 mu).
        """
        bound = nesterov_bound(self.outer_momentum)
        least = self.coupling if self.scoping == 1 else self.min_coupling
        stiffness = 0.0 if math.isinf(self.coupling) else 1 / least
        name = "coupling" if self.scoping == 1 else "min_coupling"
        advice = f"lower outer_lr below {bound:g} {name}" if stiffness else f"lower outer_lr below {bound:g}"
        rates = f"Parle(outer_lr={self.outer_lr}, outer_momentum={self.outer_momentum}, {name}={least})"
        if num_replicas > 1 and self.outer_lr * stiffness >= bound:
            raise ValueError(f"{rates}: the replicas' differences grow on any loss; {advice}, or raise {name}")
        if num_replicas == 1 and self.elastic_target == "replicas":
            stiffness = 0.0  # the one replica is its own target
        if self.outer_lr * (1 + stiffness) >= bound:
            warnings.warn(
                f"{rates}: unstable where the loss curves strongly, since outer_lr (1 + 1 / rho) comes to "
                f"{self.outer_lr * (1 + stiffness):g}, and should be below {bound:g}",
                stacklevel=2,
            )

    def start(self, replica: Replica, center: Center) -> None:
        """Begins a period at the replica's parameters, with outer velocities of zero. See ``Algorithm.start``."""
        super().start(replica, center)
        if self._averages is not None:
            self._averages.start()

    def _begin(self, replica: Replica, center: Center) -> None:
        averages = self._averages
        if averages is not None and averages.must_pull(is_first=self.clock % self.period == 0):
            x, z, velocity, _ = self._vectors()
            if averages.pull(center, x, z, velocity, momentum=self.outer_momentum):
                self._return(replica)

    def _end(self, replica: Replica, center: Center) -> None:
        averages = self._averages
        if averages is None:
            super()._end(replica, center)  # the outer step, towards mean_a x^a
            return
        x, z, velocity, buffer = self._vectors()
        eta = self._next_rate(velocity, averages.mean_velocity())
        mu, stiffness = self.outer_momentum, self.current_stiffness
        averages.propose(center, x, z, buffer, rate=eta, momentum=mu, stiffness=stiffness)

    def state_dict(self) -> dict[str, Any]:
        """Returns what ``LocalEntropy`` does; where the target is the averages', what an exchange in between needs."""
        return {**super().state_dict(), **({} if self._averages is None else self._averages.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        if self._averages is not None:
            self._averages.load_state_dict(state)

    def _arguments(self) -> dict[str, Any]:
        return {
            **super()._arguments(),
            "coupling": self.coupling,
            "min_coupling": self.min_coupling,
            "elastic_target": self.elastic_target,
        }
