"""Center rules: what happens to a delta that arrives at the center.

A rule is the center's half of an algorithm: plain addition is what the elastic averaging paper does (Zhang,
Choromanska, LeCun, arXiv:1412.6651, eq. 4: ``c <- c + alpha * sum_i (x^i - c)``). Rules know neither replicas nor
transports: a transport calls them, under whatever lock makes the addition atomic.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

__all__ = ["Addition", "CenterRule"]


class CenterRule(ABC):
    """What the center does with a delta. Picklable; its state travels in checkpoints.

    Attributes:
        num_vectors: how many vectors of the center's size the rule remembers (a momentum: 1). They begin as zeros and
            live where the center does; the transport keeps them and hands them to ``apply_``.
    """

    num_vectors: int = 0

    @abstractmethod
    def weight(self, staleness: int) -> float:
        """Returns the factor that a delta gets.

        Args:
            staleness: additions that the center has seen since the replica read it, >= 0.
        """

    @abstractmethod
    def apply_(self, center: Tensor, delta: Tensor, *memory: Tensor) -> None:
        """Adds ``delta`` (already weighted) to ``center`` in place, elementwise: a transport may call it by chunks.

        Args:
            center: (m,) the center or a chunk of it; modified.
            delta: (m,) of the same dtype and device; not modified.
            memory: ``num_vectors`` tensors like ``center``; modified.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what the rule remembers between deltas besides its vectors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        del state


class Addition(CenterRule):
    """``c <- c + delta``: eq. 4 of arXiv:1412.6651 when ``delta`` is the elastic force."""

    def weight(self, staleness: int) -> float:
        """Returns 1: every delta counts the same, however old."""
        del staleness
        return 1.0

    def apply_(self, center: Tensor, delta: Tensor, *memory: Tensor) -> None:
        """Adds ``delta`` to ``center`` in place."""
        del memory
        center.add_(delta)

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return "Addition()"
