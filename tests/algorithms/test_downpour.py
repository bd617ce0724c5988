"""DOWNPOUR and its kin with another center or another gain: DynSGD, MDOWNPOUR, AGN. Closed forms and reductions."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import AGN, EASGD, Algorithm, Downpour, DynSGD, MDownpour
from lightning_easgd.simulation import LockStep, Loss, Quadratic, Simulation

F64 = torch.float64
BEGIN = torch.linspace(-2, 2, 9, dtype=F64)


def slope(x: Tensor) -> Tensor:
    return x.cos() + 0.6 * x


ROUGH = Loss(lambda x, generator: x.sin() + 0.3 * x.square())  # its gradient is ``slope``


def run(algorithm: Algorithm, num_replicas: int, num_steps: int, **kwargs) -> Tensor:
    simulation = Simulation.of(
        algorithm, kwargs.pop("objective", ROUGH), BEGIN, num_replicas=num_replicas, lr=0.05,
        synchronous=kwargs.pop("synchronous", False), **kwargs,
    )  # fmt: skip
    simulation.run(num_steps)
    return simulation.center.value


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("method", [Downpour, DynSGD])
def test_one_replica_is_the_optimizer_alone(method, synchronous, period):
    x = BEGIN
    for _ in range(40):
        x = x - 0.05 * slope(x)
    torch.testing.assert_close(run(method(period), 1, 40, synchronous=synchronous), x, rtol=0, atol=1e-13)


def test_period_one_is_descent_on_the_sum_of_gradients():
    x = BEGIN
    for _ in range(40):
        x = x - 0.05 * 3 * slope(x)
    torch.testing.assert_close(run(Downpour(), 3, 40, synchronous=True), x, rtol=0, atol=1e-13)


def test_gauss_seidel_order_with_rates_one_and_p_is_downpour():
    ours = run(EASGD(1, 1.0, 3.0, order="gauss_seidel"), 3, 40, synchronous=True, start=False)
    torch.testing.assert_close(ours, run(Downpour(), 3, 40, synchronous=True), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("delay", "edge"), [(0, 2.0), (1, 1.0), (3, 0.445042), (7, 0.209057)])
def test_replicas_in_turn_are_gradient_descent_with_delay(delay, edge):
    """c_{t+1} = c_t - e c_{t-D} with D = p - 1, stable iff e < 2 sin(pi / (2 (2 D + 1)))."""
    assert 2 * math.sin(math.pi / (2 * (2 * delay + 1))) == pytest.approx(edge, abs=1e-6)
    p, num_steps = delay + 1, 300
    for e, grows in ((0.95 * edge, False), (1.05 * edge, True)):
        centers = [1.0]
        turns = [[1 + i / p] + [1.0] * (num_steps - 1) for i in range(p)]
        simulation = Simulation.of(
            Downpour(), Quadratic(), torch.ones(1, dtype=F64), num_replicas=p, lr=e, synchronous=False,
            compute_time=turns,
            observe=lambda event: centers.append(float(simulation.center.value)) if event.kind == "add" else None,  # noqa: B023
        )  # fmt: skip
        simulation.run(num_steps)
        expected = [1.0]
        for t in range(len(centers) - 1):
            expected.append(expected[-1] - e * expected[max(0, t - delay)])
        assert centers == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert (max(map(abs, centers[-2 * p :])) > 1) == grows


def test_dynsgd_divides_by_staleness_plus_one():
    p, num_steps = 4, 20
    centers: list[float] = []
    turns = [[1 + i / p] + [1.0] * (num_steps - 1) for i in range(p)]
    simulation = Simulation.of(
        DynSGD(1), Loss(lambda x, generator: x), torch.zeros(1, dtype=F64), num_replicas=p, lr=1.0, synchronous=False,
        compute_time=turns,
        observe=lambda event: centers.append(float(simulation.center.value)) if event.kind == "add" else None,
    )  # fmt: skip
    simulation.run(num_steps)
    weights = [before - after for before, after in zip([0.0, *centers], centers, strict=False)]
    assert weights == pytest.approx([1, 1 / 2, 1 / 3] + [1 / 4] * (p * num_steps - 3), abs=1e-12)


def test_dynsgd_over_a_synchronous_center_is_downpour():
    assert torch.equal(run(DynSGD(2), 3, 40, synchronous=True), run(Downpour(2), 3, 40, synchronous=True))


def test_momentum_at_the_center_of_one_replica_is_nesterov():
    point = torch.nn.Parameter(BEGIN.clone())
    optimizer = torch.optim.SGD([point], lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(40):
        point.grad = slope(point.detach())
        optimizer.step()
    torch.testing.assert_close(run(MDownpour(0.9), 1, 40), point.detach(), rtol=0, atol=1e-12)


def test_mdownpour_without_momentum_is_downpour():
    assert torch.equal(run(MDownpour(0.0), 3, 40), run(Downpour(), 3, 40))


def test_agn_of_period_one_is_downpour():
    assert torch.equal(run(AGN(1), 3, 40), run(Downpour(), 3, 40))


@pytest.mark.parametrize(("period", "value"), [(5, 0.918098), (20, 0.956079)])
@pytest.mark.parametrize("p", [1, 3])
def test_factor_of_a_commit(p, period, value):
    e = 0.1
    commit = LockStep(AGN(period), Quadratic(), torch.ones(1, dtype=F64), num_replicas=p, lr=e)
    commit.run(period)
    assert float(commit.center) == pytest.approx(1 - p * (1 - (1 - e) ** period) / period, abs=1e-14)
    if p == 1:
        assert float(commit.center) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("algorithm", [Downpour(3), DynSGD(3), AGN(3), MDownpour(0.5)], ids=repr)
def test_state_is_restored_in_the_middle_of_a_period(algorithm):
    kwargs = {"num_replicas": 2, "lr": 0.05}
    whole = LockStep(copy.deepcopy(algorithm), ROUGH, BEGIN, **kwargs)
    whole.run(7)
    again = copy.deepcopy(algorithm)
    resumed = LockStep(again, ROUGH, whole.replicas, center=whole.center, rule=whole.rule, **kwargs)
    resumed.clock, resumed._memory = whole.clock, [m.clone() for m in whole._memory]
    again.load_state_dict(whole.algorithm.state_dict())
    whole.run(10)
    resumed.run(10)
    assert torch.equal(resumed.center, whole.center)
    assert torch.equal(resumed.replicas, whole.replicas)


@pytest.mark.parametrize("period", [0, 1.5, True])
@pytest.mark.parametrize("method", [Downpour, DynSGD, AGN])
def test_period_must_be_a_positive_integer(method, period):
    text = f"{method.__name__}(period={period!r}): period must be an integer >= 1, in optimizer steps"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        method(period)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_must_be_below_one(momentum):
    with pytest.raises(ValueError, match=re.escape(f"MDownpour(momentum={momentum}): must be at least 0 and below 1")):
        MDownpour(momentum)
