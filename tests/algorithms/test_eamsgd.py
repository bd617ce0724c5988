"""EAMSGD over torch's own Nesterov SGD, against the paper's recursion and closed forms."""

import re

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import EAMSGD, EASGD, Algorithm
from lightning_easgd.simulation import Simulation, Vector
from tests.in_process import interrupted

F64 = torch.float64


def slope(x: Tensor) -> Tensor:
    return x.cos() + 0.6 * x


def build(method: type[Algorithm], rows: Tensor, momentum: float, gradient=slope, lr: float = 0.05, **kwargs):
    """Replicas that are one parameter each, stepped by torch's SGD; returns the simulation and the optimizers."""
    parameters = [torch.nn.Parameter(row.clone()) for row in rows]
    optimizers = [torch.optim.SGD([p], lr=lr, momentum=momentum, nesterov=momentum > 0) for p in parameters]
    algorithms = [method(**kwargs) for _ in rows]
    for algorithm, optimizer, parameter in zip(algorithms, optimizers, parameters, strict=True):
        algorithm.bind(optimizer, [parameter])

    def step(parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = gradient(parameter.detach())
        optimizer.step()

    updates = [lambda p=p, o=o: step(p, o) for p, o in zip(parameters, optimizers, strict=True)]
    vectors = [Vector(p.data) for p in parameters]
    return Simulation(algorithms, vectors, updates, synchronous=True, center=rows.mean(0)), optimizers


@pytest.mark.parametrize("period", [1, 3])
def test_it_is_the_papers_recursion_also_when_the_learning_rate_changes(period):
    p, alpha, delta = 3, 0.2, 0.9
    rows = torch.randn(p, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
    simulation, optimizers = build(EAMSGD, rows, delta, period=period, moving_rate=alpha)
    x, v, c, eta = rows.clone(), torch.zeros_like(rows), rows.mean(0), 0.05
    for t in range(30):
        if t == 14:  # not a multiple of the period; torch's velocity is in units of the learning rate
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.01
            eta = 0.01
        simulation.run(1)
        force = alpha * (x - c) if t % period == 0 else torch.zeros_like(x)
        y = x + delta * v
        v = delta * v - eta * slope(y)
        x, c = x + v - force, c + force.sum(0)
        torch.testing.assert_close(simulation.center.value, c, rtol=0, atol=1e-12)
        if t == 14:
            break  # from the next step on torch's velocity is the rescaled one
        ours = torch.stack([r.read() for r in simulation.replicas])
        torch.testing.assert_close(ours, x + delta * v, rtol=0, atol=1e-12)


def test_without_momentum_it_is_easgd_to_the_last_bit():
    rows = torch.randn(3, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
    runs = [build(method, rows, 0.0, period=2)[0] for method in (EAMSGD, EASGD)]
    for simulation in runs:
        simulation.run(20)
    assert torch.equal(runs[0].center.value, runs[1].center.value)
    assert torch.equal(runs[0].replicas[1].read(), runs[1].replicas[1].read())


@pytest.mark.parametrize(
    ("p", "eta", "delta", "radius"),
    [(4, 0.01, 0.9, 0.942998), (4, 0.1, 0.9, 0.890256), (4, 0.001, 0.99, 0.994401), (16, 0.01, 0.99, 0.989689)],
)
def test_spectral_radius_of_a_step(p, eta, delta, radius):
    """T16, of the mean replica, its velocity and the center: a probe by runs from three unit vectors."""
    unit = torch.eye(3, dtype=F64)  # rows: x, v, c
    parameters = [torch.nn.Parameter(unit[0] + delta * unit[1]) for _ in range(p)]
    optimizers = [torch.optim.SGD([x], lr=eta, momentum=delta, nesterov=True) for x in parameters]
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        optimizer.state[parameter]["momentum_buffer"] = -unit[1] / eta
    algorithms = [EAMSGD(1, center_rate=0.9) for _ in range(p)]
    for algorithm, optimizer, parameter in zip(algorithms, optimizers, parameters, strict=True):
        algorithm.bind(optimizer, [parameter])

    def step(i: int) -> None:
        parameters[i].grad = parameters[i].detach().clone()
        optimizers[i].step()

    updates = [lambda i=i: step(i) for i in range(p)]
    vectors = [Vector(parameter.data) for parameter in parameters]
    simulation = Simulation(algorithms, vectors, updates, synchronous=True, center=unit[2])
    simulation.run(1)
    v = -eta * optimizers[0].state[parameters[0]]["momentum_buffer"]
    after = torch.stack([parameters[0].data - delta * v, v, simulation.center.value])
    assert float(torch.linalg.eigvals(after).abs().max()) == pytest.approx(radius, abs=1e-6)


def test_other_optimizers_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=re.escape("not for AdamW; 'easgd' takes any optimizer")):
        EAMSGD().bind(torch.optim.AdamW([parameter]), [parameter])
    with pytest.raises(ValueError, match=re.escape("group 0 has momentum=0.9 and nesterov=False")):
        EAMSGD().bind(torch.optim.SGD([parameter], lr=0.1, momentum=0.9), [parameter])
    with pytest.raises(ValueError, match=re.escape("call bind(optimizer, parameters) first")):
        Simulation([EAMSGD()], [Vector(torch.zeros(1))], [lambda: None], synchronous=True)
    assert repr(EAMSGD(3, 0.1)) == "EAMSGD(period=3, moving_rate=0.1, center_rate=None)"


@pytest.mark.parametrize("at", [3, 4, 5])
def test_it_goes_on_from_its_state_to_the_last_bit(at):
    # Step 3 exchanges with the learning rate of the step before, which the optimizer no longer has.
    assert torch.equal(*interrupted(lambda: EAMSGD(3, 0.2), at, momentum=0.9))
