"""The parts that all forms of elastic averaging share: the force, the two rates, and the interface of a form's loop.

Drift: where every replica alone would move by d a period, all and the center come to move by
``beta / (alpha + beta) d``. With beta = p alpha that is p / (p + 1): the center weighs like one more replica, which has
no gradient. With two replicas a third of the learning rate is lost. So in Jacobi order alpha is at most 0.1 unless a
rate is given, which the paper's own is from nine replicas on: the drift is at least 0.9 d. ``EASGD(center_rate=0.9)``
is the paper's with any number of replicas. In Gauss-Seidel order the replica is pulled to a center that has seen it,
next to nothing is lost, and alpha is beta / p.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms._stability import Order, stable_step_sizes
from lightning_easgd.interfaces import Center, Replica

__all__ = ["ElasticLoop", "ElasticRates", "displacement_"]

CENTER_RATE = 0.9  # beta; section 5 of arXiv:1412.6651
MOST_MOVING_RATE = 0.1  # alpha in Jacobi order, where no rate is given; see "Drift" above


def displacement_(x: Tensor, center: Tensor) -> None:
    """Replaces ``x`` by ``x - center``, to which the elastic force is proportional; both (d,) or one chunk of it."""
    x.sub_(center)


@dataclass(frozen=True)
class ElasticRates:
    """alpha and beta, each given or following from the other and the number of replicas.

    Attributes:
        moving_rate: alpha, or None.
        center_rate: beta, or None.
        order: of the moves, on which defaults and stability depend.

    Raises:
        ValueError: a rate is not finite.
    """

    moving_rate: float | None
    center_rate: float | None
    order: Order

    def __post_init__(self) -> None:
        for name, rate in (("moving_rate", self.moving_rate), ("center_rate", self.center_rate)):
            is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if rate is not None and not (is_number and abs(rate) < float("inf")):
                raise ValueError(f"EASGD({name}={rate!r}): {name} must be a finite number or None")

    def of(self, num_replicas: int) -> tuple[float, float]:
        """Returns (alpha, beta) as they are with so many replicas."""
        if self.moving_rate is not None:
            beta = num_replicas * self.moving_rate if self.center_rate is None else self.center_rate
            return self.moving_rate, beta
        if self.center_rate is not None:
            return self.center_rate / num_replicas, self.center_rate
        at_most = MOST_MOVING_RATE if self.order == "jacobi" else math.inf
        return min(CENTER_RATE / num_replicas, at_most), CENTER_RATE

    def gain(self, num_replicas: int) -> float:
        """Returns beta / p: what one replica's displacement moves the center by."""
        alpha, beta = self.of(num_replicas)
        # Where beta is p alpha, this is alpha; but p alpha / p is not, in floating point.
        follows = self.moving_rate is not None and self.center_rate is None
        return alpha if follows else beta / num_replicas

    def check(self, given: str, num_replicas: int) -> None:
        """Refuses rates that no step size makes stable, and warns beyond the paper's range.

        Args:
            given: the call that gave the rates, as messages begin with.
            num_replicas: p, >= 1.

        Raises:
            ValueError: with these rates the center diverges on every quadratic, however small the step size.
        """
        alpha, beta = self.of(num_replicas)
        given = f"{given} with {num_replicas} replicas"
        stable = stable_step_sizes(num_replicas, alpha, beta, self.order)
        if stable is None:
            default, _ = ElasticRates(None, None, self.order).of(num_replicas)
            raise ValueError(
                f"{given}: no step size is stable with a moving rate of {alpha:g} and a center rate of {beta:g}; a "
                f"moving rate above 0 and below 2 / (num_replicas + 1) = {2 / (num_replicas + 1):g} can be, "
                f"{default:g} is the default"
            )
        if stable[0] > 0:
            warnings.warn(
                f"{given}: stable only where learning rate times curvature is between {stable[0]:g} and {stable[1]:g}: "
                "directions of smaller curvature diverge",
                stacklevel=3,
            )
        if beta > 1 and self.order == "jacobi":
            warnings.warn(
                f"{given}: a center rate of {beta:g} is beyond the paper's range (0 to 1): the center overshoots the "
                f"mean of the replicas and amplifies their noise; {CENTER_RATE} is the default",
                stacklevel=3,
            )


class ElasticLoop(ABC):
    """The loop of one replica in one of its forms: when it meets the center, and what moves in which order.

    ``EASGD`` holds the one that its arguments choose, and counts the clock that each method is given.

    Attributes:
        period: tau, in optimizer steps.
        initial_clock, asynchronous_only, separable: as in ``Algorithm``.
    """

    initial_clock: ClassVar[int] = 0
    asynchronous_only: ClassVar[bool] = False
    separable: ClassVar[bool] = True

    def __init__(self, period: int) -> None:
        self.period = period

    def is_due(self, clock: int) -> bool:
        """Whether the step at ``clock`` reads the center."""
        return clock % self.period == 0

    def is_ending(self, clock: int) -> bool:
        """Whether the step at ``clock`` adds to the center."""
        return self.is_due(clock)

    def bind(self, optimizer: Optimizer) -> None:  # noqa: B027  (one of three wants it)
        """Shows the optimizer that the local update steps."""

    def start(self, clock: int) -> None:  # noqa: B027  (one of three remembers nothing)
        """Forgets what was remembered of other parameters, and of the center."""

    @abstractmethod
    def step(
        self, clock: int, replica: Replica, center: Center, local_update: Callable[[], None], rates: ElasticRates
    ) -> None:
        """Performs the step at ``clock``; see ``Algorithm.step``."""

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``EASGD`` that chose this form; none for the paper's."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive a restart, but for the clock."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; that of another form changes nothing."""
        del state
