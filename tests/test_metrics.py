"""The consensus distance against closed values."""

import copy
import math
import pickle

import pytest
import torch

from lightning_easgd.flatten import ParameterVector
from lightning_easgd.metrics import ConsensusDistance


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
