"""MDOWNPOUR: DOWNPOUR with Nesterov momentum at the center; Zhang, Choromanska, LeCun, arXiv:1412.6651, supplement.

Each replica pulls the point at which to differentiate and sends its step; the center keeps the velocity::

    x^i <- c;  x^i <- x^i - eta g^i(x^i)
    v   <- delta v + (x^i - a^i)
    c   <- c + (x^i - a^i) + delta v

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c, a^i           ``replica``, ``center``, and the center that was pulled
eta g^i               ``local_update``: meant for plain SGD, momentum being the center's
v, delta              the center's velocity, ``momentum``
====================  =====================================================================================

Sum type, and momentum multiplies it by 1 / (1 - delta): learning rates far below DOWNPOUR's (the paper: 5e-5 to 5e-6 on
CIFAR).

Departures: c is the look-ahead point, so that what is pulled is where to differentiate; the master's line as it is
commonly quoted, c <- c + delta v, would not move at all without momentum. Defined for a period of 1 alone.
"""

from lightning_easgd.algorithms._accumulation import Accumulation
from lightning_easgd.rules import CenterRule, MomentumCenter

__all__ = ["MDownpour"]


class MDownpour(Accumulation):
    """DOWNPOUR of period 1 with Nesterov momentum at the center.

    Reductions: ``momentum=0`` is DOWNPOUR of period 1; one replica is SGD with Nesterov momentum. Effective step size:
    sum type. Extra memory: two vectors of the parameters' size, and one where the center lives.
    """

    def __init__(self, momentum: float = 0.99) -> None:
        """Creates the algorithm.

        Args:
            momentum: delta, in [0, 1). Default 0.99 (section 5 of the paper).

        Raises:
            ValueError: ``momentum`` is out of range.
        """
        super().__init__(1)
        if not 0 <= momentum < 1:
            raise ValueError(f"MDownpour(momentum={momentum!r}): must be at least 0 and below 1")
        self.momentum = momentum

    def gain(self, num_replicas: int) -> float:
        """Returns 1."""
        del num_replicas
        return 1.0

    def rule(self, num_replicas: int) -> CenterRule:
        """Returns the master's momentum."""
        del num_replicas
        return MomentumCenter(self.momentum)

    def hyperparameters(self, num_replicas: int) -> dict[str, object]:
        """Returns algorithm, period and momentum."""
        return {**super().hyperparameters(num_replicas), "momentum": self.momentum}

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"MDownpour(momentum={self.momentum})"
