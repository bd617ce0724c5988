"""ADAG: its factor, its reductions, and what it does to replicas that move the same weights."""

import re

import pytest
import torch

from lightning_easgd.algorithms import ADAG, AGN, damping
from lightning_easgd.simulation import LockStep, Loss, Quadratic, Simulation
from tests.in_process import interrupted

F64 = torch.float64


def test_factor():
    distance = torch.tensor([0.0, 0.038], dtype=F64)
    assert damping(distance, torch.zeros(2, dtype=F64), 1e-3).tolist() == pytest.approx([1.0, 0.409], abs=1e-3)
    assert float(damping(distance, torch.zeros(2, dtype=F64), 1e-4)[1]) == pytest.approx(0.0648, abs=1e-4)


@pytest.mark.parametrize("synchronous", [False, True])
def test_one_replica_is_agn(synchronous):
    values = []
    for algorithm in (ADAG(5), AGN(5)):
        simulation = Simulation.of(
            algorithm, Loss(lambda x, generator: x.sin()), torch.linspace(-2, 2, 9, dtype=F64), num_replicas=1, lr=0.1,
            synchronous=synchronous,
        )  # fmt: skip
        simulation.run(40)
        values.append(simulation.center.value)
    torch.testing.assert_close(*values, rtol=0, atol=1e-13)


def test_a_recurrence_of_its_own():
    p, period, scale, e = 3, 2, 1e-2, 0.1
    begin = torch.tensor([[1.0, 2.0], [1.0, -1.0], [1.0, 0.5]], dtype=F64)
    run = LockStep(ADAG(period, scale), Quadratic(), begin, num_replicas=p, lr=e)
    c, x = [1.0, 2.0], begin.tolist()
    anchor = [row[:] for row in x]
    for _ in range(6):
        run.run(period)
        total = [0.0, 0.0]
        for i in range(p):
            for k in range(2):
                factor = 1 / ((c[k] - anchor[i][k]) ** 2 / scale + 1)
                delta = factor * ((1 - e) ** period * x[i][k] - anchor[i][k]) / period
                x[i][k] = anchor[i][k] = c[k] + delta
                total[k] += delta
        c = [ck + tk for ck, tk in zip(c, total, strict=True)]
        assert run.center.tolist() == pytest.approx(c, abs=1e-13)
        assert run.replicas.flatten().tolist() == pytest.approx([v for row in x for v in row], abs=1e-13)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match=re.escape(f"ADAG(scale={scale!r}): must be a finite number above 0")):
        ADAG(scale=scale)


@pytest.mark.parametrize("at", [4, 5, 6, 7])
def test_it_goes_on_from_its_state_to_the_last_bit(at):
    assert torch.equal(*interrupted(lambda: ADAG(4, 1e-2), at))
