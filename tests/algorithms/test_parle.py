"""Parle, Entropy-SGD and Elastic-SGD: closed forms on a quadratic, dense recurrences, reductions, and schedules."""

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from lightning_easgd.algorithms import Algorithm, ElasticSGD, EntropySGD, Parle, annealed, nesterov_bound, outer_step_
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.simulation import LockStep, Loss, Quadratic, Simulation, SynchronousCenter, Vector
from tests.in_process import interrupted

F64 = torch.float64
INF = math.inf
ROUGH = Loss(lambda x, generator: x.sin() + 0.3 * x.square())
TARGETS = pytest.mark.parametrize("target", ["replicas", "averages"])


def slope(x: Tensor) -> Tensor:
    return x.cos() + 0.6 * x


def rows(p: int, d: int = 7) -> Tensor:
    return torch.randn(p, d, dtype=F64, generator=torch.Generator().manual_seed(0))


def zc(eta: float, h: float, scope: float, period: int, alpha: float) -> float:
    """z after a period over the x that it began at, on a quadratic of curvature h."""
    stiffness = 1 / scope
    q, f = 1 - eta * (h + stiffness), stiffness / (h + stiffness)
    decay = alpha**period
    return decay + f * (1 - decay) + (1 - f) * (1 - alpha) * q * (decay - q**period) / (alpha - q)


def outer(algorithm: Algorithm) -> Tensor:
    term = algorithm.proximal_term()
    assert term is not None
    return term.anchor


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_the_multiplier_of_the_average_has_the_proximal_limit():
    assert zc(0.1, 1.0, 100.0, 10_000, 0.75) == pytest.approx(0.00990099, abs=1e-8)


@pytest.mark.parametrize(
    ("target", "coupling", "mean", "spread"),
    [
        ("replicas", 1 / 0.75, 0.911380, 0.836380),
        ("averages", 1 / 0.75, 0.844915, 0.836380),
        ("replicas", INF, None, 0.91138),
    ],
)
def test_mean_and_spread_shrink_as_on_paper(target, coupling, mean, spread):
    eta, lr, h, stiffness = 0.1, 0.1, 1.0, 1 / coupling
    parle = Parle(25, eta, 0.0, 100.0, coupling, scoping=1.0, elastic_target=target, min_coupling=min(coupling, 0.1))
    begin = rows(4)
    run = LockStep(parle, Quadratic(h), begin, num_replicas=4, lr=lr, center=begin.mean(0))
    x = begin
    shrinks = 1 - zc(lr, h, 100.0, 25, 0.75)
    on_mean = 1 - eta * shrinks * (1 + stiffness if target == "averages" else 1)
    on_spread = 1 - eta * shrinks - eta * stiffness
    if mean is not None:
        assert on_mean == pytest.approx(mean, abs=1e-6)
    assert on_spread == pytest.approx(spread, abs=1e-6)
    run.run(25)
    for _ in range(12):
        run.run(1)  # where the target is the averages', replicas move now
        before, x = x, outer(parle).clone()
        torch.testing.assert_close(x.mean(0), on_mean * before.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(x - x.mean(0), on_spread * (before - before.mean(0)), rtol=1e-10, atol=1e-12)
        run.run(24)


def test_a_long_period_is_the_proximal_point_step():
    parle = Parle(4000, 1.0, 0.0, 100.0, INF, scoping=1.0)
    run = LockStep(parle, Quadratic(1.0), rows(1), num_replicas=1, lr=0.1)
    run.run(4000)
    torch.testing.assert_close(run.center, 0.01 / 1.01 * rows(1)[0], rtol=1e-10, atol=0)


def test_without_scopes_and_average_the_outer_step_is_a_gradient_step_of_both_rates():
    parle = Parle(1, 0.5, 0.0, INF, INF, averaging_decay=0.0, scoping=1.0)
    run = LockStep(parle, ROUGH, rows(1), num_replicas=1, lr=0.1)
    run.run(1)
    torch.testing.assert_close(run.replicas, rows(1) - 0.5 * 0.1 * slope(rows(1)), rtol=0, atol=1e-15)
    torch.testing.assert_close(run.center, run.replicas[0], rtol=0, atol=1e-15)


# --- against recurrences ----------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    target: str,
    rounds: int,
    *,
    ratios: list[float] | None = None,
    scheduled: bool = False,
) -> list[Tensor]:
    """Parle's equations written down again; x after each round. ``ratios``: the schedule, one factor a step."""
    period, lr, scoping, mu, before = 5, 0.1, 0.9, 0.9, 0.0
    ratios = ratios or [1.0] * (rounds * period)
    v, path = torch.zeros_like(x), []
    for m in range(rounds):
        gamma, rho = max(1.0, 3.0 * scoping**m), max(0.2, scoping**m)
        y, z = x.clone(), x.clone()
        for t in range(m * period, (m + 1) * period):
            inner = lr * ratios[t] if scheduled else lr
            y = y - inner * (slope(y) + (y - x) / gamma)
            z = 0.75 * z + 0.25 * y
        eta = 0.1 * ratios[t]
        d = (x - z) + (x - (x if target == "replicas" else z).mean(0)) / rho
        v = mu * min(1.0, eta / before if before else 1.0) * v + eta * d
        x, before = x - eta * d - mu * v, eta
        path.append(x)
    return path


def make(target: str, coupling: float = 1.0, scoping: float = 0.9, inner_lr: str = "constant") -> Parle:
    """The algorithm of ``reference``."""
    return Parle(5, 0.1, 0.9, 3.0, coupling, 1.0, 0.2, 0.75, scoping, target, inner_lr)


@TARGETS
def test_with_momentum_and_scoping_it_is_the_recurrence_and_the_center_is_the_mean(target):
    begin = 2 * rows(3)
    simulation = Simulation.of(
        make(target), ROUGH, begin, num_replicas=3, synchronous=True, lr=0.1, center=begin.mean(0)
    )
    run = LockStep(make(target), ROUGH, begin, num_replicas=3, lr=0.1, center=begin.mean(0))
    before = begin
    for x in reference(begin, target, 30):
        run.run(1)  # where the target is the averages', a period begins with the outer step of the one before
        torch.testing.assert_close(outer(run.algorithm), before, rtol=0, atol=1e-12)
        run.run(4)
        simulation.run(5)
        torch.testing.assert_close(run.center, x.mean(0), rtol=0, atol=1e-12)
        assert torch.equal(simulation.center.value, run.center)
        if target == "replicas":
            torch.testing.assert_close(run.replicas, x, rtol=0, atol=1e-12)
        before = x
    assert simulation.center.clock == 3 * 30  # one exchange a period


@pytest.mark.parametrize(("target", "seconds"), [("replicas", 0.0), ("averages", 9 * 2.0)])
def test_the_mean_of_the_replicas_has_a_period_to_come_and_that_of_the_averages_has_not(target, seconds):
    simulation = Simulation.of(
        make(target), ROUGH, rows(2), num_replicas=2, synchronous=True, lr=0.1, compute_time=1.0, latency=2.0
    )
    simulation.run(50)
    assert simulation.time == 50 * 1.0 + seconds


@TARGETS
def test_what_takes_the_center_off_the_mean_is_forgotten(target):
    run = LockStep(make(target, scoping=1.0), ROUGH, 2 * rows(3), num_replicas=3, lr=0.1)
    run.run(12)
    run.algorithm.start(Vector(run.replicas), run)  # amid a period, and not at the center
    run.run(1)
    away = []
    for _ in range(120):
        away.append(float((outer(run.algorithm).mean(0) - run.center).abs().max()))
        run.run(5)
    assert away[0] > 1e-2
    assert away[-1] < 1e-10


def test_the_outer_step_is_that_of_torch():
    x, v = rows(2)
    parameter = torch.nn.Parameter(x.clone())
    torch_sgd = SGD([parameter], lr=0.3, momentum=0.9, nesterov=True)
    v.zero_()
    for _ in range(10):
        parameter.grad = slope(parameter.detach())
        torch_sgd.step()
        outer_step_(x, v, 0.3 * slope(x), momentum=0.9)
    torch.testing.assert_close(x, parameter.data, rtol=0, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_the_bound_is_where_nesterovs_map_becomes_unstable(momentum):
    def radius(s: float) -> float:
        x, v = torch.eye(2, dtype=F64)  # a step from both unit vectors
        outer_step_(x, v, s * x, momentum=momentum)
        return float(torch.linalg.eigvals(torch.stack([x, v])).abs().max())

    bound = nesterov_bound(momentum)
    assert radius(bound * (1 - 1e-6)) < 1 < radius(bound * (1 + 1e-6))


# --- scoping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "num_steps", "scope", "coupling"),
    [
        (390, 0, 100.0, 1.0),
        (390, 1, 99.871795, 0.99871795),
        (390, 100, 87.960056, 0.87960056),
        (10, 100, 1.0, 0.1),  # both at their least
        (10, 60, 100 * 0.95**60, 0.1),
    ],
)
def test_scopes_shrink_with_the_outer_steps(batches, num_steps, scope, coupling):
    parle = Parle(period=2)
    parle.batches_per_epoch = batches
    assert parle.needs_batches_per_epoch
    run = LockStep(parle, ROUGH, rows(2), num_replicas=2, lr=0.1)
    run.run(2 * num_steps + 1)
    assert parle.outer_steps == num_steps
    assert parle.current_scope == pytest.approx(scope, rel=1e-5)
    assert parle.current_coupling == pytest.approx(coupling, rel=1e-5)
    assert parle.proximal_term().stiffness == pytest.approx(1 / scope, rel=1e-5)
    assert parle.current_stiffness == pytest.approx(1 / coupling, rel=1e-5)
    elastic = ElasticSGD()
    elastic.batches_per_epoch = batches
    LockStep(elastic, ROUGH, rows(2), num_replicas=2, lr=0.01).run(num_steps)
    assert elastic.current_coupling == pytest.approx(coupling, rel=1e-5)


def test_scoping_follows_neither_the_number_of_tensors_nor_that_of_replicas():
    paths = []
    for p, sizes in ((1, [7]), (1, [3, 0, 4]), (3, [2, 5])):
        vectors = [ParameterVector(list(rows(1)[0].clone().split(sizes))) for _ in range(p)]
        center = SynchronousCenter(rows(1)[0], p)
        algorithms = [make("replicas") for _ in range(p)]
        for algorithm, vector, handle in zip(algorithms, vectors, center.handles, strict=True):
            algorithm.start(vector, handle)
        for _ in range(50):
            for algorithm, vector, handle in zip(algorithms, vectors, center.handles, strict=True):
                algorithm.step(vector, handle, lambda vector=vector: vector.add_(slope(vector.read()), alpha=-0.1))
        assert {a.current_scope for a in algorithms} == {max(1.0, 3 * 0.9**10)}
        paths.append(center.value)
    assert torch.equal(paths[0], paths[1])


@pytest.mark.parametrize("algorithm", [Parle(2), EntropySGD(2), ElasticSGD()])
def test_without_a_number_of_batches_scoping_must_be_given(algorithm):
    run = LockStep(algorithm, ROUGH, rows(1), num_replicas=1, lr=0.1)
    assert algorithm.hyperparameters(1)["scoping"] is None
    with pytest.raises(ValueError, match=re.escape("(scoping=None) follows the number of batches") + ".*0.999"):
        run.run(1)
    assert torch.equal(run.replicas, rows(1))
    algorithm.batches_per_epoch = 50
    run.run(1)
    assert algorithm.hyperparameters(1)["scoping"] == 0.99


# --- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_lr", ["constant", "scheduled"])
def test_one_replica_without_coupling_is_entropy_sgd_to_the_last_bit(inner_lr):
    arguments = {"period": 4, "outer_lr": 0.3, "scope": 5.0, "scoping": 0.95, "inner_lr": inner_lr}
    runs = []
    for algorithm in (Parle(coupling=INF, **arguments), EntropySGD(**arguments)):
        scheduled = Scheduled(partial(AdamW, lr=0.05), partial(StepLR, step_size=7))
        run = LockStep(algorithm, ROUGH, rows(1), num_replicas=1, optimizer=scheduled)
        for _ in range(50):
            run.run(1)
            scheduled.scheduler.step()
        runs.append(run)
    assert torch.equal(runs[0].replicas, runs[1].replicas)
    assert torch.equal(runs[0].center, runs[1].center)
    assert not torch.allclose(runs[0].center, rows(1), atol=1e-2)


def test_both_targets_are_one_without_coupling():
    center = rows(3).mean(0)
    runs = [
        LockStep(make(target, coupling=INF), ROUGH, rows(3), num_replicas=3, lr=0.1, center=center)
        for target in ("replicas", "averages")
    ]
    for run in runs:
        run.run(101)
    torch.testing.assert_close(*(outer(run.algorithm) for run in runs), rtol=0, atol=1e-13)


# --- schedules --------------------------------------------------------------------------------------------------------


class Scheduled:
    """An optimizer factory that keeps the scheduler of the last optimizer that it made."""

    def __init__(self, optimizer: Callable[..., Optimizer], scheduler: Callable[..., Any] | None) -> None:
        self._make, self._schedule = optimizer, scheduler

    def __call__(self, parameters: list[Tensor]) -> Optimizer:
        self.optimizer = self._make(parameters)
        self.scheduler = None if self._schedule is None else self._schedule(self.optimizer)
        return self.optimizer


SCHEDULES = {
    "step": partial(StepLR, step_size=7, gamma=0.3),
    "warm-up": partial(LambdaLR, lr_lambda=lambda t: min(1.0, t / 12)),
    "to zero and back": partial(LambdaLR, lr_lambda=lambda t: (1.0, 1e-18, 0.0, 0.5)[min(t // 10, 3)]),
    "one cycle": partial(OneCycleLR, max_lr=0.1, total_steps=61, cycle_momentum=False),
}


@TARGETS
@pytest.mark.parametrize("inner_lr", ["constant", "scheduled"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_outer_rate_follows_the_scheduler(name, inner_lr, target):
    scheduled = Scheduled(partial(SGD, lr=0.1), SCHEDULES[name])
    begin = 2 * rows(3)
    run = LockStep(
        make(target, inner_lr=inner_lr), ROUGH, begin, num_replicas=3, optimizer=scheduled, center=begin.mean(0)
    )
    ratios, centers = [], []
    for t in range(60):
        ratios.append(scheduled.optimizer.param_groups[0]["lr"] / 0.1)
        run.run(1)
        scheduled.scheduler.step()
        if t % 5 == 4:
            centers.append(run.center.clone())
    assert max(ratios) == pytest.approx(1, abs=1e-3)
    assert min(ratios) < 0.1
    expected = reference(begin, target, 12, ratios=ratios, scheduled=inner_lr == "scheduled")
    torch.testing.assert_close(torch.stack(centers), torch.stack([x.mean(0) for x in expected]), rtol=0, atol=1e-11)


@TARGETS
def test_at_a_rate_of_zero_nothing_moves(target):
    scheduled = Scheduled(partial(SGD, lr=0.1), None)
    center = rows(3).mean(0)
    run = LockStep(make(target), ROUGH, rows(3), num_replicas=3, optimizer=scheduled, center=center)
    run.run(51)
    x = outer(run.algorithm).clone()
    scheduled.optimizer.param_groups[0]["lr"] = 0.0
    run.run(25)
    torch.testing.assert_close(outer(run.algorithm), x, rtol=0, atol=1e-14)


def test_a_falling_rate_takes_the_velocity_along_as_in_torch():
    rates = [0.1, 0.1, 0.01, 0.01, 0.001]
    scheduled = Scheduled(partial(SGD, lr=0.1), None)
    run = LockStep(
        EntropySGD(1, 0.1, scope=INF, averaging_decay=0.0, scoping=1.0),
        ROUGH,
        rows(1),
        num_replicas=1,
        optimizer=scheduled,
    )
    parameter = torch.nn.Parameter(rows(1))
    torch_sgd = SGD([parameter], lr=0.1, momentum=0.9, nesterov=True)
    for rate in rates:
        scheduled.optimizer.param_groups[0]["lr"] = torch_sgd.param_groups[0]["lr"] = rate
        run.run(1)
        parameter.grad = 0.1 * slope(parameter.detach())  # the inner rate stays
        torch_sgd.step()
        torch.testing.assert_close(run.center, parameter.data[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("inner_lr", ["constant", "scheduled"])
def test_the_schedules_own_rate_is_back_after_a_step_and_after_an_error(inner_lr):
    lr = torch.tensor(0.1, dtype=F64)
    parameter = torch.nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = SGD([parameter], lr=lr)
    StepLR(optimizer, 1)
    algorithm = Parle(2, scoping=1.0, inner_lr=inner_lr)
    algorithm.bind(optimizer, [parameter])
    vector, handle = ParameterVector([parameter]), SynchronousCenter(torch.ones(2, dtype=F64), 1).handles[0]
    algorithm.start(vector, handle)
    group = optimizer.param_groups[0]
    rate = group["lr"]
    rate.fill_(0.03)  # what a scheduler does to a tensor
    seen = []

    def update(error: Exception | None = None) -> None:
        seen.append(group["lr"].clone())
        if error is not None:
            raise error

    algorithm.step(vector, handle, update)
    with pytest.raises(OSError, match="broken"):
        algorithm.step(vector, handle, lambda: update(OSError("broken")))
    assert group["lr"] is rate
    assert [float(s) for s in seen] == pytest.approx([0.1 if inner_lr == "constant" else 0.03] * 2)


def test_groups_that_come_later_and_frozen_ones_have_their_own_references():
    first, frozen, later = (torch.nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(3))
    optimizer = SGD([{"params": [frozen], "lr": 0.0}, {"params": [first], "lr": 0.1}])
    algorithm = EntropySGD(3, scoping=1.0)
    algorithm.bind(optimizer, [frozen, first])
    optimizer.param_groups[1]["lr"] = 0.02
    optimizer.add_param_group({"params": [later], "lr": 0.4})
    parameters = [frozen, first, later]
    algorithm.bind(optimizer, parameters)
    center = SynchronousCenter(torch.ones(6, dtype=F64), 1)
    vector = ParameterVector(parameters)
    algorithm.start(vector, center.handles[0])
    seen = []

    def update() -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])
        vector.add_(torch.ones(6, dtype=F64), alpha=-1.0)

    for _ in range(3):
        algorithm.step(vector, center.handles[0], update)
    assert seen == [[0.0, 0.1, 0.4]] * 3
    # y went 1, 2 and 3 down: x - z = (9 / 16 + 2 * 3 / 4 + 3) / 4; the outer rate is a fifth, the first live group's.
    move = 0.1 * 0.2 * (9 / 16 + 6 / 4 + 3) / 4
    torch.testing.assert_close(center.value, torch.full((6,), 1 - 1.9 * move, dtype=F64))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_has_its_variance_in_a_step_and_in_the_stationary_state():
    lr, epsilon, d = 0.1, 0.5, 100_000
    run = LockStep(
        EntropySGD(1000, scope=INF, scoping=1.0, noise=epsilon, seed=3),
        Quadratic(1.0),
        torch.zeros(d, dtype=F64),
        num_replicas=1,
        optimizer=partial(SGD, lr=lr),
    )
    run.run(1)
    first = run.replicas.clone()
    assert float(first.var()) == pytest.approx(2 * lr * epsilon**2, rel=0.02)
    run.run(1)
    second = run.replicas - (1 - lr) * first
    assert abs(float((first * second).mean())) < 0.02 * 2 * lr * epsilon**2
    run.run(60)
    assert float(run.replicas.var()) == pytest.approx(2 * lr * epsilon**2 / (1 - (1 - lr) ** 2), rel=0.02)


def test_noise_is_that_of_each_parameters_own_rate_and_a_function_of_the_seed():
    def run(seed: int, device_noise: int) -> Tensor:
        torch.manual_seed(device_noise)  # the ranks of a replica differ in this
        parameters = [torch.nn.Parameter(torch.zeros(50_000)) for _ in range(3)]
        optimizer = SGD([{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:2], "lr": 0.4}], lr=0.1)
        optimizer.add_param_group({"params": parameters[2:], "lr": 0.1})
        algorithm, vector = EntropySGD(scoping=1.0, noise=1.0, seed=seed), ParameterVector(parameters)
        algorithm.bind(optimizer, parameters)
        handle = SynchronousCenter(vector.read(), 1).handles[0]
        algorithm.start(vector, handle)
        algorithm.step(vector, handle, lambda: None)
        return vector.read()

    y = run(0, 0)
    assert [float(part.var()) for part in y.split(50_000)] == pytest.approx([0.0, 0.8, 0.2], rel=0.03)
    assert torch.equal(y, run(0, 1))
    assert not torch.equal(y, run(1, 0))


# --- states and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 3, 4, 7])
@pytest.mark.parametrize(
    ("algorithm", "num_replicas"),
    [
        (Parle(3, scoping=0.9), 3),
        (Parle(3, scoping=0.9, elastic_target="averages"), 3),
        (EntropySGD(3, scoping=0.9, noise=0.1), 1),
        (ElasticSGD(scoping=0.9), 3),
    ],
)
def test_it_goes_on_from_its_state_to_the_last_bit(algorithm, num_replicas, at):
    whole, parts = interrupted(lambda: copy.deepcopy(algorithm), at, momentum=0.9, num_replicas=num_replicas)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole[-1], whole[0])


@TARGETS
def test_a_state_is_nobody_elses(target):
    run = LockStep(make(target), ROUGH, rows(3), num_replicas=3, lr=0.1)
    run.algorithm.batches_per_epoch = 17
    run.run(13)
    state = run.algorithm.state_dict()
    kept = copy.deepcopy(state)
    other = make(target)
    other.load_state_dict(state)
    assert (other.clock, other.batches_per_epoch) == (13, 17)
    run.run(20)
    for key, value in kept.items():
        assert torch.equal(state[key], value) if isinstance(value, Tensor) else state[key] == value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parle(outer_lr=0), "Parle(outer_lr=0): must be a finite number above 0"),
        (lambda: Parle(outer_momentum=1), "Parle(outer_momentum=1): must be at least 0 and below 1"),
        (lambda: Parle(averaging_decay=1), "Parle(averaging_decay=1): must be at least 0 and below 1"),
        (lambda: Parle(scope=0), "Parle(scope=0): must be above 0; infinity switches it off"),
        (lambda: Parle(min_scope=101), "Parle(min_scope=101): must be above 0 and at most scope=100.0"),
        (lambda: Parle(coupling=-1), "Parle(coupling=-1): must be above 0"),
        (lambda: Parle(coupling=0.05), "Parle(min_coupling=0.1): must be above 0 and at most coupling=0.05"),
        (lambda: Parle(scoping=1.5), "Parle(scoping=1.5): must be above 0 and at most 1, or None"),
        (lambda: Parle(elastic_target="z"), "Parle(elastic_target='z'): must be 'replicas' or 'averages'"),
        (lambda: Parle(inner_lr="x"), "Parle(inner_lr='x'): must be 'constant' or 'scheduled'"),
        (lambda: Parle(period=0), "Parle(period=0)"),
        (lambda: EntropySGD(noise=-1), "EntropySGD(noise=-1): must be a finite number, at least 0"),
        (lambda: EntropySGD().check(2), "EntropySGD with 2 replicas: it has one; let it span all devices"),
        (lambda: ElasticSGD(min_coupling=2), "ElasticSGD(min_coupling=2): must be above 0 and at most coupling=1.0"),
        (lambda: Parle(outer_lr=0.2, outer_momentum=0.0).check(2), "min_coupling=0.1): the replicas' differences grow"),
        (lambda: Parle(outer_lr=1.4, scoping=1.0).check(2), "coupling=1.0): the replicas' differences grow"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_what_is_unstable_somewhere_gets_a_warning():
    Parle().check(8)
    Parle(outer_lr=0.19, outer_momentum=0.0).check(1)
    Parle(outer_lr=0.5, coupling=INF).check(8)
    for algorithm, p in (
        (Parle(outer_lr=0.19, outer_momentum=0.0), 2),
        (Parle(outer_lr=0.19, outer_momentum=0.0, elastic_target="averages"), 1),
        (Parle(outer_lr=1.4, coupling=INF), 2),
        (EntropySGD(outer_lr=1.4), 1),
    ):
        with pytest.warns(UserWarning, match="unstable where the loss curves strongly"):
            algorithm.check(p)


def test_optimizers_without_a_rate_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(1))
    still = SGD([parameter], lr=0.0)
    with pytest.raises(ValueError, match=re.escape("Parle: all learning rates of SGD are 0")):
        Parle().bind(still, [parameter])
    del still.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=re.escape("SGD has a parameter group without 'lr'")):
        Parle().bind(still, [parameter])
    with pytest.raises(ValueError, match=re.escape("call bind(optimizer, parameters) first; the learning rate sets")):
        LockStep(EntropySGD(noise=0.1), ROUGH, rows(1), num_replicas=1, lr=0.1)
    with pytest.raises(RuntimeError, match=re.escape("Parle.step: call start(replica, center) first")):
        LockStep(Parle(scoping=1.0), ROUGH, rows(1), num_replicas=1, lr=0.1, start=False).run(1)


def test_names_and_values_are_shown():
    parle = Parle(outer_lr=0.05, scoping=0.999, elastic_target="averages")
    assert repr(eval(repr(parle))) == repr(parle)
    assert parle.hyperparameters(4) == {
        "algorithm": "Parle",
        "period": 25,
        "outer_lr": 0.05,
        "outer_momentum": 0.9,
        "scope": 100.0,
        "min_scope": 1.0,
        "averaging_decay": 0.75,
        "scoping": 0.999,
        "inner_lr": "constant",
        "coupling": 1.0,
        "min_coupling": 0.1,
        "elastic_target": "averages",
    }
    entropy = EntropySGD(noise=1e-4, seed=3)
    assert (entropy.hyperparameters(1)["noise"], repr(eval(repr(entropy)))) == (1e-4, repr(entropy))
    assert repr(ElasticSGD(2.0)) == "ElasticSGD(coupling=2.0, min_coupling=0.1, scoping=None)"
    assert annealed(INF, 1.0, 0.5, 5000) == INF


# --- Elastic-SGD ------------------------------------------------------------------------------------------------------


def test_elastic_sgd_has_its_multipliers_and_its_center_is_the_mean():
    lr, h, scoping = 0.05, 1.0, 0.9
    begin = rows(4)
    simulation = Simulation.of(
        ElasticSGD(1.0, 0.2, scoping),
        Quadratic(h),
        begin,
        num_replicas=4,
        synchronous=True,
        lr=lr,
        center=begin.mean(0),
    )
    x = begin
    for t in range(40):
        simulation.run(1)
        before, x = x, torch.stack([r.read() for r in simulation.replicas])
        stiffness = 1 / max(0.2, scoping**t)
        torch.testing.assert_close(x.mean(0), (1 - lr * h) * before.mean(0), rtol=1e-10, atol=0)
        spread = before - before.mean(0)
        torch.testing.assert_close(x - x.mean(0), (1 - lr * (h + stiffness)) * spread, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(simulation.center.value, x.mean(0), rtol=0, atol=1e-14)


def test_elastic_force_gets_the_optimizers_momentum():
    lr, mu = 0.05, 0.9
    begin = rows(3)
    run = LockStep(
        ElasticSGD(1.0, scoping=1.0),
        ROUGH,
        begin,
        num_replicas=3,
        optimizer=partial(SGD, lr=lr, momentum=mu),
        center=begin.mean(0),
    )
    x, v = begin, torch.zeros_like(begin)
    for _ in range(40):
        v = mu * v + slope(x) + (x - x.mean(0))
        x = x - lr * v
        run.run(1)
        torch.testing.assert_close(run.replicas, x, rtol=0, atol=1e-12)


def test_elastic_sgd_without_coupling_or_alone_is_the_optimizer():
    begin = rows(3)
    free = LockStep(ElasticSGD(INF, scoping=1.0), ROUGH, begin, num_replicas=3, optimizer=partial(AdamW, lr=0.05))
    alone = LockStep(ElasticSGD(scoping=1.0), ROUGH, begin[0], num_replicas=1, optimizer=partial(SGD, lr=0.05))
    x = begin.clone()
    parameter, single = torch.nn.Parameter(x), begin[0]
    optimizer = AdamW([parameter], lr=0.05)
    for _ in range(30):
        parameter.grad = slope(x)
        optimizer.step()
        single = single - 0.05 * slope(single)
    free.run(30)
    alone.run(30)
    torch.testing.assert_close(free.replicas, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(alone.replicas[0], single, rtol=0, atol=1e-13)


def test_elastic_sgd_warns_of_a_coupling_that_sgd_cannot_follow():
    for kwargs, lr in (({}, 0.2), ({"momentum": 0.9}, 0.38), ({"momentum": 0.9, "nesterov": True}, 0.1358)):
        run = partial(LockStep, ElasticSGD(), ROUGH, rows(2), num_replicas=2)
        run(optimizer=partial(SGD, lr=0.99 * lr, **kwargs))
        with pytest.warns(UserWarning, match="the lowest that can be stable is 0.1"):
            run(optimizer=partial(SGD, lr=1.01 * lr, **kwargs))
