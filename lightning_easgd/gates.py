"""Gates: which replica may go on, given how far every replica is.

A gate is only the condition on the clocks; a transport or a simulation does the waiting until the condition holds. A
replica's *clock* is the number of exchanges that it has completed; one that is away (out of data, evaluating) has the
clock ``math.inf``, so that nobody waits for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

__all__ = ["Gate", "RoundRobin", "StaleSynchronous"]


class Gate(ABC):
    """Says which replica may begin an exchange. Picklable and without state of its own."""

    @abstractmethod
    def admits(self, replica: int, clocks: Sequence[float]) -> bool:
        """Returns whether ``replica`` may begin its next exchange.

        Must not turn from true to false when the clock of another replica grows: a waiting replica may know of the
        others only how far they have been.

        Args:
            replica: the replica that asks.
            clocks: exchanges that each replica has completed, ``math.inf`` for one that is away.
        """


class StaleSynchronous(Gate):
    """Bounded staleness: no replica is more than ``slack`` exchanges ahead of the slowest.

    Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NeurIPS 2013. Slack 0
    is lock-step: an exchange begins when all have completed the one before it.
    """

    def __init__(self, slack: int) -> None:
        """Creates the gate.

        Args:
            slack: s, in exchanges, >= 0.

        Raises:
            ValueError: ``slack`` is not an integer >= 0.
        """
        if isinstance(slack, bool) or not isinstance(slack, int) or slack < 0:
            raise ValueError(f"StaleSynchronous(slack={slack!r}): must be an integer >= 0, in exchanges")
        self.slack = slack

    def admits(self, replica: int, clocks: Sequence[float]) -> bool:
        """Returns whether the replica's clock is at most ``slack`` above the smallest."""
        return clocks[replica] - min(clocks) <= self.slack

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"StaleSynchronous(slack={self.slack})"


class RoundRobin(Gate):
    """One at a time, in the order of the replicas' indices: replica 0, 1, ..., p - 1, 0, ...

    The order in which the EASGD paper compares itself with ADMM (arXiv:1412.6651, section 4). A replica that is away is
    passed over.
    """

    def admits(self, replica: int, clocks: Sequence[float]) -> bool:
        """Returns whether all before it have done one exchange more than it has, and all behind it as many."""
        own = clocks[replica]
        return all(clock > own for clock in clocks[:replica]) and all(clock >= own for clock in clocks[replica + 1 :])

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return "RoundRobin()"
