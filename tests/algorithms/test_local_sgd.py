"""Local SGD, BMUF and DiLoCo: reductions, and DiLoCo against an independent reference with AdamW inside."""

import re
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import EASGD, LocalSGD
from lightning_easgd.rules import CenterRule, OuterOptimizer
from lightning_easgd.simulation import LockStep, Loss
from tests.in_process import interrupted

F64 = torch.float64
BEGIN = torch.linspace(-2, 2, 9, dtype=F64)
ROUGH = Loss(lambda x, generator: x.sin() + 0.3 * x.square())


def run(algorithm, num_steps: int, num_replicas: int = 3, **kwargs) -> Tensor:
    if "optimizer" not in kwargs:
        kwargs["lr"] = 0.05
    begin = BEGIN + 0.1 * torch.arange(num_replicas, dtype=F64)[:, None]
    lock_step = LockStep(algorithm, ROUGH, begin, num_replicas=num_replicas, **kwargs)
    lock_step.run(num_steps)
    return lock_step.center


def test_diloco_equals_a_reference():
    k, inner_steps, outer_steps = 3, 20, 5
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(k, 6, dtype=F64, generator=generator)  # each replica's own

    def loss(x: Tensor) -> Tensor:
        return ((x - targets).square() + (3 * x).sin()).sum()

    inner = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    begin = torch.randn(6, dtype=F64, generator=generator)
    ours = LockStep(
        LocalSGD.diloco(inner_steps), Loss(lambda x, generator: loss(x)), begin, num_replicas=k, optimizer=inner
    )
    ours.run(inner_steps * outer_steps)

    theta = torch.nn.Parameter(begin.clone())
    outer = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True)
    workers = [torch.nn.Parameter(begin.clone()) for _ in range(k)]
    optimizers = [inner([worker]) for worker in workers]
    for _ in range(outer_steps):
        for i, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            worker.data.copy_(theta.data)
            for _ in range(inner_steps):
                optimizer.zero_grad()
                ((worker - targets[i]).square() + (3 * worker).sin()).sum().backward()
                optimizer.step()
        theta.grad = torch.stack([theta.data - worker.data for worker in workers]).mean(0)
        outer.step()
    assert not torch.allclose(theta.data, begin, atol=1e-2)
    torch.testing.assert_close(ours.center, theta.data, rtol=0, atol=1e-6)


def test_gauss_seidel_easgd_with_rates_one_is_model_averaging():
    ours, theirs = run(EASGD(4, 1.0, 1.0, order="gauss_seidel"), 40), run(LocalSGD(4), 40)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_model_averaging_is_bmuf_without_momentum_and_the_outer_step_of_sgd():
    averaged = run(LocalSGD(4), 40)
    torch.testing.assert_close(run(LocalSGD.bmuf(4), 40, num_replicas=1), run(LocalSGD(4), 40, num_replicas=1))
    outer = OuterOptimizer(partial(torch.optim.SGD, lr=1.0))
    torch.testing.assert_close(run(LocalSGD(4), 40, rule=outer), averaged, rtol=0, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_outer_step_is_that_of_torch_to_the_last_bit(nesterov):
    outer = OuterOptimizer(partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=nesterov))
    ours = run(LocalSGD(4, 0.7, 0.9, nesterov=nesterov), 40)
    assert torch.equal(ours, run(LocalSGD(4), 40, rule=outer))


class _Adam(LocalSGD):
    def rule(self, num_replicas: int) -> CenterRule:
        return OuterOptimizer(partial(torch.optim.Adam, lr=0.1))


def test_another_outer_optimizer_is_the_rule_of_a_subclass():
    """As the docstring of ``LocalSGD`` says: the mean of what the replicas did is minus Adam's gradient."""
    averaged, stepped = run(LocalSGD(4), 4), run(_Adam(4), 4)
    center = torch.nn.Parameter(BEGIN.clone())
    center.grad = BEGIN - averaged
    torch.optim.Adam([center], lr=0.1).step()
    torch.testing.assert_close(stepped, center.data, rtol=0, atol=1e-13)
    assert not torch.allclose(stepped, averaged)


def test_bmuf_with_nesterov_is_the_block_recursion():
    """W <- W + D with D <- mu D + zeta G, and W + mu D is broadcast."""
    p, tau, zeta, mu = 4, 3, 0.8, 1 - 1 / 4
    begin = BEGIN + 0.1 * torch.arange(p, dtype=F64)[:, None]
    lock_step = LockStep(LocalSGD.bmuf(tau, zeta), ROUGH, begin, num_replicas=p, lr=0.05)
    w = broadcast = begin[0]
    d = torch.zeros_like(w)
    for _ in range(30):
        lock_step.run(tau)
        x = broadcast.clone()
        for _ in range(tau):
            x = x - 0.05 * (x.cos() + 0.6 * x)
        d = mu * d + zeta * (x - broadcast)
        w = w + d
        broadcast = w + mu * d
        torch.testing.assert_close(lock_step.center, broadcast, rtol=0, atol=1e-13)


def test_an_outer_optimizer_goes_on_from_its_state():
    whole, parts = (OuterOptimizer(partial(torch.optim.AdamW, lr=0.1)) for _ in range(2))
    a, b = torch.ones(3), torch.ones(3)
    for t in range(6):
        delta = torch.full((3,), 1.0 + t)
        whole.apply_(a, delta)
        if t == 3:
            state, b = parts.state_dict(), b.clone()
            parts = OuterOptimizer(partial(torch.optim.AdamW, lr=0.1))
            parts.load_state_dict(state)
        parts.apply_(b, delta)
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.ones(3))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=re.escape("LocalSGD(outer_lr=0): must be a finite number above 0")):
        LocalSGD(outer_lr=0)
    with pytest.raises(ValueError, match=re.escape("LocalSGD(outer_momentum=1): must be at least 0 and below 1")):
        LocalSGD(outer_momentum=1)


@pytest.mark.parametrize("at", [3, 4, 5])
@pytest.mark.parametrize("make", [LocalSGD, LocalSGD.bmuf, LocalSGD.slowmo, LocalSGD.diloco])
def test_it_goes_on_from_its_state_to_the_last_bit(make, at):
    assert torch.equal(*interrupted(lambda: make(3), at))
