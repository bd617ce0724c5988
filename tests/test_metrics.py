"""The consensus distance and the temporal efficiency against closed values."""

import copy
import math
import pickle
import re

import pytest
import torch

from lightning_easgd.flatten import ParameterVector
from lightning_easgd.metrics import ConsensusDistance, TemporalEfficiency, temporal_efficiency


def values(metric: ConsensusDistance) -> tuple[float, float, float]:
    computed = metric.compute()
    assert list(computed) == ["consensus_distance", "consensus_distance_max", "consensus_distance_relative"]
    mean, largest, relative = (float(v) for v in computed.values())
    return mean, largest, relative


def test_closed_values():
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(torch.tensor([1.0, 2.0, 6.0]), 2.0)
    assert values(metric) == (3.0, 6.0, 1.5)


def test_distances_of_replicas():
    center = torch.tensor([0.0, 3.0, 0.0, 4.0])
    replicas = [center.clone(), center + torch.tensor([0.0, 0.0, 2.0, 0.0]), -center]
    metric = ConsensusDistance(sync_on_compute=False)
    distances = torch.tensor([ParameterVector([x]).distance(center) for x in replicas])
    metric.update(distances, float(center.norm()))
    assert values(metric) == pytest.approx((4.0, 10.0, 0.8))


def test_updates_accumulate():
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(torch.tensor([1.0, 3.0]), 1.0)
    assert values(metric) == (2.0, 3.0, 2.0)
    metric.update(torch.tensor([0.0, 4.0]), 4.0)
    assert values(metric) == (2.0, 4.0, (1 + 3 + 0 + 1) / 4)
    metric.update(torch.tensor(7.0), 1.0)  # one replica's, a scalar
    assert values(metric) == (3.0, 7.0, (1 + 3 + 0 + 1 + 7) / 5)


def test_forward_gives_the_value_of_its_batch():
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(torch.tensor([10.0]), 1.0)
    batch = metric(torch.tensor([2.0, 4.0]), 2.0)
    assert [float(v) for v in batch.values()] == [3.0, 4.0, 1.5]
    assert values(metric) == pytest.approx((16 / 3, 10.0, 13 / 3))


def test_reset():
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(torch.tensor([5.0]), 1.0)
    metric.reset()
    metric.update(torch.tensor([1.0]), 2.0)
    assert values(metric) == (1.0, 1.0, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_accumulates_in_float64(dtype):
    metric = ConsensusDistance(sync_on_compute=False)
    for _ in range(3):
        metric.update(torch.tensor([256.0, 1.0], dtype=dtype), 1.0)  # their sum is not a bfloat16
    assert metric.compute()["consensus_distance"].dtype == torch.float64
    assert values(metric) == (128.5, 256.0, 128.5)


def test_a_center_at_zero_is_no_division_by_zero():
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(torch.tensor([0.0, 0.0]), 0.0)
    assert values(metric) == (0.0, 0.0, 0.0)
    metric.update(torch.tensor([2.0, 2.0]), 0.0)
    assert math.isfinite(values(metric)[2])


def test_a_distance_that_is_not_a_number_shows():
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(torch.tensor([1.0, float("nan")]), 1.0)
    metric.update(torch.tensor([1.0, 2.0]), 1.0)
    assert all(math.isnan(v) for v in values(metric))


def test_update_modifies_no_argument():
    distance = torch.tensor([1.0, 2.0], dtype=torch.float64)
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(distance, 1.0)
    metric.update(distance, 1.0)
    assert distance.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_keep_what_was_accumulated(copied):
    metric = ConsensusDistance(sync_on_compute=False)
    metric.update(torch.tensor([1.0, 3.0]), 2.0)
    other = copied(metric)
    assert values(other) == (2.0, 3.0, 1.0)
    other.update(torch.tensor([8.0]), 1.0)
    assert values(metric) == (2.0, 3.0, 1.0)
    assert values(other) == (4.0, 8.0, 10 / 3)


# --- temporal efficiency ----------------------------------------------------------------------------------------------

RUN = ([0.0, 1.0, 2.5, 7.0], [0.1, 0.7, 0.65, 0.93])
CURVES = ["linear", "previous"]


@pytest.mark.parametrize("curve", CURVES)
def test_a_run_against_itself_has_efficiency_one(curve):
    assert temporal_efficiency(*RUN, *RUN, curve=curve) == 1
    metric = TemporalEfficiency(*RUN, curve=curve, sync_on_compute=False)
    for time, accuracy in zip(*RUN, strict=True):
        metric.update(torch.tensor(accuracy, dtype=torch.float64), time)
    assert float(metric.compute()) == 1


@pytest.mark.parametrize(
    ("run", "baseline", "curve", "expected"),
    [
        (([0, 4], [0.9, 0.9]), ([0, 4], [0.6, 0.6]), "linear", 1.5),
        (([0, 4], [0.9, 0.9]), ([0, 4], [0.6, 0.6]), "previous", 1.5),
        # t / 4 against 1/2, over the 2 that both last: (2^2 / 8) / 1; or steps of 0, 1/4 against 1/2.
        (([0, 1, 2, 3, 4], [0, 0.25, 0.5, 0.75, 1]), ([0, 2], [0.5, 0.5]), "linear", 0.5),
        (([0, 1, 2, 3, 4], [0, 0.25, 0.5, 0.75, 1]), ([0, 2], [0.5, 0.5]), "previous", 0.25),
        (([0, 2], [0.5, 0.5]), ([0, 4], [0, 1]), "linear", 2.0),
        # Cut within a segment: of t on [0, 3] against 1, 3^2 / 2 over 3; the value at 0 against 1.
        (([0, 10], [0, 10]), ([0, 3], [1, 1]), "linear", 1.5),
        (([0, 10], [0, 10]), ([0, 3], [1, 1]), "previous", 0.0),
        # From the later first point, 1, on: of t on [1, 3] against 1, (9 - 1) / 2 over 2.
        (([0, 3], [0, 3]), ([1, 3], [1, 1]), "linear", 2.0),
        # Two points at one time are a jump.
        (([0, 1, 1, 2], [0.2, 0.2, 0.8, 0.8]), ([0, 2], [0.5, 0.5]), "linear", 1.0),
        (([0, 1, 1, 2], [0.2, 0.2, 0.8, 0.8]), ([0, 2], [0.5, 0.5]), "previous", 1.0),
    ],
)
def test_closed_forms_of_temporal_efficiency(run, baseline, curve, expected):
    assert temporal_efficiency(*run, *baseline, curve=curve) == pytest.approx(expected, abs=1e-15)
    if expected:
        assert temporal_efficiency(*baseline, *run, curve=curve) == pytest.approx(1 / expected, abs=1e-15)


def test_efficiency_is_that_of_a_fine_grid():
    other = ([0.0, 0.3, 4.0, 6.0], [0.0, 0.9, 0.2, 0.4])
    grid = torch.linspace(0, 6, 600_001, dtype=torch.float64)
    means = []
    for times, values in (RUN, other):
        t, f = torch.tensor(times, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
        i = torch.searchsorted(t, grid, right=True).clamp(1, len(t) - 1)
        means.append(float((f[i - 1] + (f[i] - f[i - 1]) * (grid - t[i - 1]) / (t[i] - t[i - 1])).mean()))
    assert temporal_efficiency(*RUN, *other) == pytest.approx(means[0] / means[1], rel=1e-5)


def test_efficiency_does_not_depend_on_units():
    other = ([0.0, 3.0], [0.5, 0.8])
    expected = temporal_efficiency(*RUN, *other)
    scaled = [([60 * t for t in times], [100 * f for f in values]) for times, values in (RUN, other)]
    assert temporal_efficiency(*scaled[0], *scaled[1]) == pytest.approx(expected, rel=1e-14)
    assert temporal_efficiency(*(torch.tensor(v) for v in (*RUN, *other))) == pytest.approx(expected, rel=1e-6)


def test_the_metric_is_the_function_on_what_it_has_seen():
    metric = TemporalEfficiency([0.0, 10.0], [0.5, 0.5], sync_on_compute=False)
    metric.update(0.0, 0.0)
    assert math.isnan(metric.compute())
    metric.update(0.8, 4.0)
    assert float(metric.compute()) == pytest.approx(0.8)
    assert metric.compute().dtype == torch.float64
    metric.update(1.0, 12.0)  # longer than the baseline, and later points before earlier ones, as of two processes
    metric.update(0.8, 8.0)
    expected = temporal_efficiency([0, 4, 8, 12], [0, 0.8, 0.8, 1.0], [0, 10], [0.5, 0.5])
    assert float(metric.compute()) == expected
    again = pickle.loads(pickle.dumps(metric))
    assert float(again.compute()) == expected
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):  # torchmetrics' own
        assert math.isnan(metric.compute())
    metric.update(0.5, 11.0)
    metric.update(0.5, 12.0)
    assert math.isnan(metric.compute())  # no time in common
    assert float(again.compute()) == expected


def test_the_points_of_all_processes_are_one_curve():
    """The other process has evaluated in between, with half the accuracy."""

    def gather(values: torch.Tensor, group: object) -> list[torch.Tensor]:
        return [values, values + 1 if values.max() > 1 else values / 2]

    metric = TemporalEfficiency([0, 10], [1, 1], dist_sync_fn=gather, distributed_available_fn=lambda: True)
    for time, accuracy in ((0, 0.4), (4, 0.8), (8, 0.8)):
        metric.update(accuracy, time)
    expected = temporal_efficiency([0, 1, 4, 5, 8, 9], [0.4, 0.2, 0.8, 0.4, 0.8, 0.4], [0, 10], [1, 1])
    assert float(metric.compute()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [1], [0, 1], [1, 1]), "<times of shape (2,)>, <accuracies of shape (1,)>): must be one number for"),
        (([0], [1], [0, 1], [1, 1]), "must be one number for each of at least 2 evaluations"),
        (([0, 1], [1, 1], [0, 1], [1, 1, 1]), "<baseline_times of shape (2,)>, <baseline_accuracies of shape (3,)>)"),
        (([1, 0], [1, 1], [0, 1], [1, 1]), "(times=[1.0, 0.0]): must be finite, at least 0 and not decreasing"),
        (([0, 1], [1, 1], [-1, 1], [1, 1]), "(baseline_times=[-1.0, 1.0]): must be finite, at least 0 and not"),
        (([0, math.inf], [1, 1], [0, 1], [1, 1]), "(times=[0.0, inf]): must be finite"),
        (([0, 1], [1, math.nan], [0, 1], [1, 1]), "(accuracies=[1.0, nan]): must be finite and at least 0"),
        (([0, 1], [1, 1], [0, 1], [-0.5, 1]), "(baseline_accuracies=[-0.5, 1.0]): must be finite and at least 0"),
        (([0, 1], [1, 1], [1, 2], [1, 1]), "one is from 0 to 1, the baseline from 1 to 2"),
        (([0, 1], [1, 1], [0, 1, 2], [0, 0, 1]), "the baseline's accuracy is 0 from 0 to 1: no ratio to it"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        temporal_efficiency(*arguments)


def test_the_metric_refuses_at_once_what_cannot_be_compared():
    with pytest.raises(ValueError, match="the baseline's accuracy is 0 from 0 to 1"):
        TemporalEfficiency([0, 1], [0, 0])
    with pytest.raises(ValueError, match=re.escape("curve='cubic'): must be 'linear' or 'previous'")):
        TemporalEfficiency([0, 1], [1, 1], curve="cubic")
    metric = TemporalEfficiency([0, 1], [1, 1], sync_on_compute=False)
    metric.update(math.nan, 0.0)
    metric.update(1.0, 1.0)
    with pytest.raises(ValueError, match=re.escape("(accuracies=[nan, 1.0])")):
        metric.compute()
