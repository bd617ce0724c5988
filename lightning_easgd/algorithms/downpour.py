"""DOWNPOUR: Dean et al., "Large scale distributed deep networks", NeurIPS 2012; as in arXiv:1412.6651, algorithm 3.

Each replica, every ``period`` steps::

    x^i <- c;  v^i <- 0
    x^i <- x^i - eta g^i(x^i);  v^i <- v^i - eta g^i(x^i)     period times, the same gradient in both
    c   <- c + v^i

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c                ``replica``, ``center``
tau                   ``period``, in optimizer steps; the same for fetch and push
eta g^i               ``local_update``: whatever the module's optimizer does
v^i = x^i - a^i       what is pushed; a^i is the center that was pulled
====================  =====================================================================================

Sum type: the effective step size grows with the number of replicas, and a replica's learning rate must shrink like
pi / (2 p) to stay stable over an asynchronous center.

Departures: what is accumulated is the parameters' movement and not a gradient, so that any optimizer may be inside (as
in dist-keras); the server is plain addition, not Adagrad. The paper's text pushes at the start of the next period,
before it pulls; nothing happens in between.
"""

from lightning_easgd.algorithms._accumulation import Accumulation

__all__ = ["Downpour"]


class Downpour(Accumulation):
    """Adds to the center all that a replica has done in a period.

    Reductions: one replica is the optimizer alone, up to rounding; ``period=1`` over a synchronous center is SGD with
    the sum of all gradients. Effective step size: sum type. Extra memory: two vectors of the parameters' size.
    """

    def __init__(self, period: int = 1) -> None:
        """Creates the algorithm.

        Args:
            period: tau, optimizer steps from one push to the next, >= 1. Default 1 (section 5 of arXiv:1412.6651);
                it is unstable at 16 and beyond there.

        Raises:
            ValueError: ``period`` is not an integer >= 1.
        """
        super().__init__(period)

    def gain(self, num_replicas: int) -> float:
        """Returns 1."""
        del num_replicas
        return 1.0
