"""DynSGD: Jiang et al., "Heterogeneity-aware distributed parameter servers", SIGMOD 2017, as in Hermans' thesis.

DOWNPOUR, with a center that divides each delta by how late it comes (Hermans, "On scalable deep learning and
parallelizing gradient descent", CERN 2017, algorithm of DynSGD)::

    x^i <- c;  x^i <- x^i - eta g^i(x^i)   period times
    c   <- c + (x^i - a^i) / (s + 1)

a^i is the center that was pulled, s the number of additions that the center has seen since. Symbols as in DOWNPOUR.

Sum type, but the weights shrink with the replicas: with p of equal speed s is p - 1, and the sum a mean.

Departures: the original defines the delay in clocks of a stale synchronous server; this is Hermans' server, which
counts additions. His text divides by s, his algorithm by s + 1; this is the algorithm.
"""

from lightning_easgd.algorithms._accumulation import Accumulation
from lightning_easgd.rules import CenterRule, StalenessWeight

__all__ = ["DynSGD"]


class DynSGD(Accumulation):
    """DOWNPOUR with deltas weighted by 1 / (staleness + 1).

    Reductions: one replica, or a synchronous center, is DOWNPOUR, since nothing is ever stale. Effective step size: sum
    type, damped by staleness. Extra memory: two vectors of the parameters' size.
    """

    def __init__(self, period: int = 3) -> None:
        """Creates the algorithm.

        Args:
            period: lambda, optimizer steps from one push to the next, >= 1. Default 3 (Hermans finds 10 to 15
                unstable).

        Raises:
            ValueError: ``period`` is not an integer >= 1.
        """
        super().__init__(period)

    def gain(self, num_replicas: int) -> float:
        """Returns 1: the weight is the center's, which knows the staleness."""
        del num_replicas
        return 1.0

    def rule(self, num_replicas: int) -> CenterRule:
        """Returns the weight by staleness."""
        del num_replicas
        return StalenessWeight()
