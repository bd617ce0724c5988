"""AGN, accumulated gradient normalization: Hermans, Spanakis, Moeckel, ACML 2017, arXiv:1710.02368.

Each replica, every ``period`` steps::

    x^i <- c
    x^i <- x^i - eta g^i(x^i)   period times
    c   <- c + (x^i - a^i) / lambda

lambda is ``period`` and a^i the center that was pulled; other symbols as in DOWNPOUR. The center gets the mean of the
steps of a period: a better direction, but not a longer step.

Sum type: the effective step size grows with the number of replicas; per period it does not grow with lambda. The
authors' rule of thumb is lambda near half the sum of replicas and layers.

Departures: any optimizer inside, as in dist-keras, where this class is called ADAG. The paper's equation sums
lambda + 1 terms, its algorithm lambda; this is the algorithm.
"""

from lightning_easgd.algorithms._accumulation import Accumulation

__all__ = ["AGN"]


class AGN(Accumulation):
    """Adds to the center the mean of the steps that a replica has made in a period.

    Reductions: ``period=1`` is DOWNPOUR. Effective step size: sum type. Extra memory: two vectors of the parameters'
    size.
    """

    def __init__(self, period: int = 12) -> None:
        """Creates the algorithm.

        Args:
            period: lambda, optimizer steps from one push to the next, >= 1. Default 12 (the authors' code).

        Raises:
            ValueError: ``period`` is not an integer >= 1.
        """
        super().__init__(period)

    def gain(self, num_replicas: int) -> float:
        """Returns 1 / ``period``."""
        del num_replicas
        return 1.0 / self.period
