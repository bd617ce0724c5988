"""Figures as torchmetrics: how far the replicas are apart, and how a run's accuracy over time compares to another's."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["ConsensusDistance", "TemporalEfficiency", "temporal_efficiency"]

Curve = Literal["linear", "previous"]


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


def temporal_efficiency(
    times: Sequence[float] | Tensor,
    accuracies: Sequence[float] | Tensor,
    baseline_times: Sequence[float] | Tensor,
    baseline_accuracies: Sequence[float] | Tensor,
    *,
    curve: Curve = "linear",
) -> float:
    """Returns how much accuracy a run had over time, relative to a baseline; above 1 the run is better.

    Hermans' thesis (CERN, 2017)::

        E = integral of f dt / integral of f_baseline dt

    with f the accuracy at time t, up to the end of the run that ends first. The thesis begins at 0. Before a run's
    first point nothing is known of it: here the integrals begin with the later of the two first points, which is the
    thesis' figure where both runs have a point at 0, the accuracy before training.

    Args:
        times: (n,) n >= 2, when the run was evaluated, from the start of training, in the unit of the baseline's; not
            decreasing.
        accuracies: (n,) >= 0, in the unit of the baseline's.
        baseline_times: (m,) m >= 2.
        baseline_accuracies: (m,).
        curve: what a run's accuracy is between two of its points: "linear", a straight line, or "previous", that of the
            point before.

    Raises:
        ValueError: an argument is not as said, the runs have no span of time in common, or the baseline's accuracy is 0
            in all of it.
    """
    if curve not in ("linear", "previous"):
        raise ValueError(f"temporal_efficiency(curve={curve!r}): must be 'linear' or 'previous'")
    run = _require_run(times, accuracies, "")
    baseline = _require_run(baseline_times, baseline_accuracies, "baseline_")
    begin, end = (float(v) for v in (max(run[0][0], baseline[0][0]), min(run[0][-1], baseline[0][-1])))
    if begin >= end:
        raise ValueError(
            f"temporal_efficiency: the runs have no span of time in common: one is from {run[0][0]:g} to "
            f"{run[0][-1]:g}, the baseline from {baseline[0][0]:g} to {baseline[0][-1]:g}"
        )
    integral, baseline_integral = (_integral(*points, begin, end, curve) for points in (run, baseline))
    if baseline_integral == 0:
        raise ValueError(f"temporal_efficiency: the baseline's accuracy is 0 from {begin:g} to {end:g}: no ratio to it")
    return integral / baseline_integral


class TemporalEfficiency(Metric):
    """``temporal_efficiency`` of the run that is going on, relative to one that was logged.

    Update it with each evaluation. Where one process evaluates for all, as with a center, build it with
    ``sync_on_compute=False``; else ``compute`` is a collective, and the points of all processes are one curve.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(
        self,
        baseline_times: Sequence[float] | Tensor,
        baseline_accuracies: Sequence[float] | Tensor,
        *,
        curve: Curve = "linear",
        **kwargs: Any,
    ) -> None:
        """Creates the metric.

        Args:
            baseline_times: see ``temporal_efficiency``, as for the next two.
            baseline_accuracies: see there.
            curve: see there.
            kwargs: torchmetrics' own.

        Raises:
            ValueError: the baseline compared with itself is refused by ``temporal_efficiency``.
        """
        super().__init__(**kwargs)
        temporal_efficiency(
            baseline_times, baseline_accuracies, baseline_times, baseline_accuracies, curve=curve
        )  # refuses what cannot work now, not at the end
        self.baseline = tuple(torch.as_tensor(v, dtype=torch.float64) for v in (baseline_times, baseline_accuracies))
        self.curve: Curve = curve
        self.add_state("times", [], dist_reduce_fx="cat")
        self.add_state("accuracies", [], dist_reduce_fx="cat")
        self.times: list[Tensor]
        self.accuracies: list[Tensor]

    def update(self, accuracy: float | Tensor, time: float | Tensor) -> None:
        """Adds one evaluation.

        Args:
            accuracy: scalar, >= 0, in the baseline's unit.
            time: of the evaluation, since the start of training, in the baseline's unit.
        """
        for values, value in ((self.times, time), (self.accuracies, accuracy)):
            values.append(torch.as_tensor(value, dtype=torch.float64, device=self.device).reshape(1))

    def compute(self) -> Tensor:
        """Returns the efficiency so far, a scalar of float64; NaN as long as the two runs have no time in common."""
        efficiency = torch.nan
        if len(self.times):
            times, accuracies = dim_zero_cat(self.times), dim_zero_cat(self.accuracies)
            order = times.argsort(stable=True)  # several processes' points come one process after the other
            times, accuracies = times[order].cpu(), accuracies[order].cpu()
            theirs = self.baseline[0]
            if not max(times[0], theirs[0]) >= min(times[-1], theirs[-1]):
                efficiency = temporal_efficiency(times, accuracies, *self.baseline, curve=self.curve)
        return torch.tensor(efficiency, dtype=torch.float64)


def _require_run(times: Any, accuracies: Any, prefix: str) -> tuple[Tensor, Tensor]:
    """Returns a run's points in float64; refuses those that are no curve."""
    t, f = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (times, accuracies))
    if t.dim() != 1 or t.shape != f.shape or len(t) < 2:
        raise ValueError(
            f"temporal_efficiency(<{prefix}times of shape {tuple(t.shape)}>, <{prefix}accuracies of shape "
            f"{tuple(f.shape)}>): must be one number for each of at least 2 evaluations"
        )
    if not bool(t.isfinite().all() and t[0] >= 0 and (t.diff() >= 0).all()):
        raise ValueError(
            f"temporal_efficiency({prefix}times={t.tolist()}): must be finite, at least 0 and not decreasing"
        )
    if not bool(f.isfinite().all() and (f >= 0).all()):
        raise ValueError(f"temporal_efficiency({prefix}accuracies={f.tolist()}): must be finite and at least 0")
    return t, f


def _integral(t: Tensor, f: Tensor, begin: float, end: float, curve: Curve) -> float:
    """Returns the integral from ``begin`` to ``end``, both within ``t``, of the curve through the points (t, f)."""
    left, right = t[:-1].clamp(begin, end), t[1:].clamp(begin, end)
    mean = f[:-1]  # over what is left of each segment
    if curve == "linear":
        length = t.diff()
        length[length == 0] = 1.0  # a jump
        mean = mean + f.diff() * (((left + right) / 2 - t[:-1]) / length)
    return float((mean * (right - left)).sum())
