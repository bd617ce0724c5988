"""What one method becomes of another's settings, and closed forms of the noise, through the public classes.

Each row is tested in one place:

===================================================  ===================================================================
with these settings it is ...                        test
===================================================  ===================================================================
EASGD, moving rate 0: independent runs               algorithms/test_easgd_theory.py::
                                                     test_replicas_without_elastic_force_are_independent_runs
EASGD in Gauss-Seidel order, rates 1 and p, period   algorithms/test_downpour.py::
1: DOWNPOUR                                          test_gauss_seidel_order_with_rates_one_and_p_is_downpour
DOWNPOUR, synchronous, period 1: SGD on the sum      algorithms/test_downpour.py::
of gradients                                         test_period_one_is_descent_on_the_sum_of_gradients
EASGD in Gauss-Seidel order, both rates 1: model     algorithms/test_local_sgd.py::
averaging                                            test_gauss_seidel_easgd_with_rates_one_is_model_averaging
the same: DiLoCo with outer SGD of rate 1            here
EASGD, one replica, rates -m and 1: heavy ball       algorithms/test_easgd_theory.py::
                                                     test_momentum_is_a_negative_moving_rate
EAMSGD without momentum: EASGD                       algorithms/test_eamsgd.py::
                                                     test_without_momentum_it_is_easgd_to_the_last_bit
AGN, period 1: DOWNPOUR                              algorithms/test_downpour.py::test_agn_of_period_one_is_downpour
ADAG, one replica: AGN                               algorithms/test_adag.py::test_one_replica_is_agn
DynSGD, one replica: DOWNPOUR                        here
SSP, slack 0: synchronous SGD on summed updates      test_simulation.py::
                                                     test_no_slack_is_synchronous_descent_on_summed_updates
BMUF with Nesterov: DiLoCo, same inner optimizer     here
BMUF, momentum 0, rate 1: model averaging            here
Streaming DiLoCo, one fragment, no delay, no         algorithms/test_streaming_diloco.py::
mixing: DiLoCo                                       test_without_delay_and_mixing_it_is_diloco_to_the_last_bit
Parle, one replica, no coupling: Entropy-SGD         algorithms/test_parle.py::
without noise                                        test_one_replica_without_coupling_is_entropy_sgd_to_the_last_bit
Overlap Local-SGD, moving rate 0: independent runs   algorithms/test_overlap_local_sgd.py::
                                                     test_without_a_moving_rate_replicas_are_independent_to_the_last_bit
LSGD, rates 0: independent runs                      algorithms/test_lsgd.py::
                                                     test_without_rates_replicas_are_independent_to_the_last_bit
===================================================  ===================================================================
"""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import EAMSGD, EASGD, Algorithm, Downpour, DynSGD, LocalSGD
from lightning_easgd.rules import CenterRule, MomentumCenter, OuterOptimizer
from lightning_easgd.simulation import LockStep, Loss, Quadratic, Simulation

F64 = torch.float64
ROUGH = Loss(lambda x, generator: x.sin() + 0.3 * x.square())
BEGIN = torch.randn(4, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


# --- reductions -------------------------------------------------------------------------------------------------------


def center_after(algorithm: Algorithm, rule: CenterRule | None = None) -> Tensor:
    """Returns the center after ten periods of three steps of AdamW."""
    run = LockStep(algorithm, ROUGH, BEGIN, num_replicas=4, optimizer=ADAMW, rule=rule)
    run.run(30)
    assert not torch.allclose(run.center, BEGIN[0], atol=1e-2)
    return run.center


def test_gauss_seidel_easgd_with_rates_one_is_diloco_with_outer_sgd():
    outer = OuterOptimizer(partial(torch.optim.SGD, lr=1.0))
    ours = center_after(EASGD(3, 1.0, 1.0, order="gauss_seidel"))
    torch.testing.assert_close(ours, center_after(LocalSGD.diloco(3), outer), rtol=0, atol=1e-13)


def test_bmuf_with_nesterov_is_diloco_to_the_last_bit():
    outer = OuterOptimizer(partial(torch.optim.SGD, lr=0.8, momentum=0.75, nesterov=True))  # 1 - 1/p is 0.75
    bmuf = center_after(LocalSGD.bmuf(3, 0.8))
    assert torch.equal(bmuf, center_after(LocalSGD.diloco(3), outer))
    assert not torch.equal(bmuf, center_after(LocalSGD.bmuf(3, 0.8, nesterov=False)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_bmuf_without_momentum_is_model_averaging_to_the_last_bit(nesterov):
    rule = MomentumCenter(0.0, 1.0, nesterov=nesterov)
    assert torch.equal(center_after(LocalSGD.bmuf(3), rule), center_after(LocalSGD(3)))


@pytest.mark.parametrize("period", [1, 3])
def test_dynsgd_of_one_replica_is_downpour_to_the_last_bit(period):
    def center(algorithm: Algorithm, num_replicas: int) -> Tensor:
        simulation = Simulation.of(
            algorithm, ROUGH, BEGIN[0], num_replicas=num_replicas, lr=0.05, synchronous=False,
            compute_time=lambda random: random.expovariate(1.0), latency=0.5,
        )  # fmt: skip
        simulation.run(30)
        return simulation.center.value

    assert torch.equal(center(DynSGD(period), 1), center(Downpour(period), 1))
    assert not torch.equal(center(DynSGD(period), 2), center(Downpour(period), 2))


# --- closed forms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kicked:
    """``x^2 / 2``, with noise that is given, (p, d), in place of noise that is drawn."""

    noise: Tensor

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x - self.noise


def step_and_covariance(algorithm: Algorithm, p: int, eta: float) -> tuple[Tensor, Tensor]:
    """Returns what a step does to (x^1, ..., x^p, c), and their stationary covariance for unit noise: no sampling.

    The first p + 1 coordinates are runs from the unit vectors, the others from 0 with a unit of noise for one replica.
    """
    state = torch.cat([torch.eye(p + 1, dtype=F64), torch.zeros(p + 1, p, dtype=F64)], 1)
    kicks = torch.cat([torch.zeros(p, p + 1, dtype=F64), torch.eye(p, dtype=F64)], 1)
    run = LockStep(algorithm, Kicked(kicks), state[:p], num_replicas=p, lr=eta, center=state[p], start=False)
    run.run(1)
    step, kick = torch.cat([run.replicas, run.center[None]]).split([p + 1, p], 1)
    covariance, power = kick @ kick.T, step
    for _ in range(14):  # V = sum of M^k Q (M^k)^T, doubled in length each time
        covariance, power = covariance + power @ covariance @ power.T, power @ power
    return step, covariance


@pytest.mark.parametrize(
    ("p", "eta", "alpha", "beta"), [(4, 0.1, 0.225, 0.9), (4, 0.1, 0.1, 0.9), (8, 0.5, 0.05, 0.3), (4, 0.3, -0.05, 0.2)]
)
def test_variance_of_center_and_replicas_with_rates_given_apart(p, eta, alpha, beta):
    """T4 and T5, with h = sigma = 1."""
    _, covariance = step_and_covariance(EASGD(1, alpha, beta), p, eta)
    numerator = beta * eta / p * (2 - eta - beta + eta * beta - alpha)
    center = numerator / ((eta + beta - eta * beta + alpha) * (4 - 2 * eta - 2 * alpha - 2 * beta + eta * beta))
    assert float(covariance[p, p]) == pytest.approx(center, rel=1e-9)
    mean_replica = float(covariance[:p, :p].mean())
    spread = (1 - 1 / p) * eta**2 / (1 - (1 - eta - alpha) ** 2)
    assert float(covariance[0, 0]) == pytest.approx(mean_replica + spread, rel=1e-9)
    if (alpha, beta) == (0.225, 0.9):
        assert center == pytest.approx(0.0104558, abs=1e-7)
        assert float(covariance[0, 0]) == pytest.approx(0.024502, abs=1e-6)


def test_variance_of_the_center_falls_like_one_over_the_number_of_replicas():
    """T3: p Var[c] tends to a limit below the variance of SGD with batch p."""
    eta, beta = 0.1, 0.9
    limit = beta * eta / ((2 - beta) * (2 - eta)) * (2 - beta - eta + beta * eta) / (beta + eta - beta * eta)
    assert limit == pytest.approx(0.05158, abs=1e-7)
    for p, value in ((10, 0.04712), (100, 0.05109)):
        _, covariance = step_and_covariance(EASGD(1, center_rate=beta), p, eta)
        assert p * float(covariance[p, p]) == pytest.approx(value, abs=1e-5)
        assert p * float(covariance[p, p]) < limit < eta / (2 - eta)


@pytest.mark.parametrize(("p", "best", "radius"), [(4, 0.38, 0.920869), (16, 0.111765, 0.906188)])
def test_best_moving_rate(p, best, radius):
    """T10: alpha* = (2 - e) / (p + 1), and the radius sqrt(1 - e p (2 - e) / (p + 1))."""
    e = 0.1

    def radius_at(alpha: float) -> float:
        step, _ = step_and_covariance(EASGD(1, alpha), p, e)
        return float(torch.linalg.eigvals(step).abs().max())

    alpha = (2 - e) / (p + 1)
    assert alpha == pytest.approx(best, abs=1e-6)
    assert radius_at(alpha) == pytest.approx(math.sqrt(1 - e * p * (2 - e) / (p + 1)), abs=1e-9)
    assert radius_at(alpha) == pytest.approx(radius, abs=1e-6)
    assert radius_at(alpha) < min(radius_at(0.98 * alpha), radius_at(1.02 * alpha))


@pytest.mark.parametrize(("eta", "delta", "variance"), [(0.1, 0.9, 0.0496510), (0.01, 0.9, 0.0090539)])
def test_variance_of_the_center_with_momentum(eta, delta, variance):
    """T16, p = 4, beta = 0.9: by sampling, 20,000 runs, whose variance has an error of 1 %."""
    optimizer = partial(torch.optim.SGD, lr=eta, momentum=delta, nesterov=True)
    run = LockStep(
        EAMSGD(1, center_rate=0.9), Quadratic(noise=1.0), torch.zeros(20_000, dtype=F64), num_replicas=4,
        optimizer=optimizer,
    )  # fmt: skip
    run.run(200)
    assert float(run.center.var()) == pytest.approx(variance, rel=0.04)
