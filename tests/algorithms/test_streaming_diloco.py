"""Streaming DiLoCo: DiLoCo as its limit, and the delayed outer step against an independent reference."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import LocalSGD, StreamingDiLoCo
from lightning_easgd.rules import Addition
from lightning_easgd.simulation import LockStep, Loss
from tests.in_process import interrupted

F64 = torch.float64
BEGIN = torch.linspace(-2, 2, 9, dtype=F64)
APART = Loss(lambda x, generator: (x + torch.arange(len(x))[:, None]).sin() + 0.3 * x.square())  # each its own
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


def run(algorithm, num_steps: int, num_replicas: int = 3, **kwargs) -> LockStep:
    lock_step = LockStep(algorithm, APART, BEGIN, num_replicas=num_replicas, optimizer=ADAMW, **kwargs)
    lock_step.run(num_steps)
    return lock_step


@pytest.mark.parametrize("num_steps", [20, 23])
def test_without_delay_and_mixing_it_is_diloco_to_the_last_bit(num_steps):
    ours, theirs = run(StreamingDiLoCo(5, 0, 0.0, 0.7, 0.9), num_steps), run(LocalSGD.diloco(5), num_steps)
    assert torch.equal(ours.center, theirs.center)
    assert torch.equal(ours.replicas, theirs.replicas)


@pytest.mark.parametrize(("delay", "mixing"), [(0, 0.5), (1, 0.5), (3, 0.0), (4, 0.9)])
def test_it_equals_a_reference(delay, mixing):
    """Each outer step is made when it is sent, and seen ``delay`` steps later; nothing happens before the first."""
    period, num_steps, outer_lr, momentum = 5, 23, 0.4, 0.9
    ours = run(StreamingDiLoCo(period, delay, mixing, outer_lr, momentum), num_steps)

    workers = [torch.nn.Parameter(BEGIN + 0.0) for _ in range(3)]
    optimizers = [ADAMW([worker]) for worker in workers]
    theta = torch.nn.Parameter(BEGIN + 0.0)
    outer = torch.optim.SGD([theta], lr=outer_lr, momentum=momentum, nesterov=True)
    anchor, arriving = theta.detach().clone(), None
    for step in range(num_steps):
        if arriving is not None and step % period == delay:
            anchor, arriving = arriving, None
            for worker in workers:
                worker.data = mixing * worker.data + (1 - mixing) * anchor
        for i, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            optimizer.zero_grad()
            ((worker + i).sin() + 0.3 * worker.square()).sum().backward()
            optimizer.step()
        if step % period == period - 1:
            theta.grad = torch.stack([anchor - worker.data for worker in workers]).mean(0)
            outer.step()
            arriving = theta.detach().clone()
    _assert_close(ours.center, theta.data)
    _assert_close(ours.replicas, torch.stack([worker.data for worker in workers]))


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert not torch.allclose(theirs, BEGIN.expand_as(theirs), atol=1e-2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_one_replica_with_a_plain_outer_step_is_the_inner_optimizer():
    class Outer(StreamingDiLoCo):
        def rule(self, num_replicas: int) -> Addition:
            return Addition()

    ours = run(Outer(4, 0, 0.5), 40, num_replicas=1)
    alone = run(LocalSGD(1000), 40, num_replicas=1)
    torch.testing.assert_close(ours.replicas, alone.replicas, rtol=0, atol=1e-13)


@pytest.mark.parametrize("at", [2, 5, 7, 12])
def test_it_goes_on_from_its_state_to_the_last_bit(at):
    assert torch.equal(*interrupted(lambda: StreamingDiLoCo(5, 2), at))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delay": 100}, "delay must be a number of optimizer steps below the period"),
        ({"delay": -1}, "delay must be"),
        ({"delay": 1.5}, "delay must be"),
        ({"period": 1}, "delay must be"),
        ({"mixing": 1.0}, "at least 0 and below 1"),
        ({"mixing": float("nan")}, "at least 0 and below 1"),
        ({"outer_lr": 0.0}, "finite number above 0"),
        ({"outer_momentum": 1.0}, "at least 0 and below 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamingDiLoCo(**arguments)


def test_what_loggers_get():
    algorithm = StreamingDiLoCo(30, 2)
    assert algorithm.hyperparameters(4) == {
        "algorithm": "StreamingDiLoCo",
        "period": 30,
        "delay": 2,
        "mixing": 0.5,
        "outer_lr": 0.4,
        "outer_momentum": 0.9,
        "nesterov": True,
    }
    assert repr(algorithm) == "StreamingDiLoCo(period=30, delay=2, mixing=0.5, outer_lr=0.4, outer_momentum=0.9)"
