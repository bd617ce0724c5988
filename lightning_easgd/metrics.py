"""Figures of the coupling as torchmetrics: how far the replicas are apart, and what holds them together."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ConsensusDistance"]


class ConsensusDistance(Metric):
    """Distance of the replicas to the center: mean, largest, and relative to the center's norm.

    ``distance_i = ||x^i - c||`` (Euclidean norm over all coupled parameters). Averages the mean and keeps the largest
    over all updates since ``reset``. With updates that see all replicas at once, as the strategy's reports do, build
    it with ``sync_on_compute=False``; else each process updates with its own replica and ``compute`` is a collective.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        """Creates the metric; keyword arguments are torchmetrics' own."""
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("relative", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("count", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")
        self.total: Tensor
        self.relative: Tensor
        self.largest: Tensor
        self.count: Tensor

    def update(self, distance: Tensor, center_norm: float) -> None:
        """Adds one exchange.

        Args:
            distance: (n,) or scalar, the distances of n replicas to the center, >= 0.
            center_norm: Euclidean norm of the center, >= 0.
        """
        distance = distance.to(self.total)
        self.total += distance.sum()
        self.relative += distance.sum() / max(center_norm, torch.finfo(torch.float32).tiny)
        self.largest = torch.maximum(self.largest, distance.max())
        self.count += distance.numel()

    def compute(self) -> dict[str, Tensor]:
        """Returns ``consensus_distance`` (mean), ``consensus_distance_max``, ``consensus_distance_relative`` (mean)."""
        return {
            "consensus_distance": self.total / self.count,
            "consensus_distance_max": self.largest,
            "consensus_distance_relative": self.relative / self.count,
        }
