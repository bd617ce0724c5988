"""Overlap Local-SGD: its limit, its contraction on a quadratic, and the recurrence written out."""

import pytest
import torch

from lightning_easgd.algorithms import LocalSGD, OverlapLocalSGD
from lightning_easgd.simulation import LockStep, Loss, Quadratic
from tests.in_process import interrupted

F64 = torch.float64
BEGIN = torch.linspace(-2, 2, 9, dtype=F64)
APART = Loss(lambda x, generator: (x + torch.arange(len(x))[:, None]).sin() + 0.3 * x.square())  # each its own


def run(algorithm, num_steps: int, objective=APART, lr: float = 0.05) -> LockStep:
    lock_step = LockStep(algorithm, objective, BEGIN, num_replicas=3, lr=lr)
    lock_step.run(num_steps)
    return lock_step


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_without_a_moving_rate_replicas_are_independent_to_the_last_bit(momentum):
    ours = run(OverlapLocalSGD(3, 0.0, momentum), 20)
    assert torch.equal(ours.replicas, run(LocalSGD(1000), 20).replicas)
    assert float(ours.replicas.std(0).min()) > 0.1


def test_the_contraction_of_a_period_on_a_quadratic():
    """alpha + (1 - alpha) (1 - e)^tau for the mean that is pulled back; 0.772187 for these values."""
    moving_rate, period = 0.6, 8
    lock_step = LockStep(OverlapLocalSGD(period, moving_rate, 0.0), Quadratic(noise=0.0), BEGIN, num_replicas=3, lr=0.1)
    means = []
    for _ in range(12):
        lock_step.run(period)
        x, anchor = lock_step.replicas.mean(0), lock_step.center
        means.append(x - moving_rate * (x - anchor))  # what the next exchange makes of it
    ratio = (means[-1] / means[-2])[BEGIN != 0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.772187), rtol=0, atol=1e-6)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.6 + 0.4 * 0.9**8), rtol=0, atol=1e-12)


def test_it_equals_the_recurrence():
    period, alpha, beta, lr = 3, 0.6, 0.7, 0.05
    ours = run(OverlapLocalSGD(period, alpha, beta), 22, lr=lr)
    replicas, anchor, velocity = BEGIN.repeat(3, 1), BEGIN.clone(), torch.zeros_like(BEGIN)
    for step in range(22):
        if step % period == 0:
            replicas = (1 - alpha) * replicas + alpha * anchor
            velocity = beta * velocity + replicas.mean(0) - anchor
            anchor = anchor + velocity
        x = replicas.clone().requires_grad_()
        ((x + torch.arange(3)[:, None]).sin() + 0.3 * x.square()).sum().backward()
        replicas = replicas - lr * x.grad
    assert not torch.allclose(anchor, BEGIN, atol=1e-2)
    torch.testing.assert_close(ours.center, anchor, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.replicas, replicas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at", [2, 3, 7])
def test_it_goes_on_from_its_state_to_the_last_bit(at):
    assert torch.equal(*interrupted(lambda: OverlapLocalSGD(3), at))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 0}, r"OverlapLocalSGD\(period=0\): period must be an integer >= 1"),
        ({"moving_rate": 1.0}, r"moving_rate=1.0\): must be at least 0 and below 1"),
        ({"moving_rate": -0.1}, r"moving_rate=-0.1\): must be"),
        ({"anchor_momentum": 1.0}, r"anchor_momentum=1.0\): must be"),
        ({"anchor_momentum": float("nan")}, r"anchor_momentum=nan\): must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        OverlapLocalSGD(**arguments)


def test_what_loggers_get():
    algorithm = OverlapLocalSGD(4)
    assert repr(algorithm) == "OverlapLocalSGD(period=4, moving_rate=0.6, anchor_momentum=0.7)"
    assert algorithm.hyperparameters(2) == {
        "algorithm": "OverlapLocalSGD",
        "period": 4,
        "moving_rate": 0.6,
        "anchor_momentum": 0.7,
    }
