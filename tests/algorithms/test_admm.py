"""Round-robin ADMM against EASGD: the spectral radii of a cycle, computed from what is implemented."""

import re

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import ADMM, EASGD, Algorithm
from lightning_easgd.gates import RoundRobin
from lightning_easgd.simulation import Quadratic, Simulation
from tests.in_process import interrupted

F64 = torch.float64


def cycle(algorithm: Algorithm, begin: Tensor, center: Tensor, eta: float, multipliers: Tensor) -> Simulation:
    """One turn of each replica; the coordinates are independent runs."""
    simulation = Simulation.of(
        algorithm, Quadratic(), begin, num_replicas=len(begin), lr=eta, synchronous=False, gate=RoundRobin(),
        center=center, start=False,
    )  # fmt: skip
    for a, x, m in zip(simulation.algorithms, begin, multipliers, strict=True):
        if isinstance(a, ADMM):
            a.load_state_dict({"clock": 0, "multiplier": m, "held": x - m})
    simulation.run(1)
    return simulation


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


def admm_radius(p: int, eta: float, rho: float) -> float:
    # The state is (lambda, x); c is the mean of x - lambda, before a cycle and after.
    unit = torch.eye(2 * p, dtype=F64)
    multipliers, x = unit[:p], unit[p:]
    simulation = cycle(ADMM(1, eta * rho), x, (x - multipliers).mean(0), eta, multipliers)
    multipliers = torch.stack([a.state_dict()["multiplier"] for a in simulation.algorithms])
    x = torch.stack([r.read() for r in simulation.replicas])
    torch.testing.assert_close(simulation.center.value, (x - multipliers).mean(0), rtol=0, atol=1e-14)
    return radius(torch.cat([multipliers, x]))


def easgd_radius(p: int, eta: float, alpha: float) -> float:
    unit = torch.eye(p + 1, dtype=F64)
    simulation = cycle(EASGD(1, alpha), unit[:p], unit[p], eta, unit[:p])
    return radius(torch.stack([*(r.read() for r in simulation.replicas), simulation.center.value]))


@pytest.mark.parametrize(
    ("p", "eta", "rho", "admm", "easgd"),
    [
        (3, 1e-3, 2.5, 1.00097389, 0.99926975),
        (3, 1e-3, 1.0, 1.00082038, 0.99930283),
        (3, 1e-3, 9.0, 0.99943350, 0.99925533),
        (3, 5e-3, 2.5, 0.99613232, 0.99634977),
        (8, 1e-3, 2.5, 1.00225787, 0.99911570),
        (8, 1e-3, 9.0, 1.00241267, 0.99911238),
        (8, 5e-3, 2.5, 0.99986492, 0.99557932),
    ],
)
def test_spectral_radius_of_a_cycle(p, eta, rho, admm, easgd):
    assert admm_radius(p, eta, rho) == pytest.approx(admm, abs=1e-8)
    assert easgd_radius(p, eta, eta * rho) == pytest.approx(easgd, abs=1e-8)


def test_round_robin_easgd_is_stable_up_to_its_bound():
    for p, eta in ((1, 0.5), (3, 0.5), (8, 0.5), (3, 1.5)):
        bound = (4 - 2 * eta) / (4 - eta)
        assert easgd_radius(p, eta, 0.999 * bound) < 1
    assert easgd_radius(3, 0.5, 1.001 * (4 - 1) / 3.5) > 1
    assert easgd_radius(8, 0.5, 0.85814) == pytest.approx(0.9962, abs=1e-4)  # the bound is not necessary


def test_turns_are_taken_in_order():
    order: list[int] = []
    simulation = Simulation.of(
        ADMM(), Quadratic(), torch.ones(1), num_replicas=3, lr=0.1, synchronous=False,
        compute_time=lambda random: random.expovariate(1.0),
        observe=lambda event: order.append(event.replica) if event.kind == "add" else None,
    )  # fmt: skip
    simulation.run(5)
    assert order == [0, 1, 2] * 5


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=re.escape("ADMM(moving_rate=0): must be a finite number above 0")):
        ADMM(moving_rate=0)
    with pytest.raises(ValueError, match=re.escape("ADMM(period=0): period must be an integer >= 1")):
        ADMM(period=0)
    with pytest.raises(RuntimeError, match="call start"):
        ADMM().step(None, None, lambda: None)


@pytest.mark.parametrize("at", [3, 4, 5])
def test_it_goes_on_from_its_state_to_the_last_bit(at):
    assert torch.equal(*interrupted(lambda: ADMM(3, 0.3), at))
