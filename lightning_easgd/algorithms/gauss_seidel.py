"""Elastic averaging in Gauss-Seidel order: Sixin Zhang's thesis, arXiv:1605.02216, chapter 6.

The replica moves first, the gradient is taken at the moved x, and the center sees the replica at the end of the
period::

    x^i <- x^i - alpha (x^i - c)
    x^i <- x^i - eta g^i(x^i)                     ``period`` times
    c   <- c + beta (mean_i x^i - c)              c as it was pulled

The symbols are those of ``easgd``. It joins the family: alpha = 1, beta = p is DOWNPOUR over a synchronous center,
alpha = beta = 1 local SGD.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_easgd.algorithms._elastic import ElasticLoop, ElasticRates
from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.interfaces import Center, Replica

__all__ = ["GaussSeidel"]


class GaussSeidel(ElasticLoop):
    """The loop above: ``EASGD(order="gauss_seidel")``.

    A period begins with the pull and ends with the push, so that over a synchronous center the all-reduce goes on
    beside what lies between two steps. Memory: the center that was pulled and what is pushed, two vectors.
    """

    def __init__(self, period: int) -> None:
        super().__init__(period)
        self._anchor: Tensor | None = None  # the center that was pulled, and its clock
        self._read_at = 0
        self._buffer: Tensor | None = None

    def is_ending(self, clock: int) -> bool:
        """Whether the step at ``clock`` is the last of a period, and pushes."""
        return clock % self.period == self.period - 1

    def start(self, clock: int) -> None:
        """Forgets the center that was pulled: the next step pulls it, whatever the clock."""
        del clock
        self._anchor = self._buffer = None

    def step(
        self, clock: int, replica: Replica, center: Center, local_update: Callable[[], None], rates: ElasticRates
    ) -> None:
        """Performs one iteration. Blocks only at the beginning of a period, for the center."""
        alpha, beta = rates.of(center.num_replicas)
        if self.is_due(clock) or self._anchor is None:
            snapshot = center.pull()
            self._anchor, self._read_at = snapshot.value.clone(), snapshot.clock
            self._buffer = replica.read(out=self._buffer).sub_(self._anchor)
            replica.add_(self._buffer, alpha=-alpha)  # x <- x - alpha (x - c)
        local_update()  # x <- x - eta g(x)
        if self.is_ending(clock):
            force = self._buffer = replica.read(out=self._buffer).sub_(self._anchor)
            center.push(force.mul_(beta / center.num_replicas), read_at=self._read_at)  # c <- c + beta / p (x - c)

    def arguments(self) -> dict[str, Any]:
        """Returns the order."""
        return {"order": "gauss_seidel"}

    def state_dict(self) -> dict[str, Any]:
        """Returns the center that was pulled; nothing before it was."""
        return {} if self._anchor is None else {"anchor": saved(self._anchor), "read_at": self._read_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; that of another form changes nothing."""
        if "read_at" in state:
            self._anchor, self._read_at = restored(state["anchor"]), int(state["read_at"])
