"""The simulation: its order of events, its times, its gates, and that both of its drivers compute the same."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import (
    ADAG,
    ADMM,
    AGN,
    EASGD,
    Algorithm,
    Center,
    Downpour,
    DynSGD,
    ElasticSGD,
    LocalSGD,
    MDownpour,
    Parle,
)
from lightning_easgd.gates import StaleSynchronous
from lightning_easgd.simulation import (
    DoubleWell,
    Event,
    LockStep,
    Loss,
    MultiplicativeNoise,
    Objective,
    Quadratic,
    Simulation,
    SynchronousCenter,
)

F64 = torch.float64


def exponential(random) -> float:
    return random.expovariate(1.0)


def simulate(algorithm: Algorithm, num_replicas: int, num_steps: int, **kwargs) -> tuple[Simulation, list[Event]]:
    events: list[Event] = []
    simulation = Simulation.of(
        algorithm,
        kwargs.pop("objective", Quadratic(noise=1.0)),
        kwargs.pop("begin", torch.linspace(-1, 1, 5, dtype=F64)),
        num_replicas=num_replicas,
        lr=kwargs.pop("lr", 0.1),
        synchronous=kwargs.pop("synchronous", False),
        observe=events.append,
        **kwargs,
    )
    simulation.run(num_steps)
    return simulation, events


def test_events_of_a_script_are_those_of_an_enumeration():
    # Replica 0 takes 2 s a step, 1 takes 3 s, 2 takes 1 s and then 4 s. What arrives is added before anyone reads, then
    # the replicas' order decides. Each reads when it begins, and adds when its step is over.
    _, events = simulate(Downpour(), 3, 2, compute_time=[[2.0, 2.0], [3.0, 3.0], [1.0, 4.0]])
    assert [(e.time, e.kind, e.replica, e.clock, e.staleness) for e in events] == [
        (0, "step", 0, 0, 0),
        (0, "step", 1, 0, 0),
        (0, "step", 2, 0, 0),
        (1, "add", 2, 1, 0),
        (1, "step", 2, 1, 0),
        (2, "add", 0, 2, 1),
        (2, "step", 0, 2, 0),
        (3, "add", 1, 3, 2),
        (3, "step", 1, 3, 0),
        (4, "add", 0, 4, 1),
        (5, "add", 2, 5, 3),
        (6, "add", 1, 6, 2),
    ]


def test_latencies_of_a_script():
    # Request at 0, answered at 0.5, received at 1; a step of 2 s ends at 3 and its push arrives at 3.5, as does the
    # request that is sent right behind it.
    _, events = simulate(Downpour(), 1, 2, compute_time=2.0, latency=0.5)
    assert [(e.time, e.kind) for e in events] == [(0.5, "step"), (3.5, "add"), (3.5, "step"), (6.5, "add")]


def test_a_late_reader_is_served_after_its_compute_time():
    _, events = simulate(ADAG(period=2), 1, 4, compute_time=1.0, latency=0.25)
    assert [(e.time, e.kind) for e in events] == [
        (0, "step"),
        (2.25, "add"),
        (2.25, "step"),
        (2.5, "step"),
        (4.75, "add"),
        (4.75, "step"),
    ]


def test_a_synchronous_round_waits_for_the_slowest():
    _, events = simulate(LocalSGD(period=1), 2, 2, synchronous=True, compute_time=[[1.0, 1.0], [3.0, 3.0]], latency=0.5)
    assert [(e.time, e.kind, e.replica) for e in events] == [
        (0, "step", 0),
        (0, "step", 1),
        (1, "add", 0),
        (3, "add", 1),
        (3.5, "step", 0),
        (3.5, "step", 1),
        (4.5, "add", 0),
        (6.5, "add", 1),
    ]


@pytest.mark.parametrize("synchronous", [False, True])
def test_equal_seeds_give_equal_bits_and_others_do_not(synchronous):
    def outcome(seed: int) -> tuple[Tensor, list[Event]]:
        simulation, events = simulate(
            EASGD(2), 3, 40, seed=seed, compute_time=exponential, latency=exponential, synchronous=synchronous
        )
        return simulation.center.value, events

    (value, events), (again, events_again), (other, events_other) = outcome(1), outcome(1), outcome(2)
    assert torch.equal(value, again)
    assert events == events_again
    assert not torch.equal(value, other)
    assert events != events_other


def test_running_on_is_running_at_once():
    kwargs = {"compute_time": exponential, "latency": exponential}
    once, events = simulate(EASGD(2), 3, 30, **kwargs)
    parts, more = simulate(EASGD(2), 3, 30, **kwargs)
    assert (once.time, events) == (parts.time, more)
    until = Simulation.of(
        EASGD(2), Quadratic(noise=1.0), torch.linspace(-1, 1, 5, dtype=F64), num_replicas=3, lr=0.1, synchronous=False,
        **kwargs,
    )  # fmt: skip
    until.run(30, until=5.0)
    assert until.time == 5.0
    assert 0 < sum(until.steps) < 90
    until.run(0)
    assert until.steps == [30] * 3
    assert torch.equal(until.center.value, once.center.value)


def test_after_a_run_without_a_number_of_steps_their_number_counts_again():
    simulation, _ = simulate(EASGD(2), 3, 4, compute_time=exponential)
    simulation.run(until=20.0)
    steps = simulation.steps[:]
    assert min(steps) > 4
    simulation.run(5)
    assert simulation.steps == [n + 5 for n in steps]


def test_who_waits_goes_on_when_the_last_step_of_the_other_begins_and_not_when_it_is_computed():
    simulation = Simulation.of(
        Downpour(3), Quadratic(), torch.ones(1), num_replicas=2, lr=0.1, synchronous=False, gate=StaleSynchronous(1),
        compute_time=[[1.0] * 99, [0.125] * 99],
    )  # fmt: skip
    simulation.run(until=12.5)
    simulation.run(4)  # replica 0 at 13, 14, 15 and 16; 1 thrice from 15 on, and then it waits for 0 to have no more
    assert simulation.time == 16
    steps = simulation.steps[:]
    simulation.run(1, until=16.0)
    assert simulation.steps == steps
    simulation.run(0, until=16.125)
    assert simulation.steps == [steps[0], steps[1] + 1]


STACKABLE = [
    EASGD(1), EASGD(3), EASGD(2, order="gauss_seidel"), Downpour(), Downpour(3), AGN(4), DynSGD(2), ADAG(3),
    MDownpour(0.5), LocalSGD(3), LocalSGD.diloco(4), LocalSGD.bmuf(2), LocalSGD.slowmo(2), ADMM(1), ADMM(3, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", STACKABLE, ids=repr)
def test_all_at_once_is_one_after_the_other_to_the_last_bit(algorithm):
    begin = torch.randn(3, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
    objective = Loss(lambda x, generator: x.sin() + 0.3 * x.square())
    kwargs = {"num_replicas": 3, "lr": 0.05, "center": torch.zeros(7, dtype=F64)}
    # The order in which replicas come must not matter either.
    simulation = Simulation.of(algorithm, objective, begin, synchronous=True, compute_time=exponential, **kwargs)
    simulation.run(24)
    at_once = LockStep(algorithm, objective, begin, **kwargs)
    at_once.run(24)
    assert torch.equal(torch.stack([r.read() for r in simulation.replicas]), at_once.replicas)
    assert torch.equal(simulation.center.value, at_once.center)
    assert simulation.center.clock == at_once.clock > 0
    assert not torch.equal(at_once.center, kwargs["center"])


@dataclass
class OneByOne:
    """Hides from the simulation that an objective could give many replicas' gradients at once."""

    objective: Objective

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.objective.gradient(x, generator)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "objective",
    [Quadratic(0.7), Quadratic(torch.linspace(0.1, 1, 7), 0.5), DoubleWell(0.3), MultiplicativeNoise(1.0, 2.0)],
    ids=lambda objective: type(objective).__name__,
)
@pytest.mark.parametrize(
    ("algorithm", "synchronous", "gate"),
    [
        (EASGD(1), False, None),
        (EASGD(5), False, None),
        (EASGD(4, order="gauss_seidel"), False, None),
        (Downpour(3), False, StaleSynchronous(1)),
        (ADAG(3), False, None),
        (ADMM(2), False, None),
        (LocalSGD.diloco(4), True, None),
        (ElasticSGD(scoping=1.0), True, None),
        (Parle(4, scoping=1.0), True, None),
    ],
    ids=repr,
)
def test_steps_that_nobody_sees_may_be_made_at_any_time(algorithm, synchronous, gate, objective, dtype):
    """With an observer each step is an event, and without ``OneByOne`` steps of many replicas are made at once."""

    def outcomes(objective: Objective, observe: Callable[[Event], None] | None) -> list[Tensor | tuple]:
        simulation = Simulation.of(
            algorithm, objective, torch.linspace(-1, 1, 7, dtype=dtype), num_replicas=11, lr=0.05,
            synchronous=synchronous, gate=gate, compute_time=exponential, latency=exponential, observe=observe,
        )  # fmt: skip
        found: list[Tensor | tuple] = []
        for num_steps, until in ((20, 6.0), (None, 9.0), (3, math.inf)):
            simulation.run(num_steps, until=until)
            found += [simulation.center.value.clone(), *(r.read() for r in simulation.replicas)]
            found.append((simulation.time, simulation.clocks[:], simulation.steps[:], simulation.center.clock))
        return found

    expected = outcomes(OneByOne(objective), lambda event: None)
    assert min(expected[-1][2]) > 0
    for found in (outcomes(objective, None), outcomes(objective, lambda event: None)):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_an_observer_sees_each_step_when_it_is_made():
    """Replica 0 of a noiseless quadratic, looked at after each event while 39 others put their steps off."""
    seen: list[float] = []

    def observe(event: Event) -> None:
        if event.kind == "step" and event.replica == 0:
            seen.append(float(simulation.replicas[0].value))

    simulation = Simulation.of(
        EASGD(10, 0.0, 0.9), Quadratic(), torch.ones(1, dtype=F64), num_replicas=40, lr=0.1, synchronous=False,
        compute_time=exponential, observe=observe,
    )  # fmt: skip
    simulation.run(30)
    assert seen == pytest.approx([0.9**t for t in range(1, 31)], rel=1e-13)


def test_equal_speeds_and_no_latency_are_a_synchronous_center():
    asynchronous, _ = simulate(Downpour(2), 3, 10)
    synchronous, _ = simulate(Downpour(2), 3, 10, synchronous=True)
    torch.testing.assert_close(asynchronous.center.value, synchronous.center.value, rtol=0, atol=1e-14)


def test_staleness_of_replicas_of_random_speed():
    p = 8
    _, events = simulate(Downpour(), p, 2500, compute_time=exponential, lr=0.0, begin=torch.zeros(1))
    staleness = torch.tensor([e.staleness for e in events if e.kind == "add"], dtype=F64)
    assert float(staleness.mean()) == pytest.approx(p - 1, rel=0.01)
    assert float((staleness == 0).to(F64).mean()) == pytest.approx(1 / p, rel=0.05)


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize("period", [1, 3])
def test_bounded_staleness_holds_at_every_reading(slack, period):
    p, clocks, lead = 4, [0] * 4, []
    written: list[list[int]] = [[] for _ in range(p)]  # of each replica, the center's clock after each of its additions
    _, events = simulate(Downpour(period), p, 60 * period, compute_time=exponential, gate=StaleSynchronous(slack))
    steps = [0] * p
    for event in events:
        if event.kind == "add":
            clocks[event.replica] += 1
            written[event.replica].append(event.clock)
            continue
        if steps[event.replica] % period == 0:
            lead.append(clocks[event.replica] - min(clocks))
            own = clocks[event.replica]
            for other in range(p):  # a read at clock c sees all additions with time stamps below c - s
                visible = sum(clock <= event.clock for clock in written[other])
                assert visible >= own - slack
            assert sum(clock <= event.clock for clock in written[event.replica]) == own  # read my writes
        steps[event.replica] += 1
    assert max(lead) == slack
    assert clocks == [60] * p


def test_no_slack_is_synchronous_descent_on_summed_updates():
    kwargs = {"objective": Loss(lambda x, generator: x.sin() + 0.3 * x.square()), "lr": 0.05}
    gated, _ = simulate(Downpour(), 4, 30, compute_time=exponential, gate=StaleSynchronous(0), **kwargs)
    summed, _ = simulate(Downpour(), 4, 30, synchronous=True, **kwargs)
    torch.testing.assert_close(gated.center.value, summed.center.value, rtol=0, atol=1e-14)
    x = torch.linspace(-1, 1, 5, dtype=F64)
    for _ in range(30):
        x = x - 0.05 * 4 * (x.cos() + 0.6 * x)
    torch.testing.assert_close(summed.center.value, x, rtol=0, atol=1e-14)


def test_objectives():
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=F64)
    assert torch.equal(Quadratic(2.0).gradient(x, generator), 2 * x)
    torch.testing.assert_close(DoubleWell().gradient(x, generator), x * (x.square() - 1))
    well = Loss(lambda x, generator: (x.square() - 1).square() / 4)
    torch.testing.assert_close(well.gradient(x, generator), DoubleWell().gradient(x, generator))
    ones = torch.ones(200_000, dtype=F64)
    curvature = MultiplicativeNoise(1.0, 2.0).gradient(ones, generator)
    assert float(curvature.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(curvature.std()) == pytest.approx(2.0, abs=0.1)
    noise = ones - Quadratic(1.0, 0.5).gradient(ones, generator)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(noise.std()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("eta", "p"), [(0.2, 1), (0.5, 4)])
def test_best_rate_under_multiplicative_noise(eta, p):
    """T13: with m = 1, s^2 = 4 the best eta, 1 / (1 + 4 / p), multiplies E x^2 by (4 / p) / (1 + 4 / p)."""
    run = LockStep(
        LocalSGD(period=1), MultiplicativeNoise(1.0, 2.0), torch.ones(200_000, dtype=F64), num_replicas=p, lr=eta
    )
    run.run(1)
    assert float(run.center.square().mean()) == pytest.approx((4 / p) / (1 + 4 / p), rel=0.03)


@pytest.mark.parametrize(("elasticity", "trapped"), [(0.30, True), (0.60, True), (0.70, False), (0.90, False)])
def test_replicas_in_two_wells_are_trapped_below_an_elasticity_of_two_thirds(elasticity, trapped):
    """T14: x = (s, -s), c = 0, s^2 = 1 - rho is a local minimum iff rho < 2/3."""
    s = math.sqrt(1 - elasticity)
    begin = torch.tensor([[s + 1e-3], [-s + 2e-3]], dtype=F64)
    run = LockStep(
        EASGD(1, 0.05 * elasticity),
        DoubleWell(),
        begin,
        num_replicas=2,
        lr=0.05,
        center=torch.tensor([1e-3], dtype=F64),
    )
    run.run(20_000)
    assert abs(float(run.center)) == pytest.approx(0.0 if trapped else 1.0, abs=1e-3)
    assert abs(float(run.replicas[0])) == pytest.approx(s if trapped else 1.0, abs=1e-3)


class _Greedy(Algorithm):
    """Reads after its local update without saying so."""

    period = 1

    def check(self, num_replicas: int) -> None:
        pass

    def step(self, replica, center, local_update) -> None:
        local_update()
        center.pull()
        self.clock += 1


def test_a_late_reading_must_be_declared():
    with pytest.raises(RuntimeError, match="replica 0 reads the center after its local update"):
        simulate(_Greedy(), 2, 1)


class _Sly(Algorithm):
    """Touches the center in steps in which it says that it does not."""

    period = 2

    def __init__(self, touch: Callable[[Center], None]) -> None:
        self.touch = touch

    def check(self, num_replicas: int) -> None:
        pass

    def step(self, replica, center, local_update) -> None:
        local_update()
        if not self.is_due:
            self.touch(center)
        self.clock += 1


@pytest.mark.parametrize(
    ("touch", "message"),
    [
        (lambda center: center.pull(), "reads the center in a step that is neither due nor ending.*is_due"),
        (
            lambda center: center.push(torch.zeros(5, dtype=F64), read_at=0),
            "adds to the center in a step that is neither due nor ending.*is_ending",
        ),
    ],
)
def test_a_step_that_touches_the_center_must_be_declared(touch, message):
    simulation = Simulation.of(
        _Sly(touch), Quadratic(), torch.zeros(5, dtype=F64), num_replicas=2, lr=0.1, synchronous=False
    )
    with pytest.raises(RuntimeError, match=f"replica 0 {message}"):
        simulation.run(4)


def test_errors():
    algorithm, x = EASGD(1), torch.zeros(1)
    with pytest.raises(ValueError, match="needs a synchronous center"):
        Simulation.of(LocalSGD(), Quadratic(), x, num_replicas=2, lr=0.1, synchronous=False)
    with pytest.raises(ValueError, match="needs an asynchronous center"):
        Simulation.of(algorithm, Quadratic(), x, num_replicas=2, lr=0.1, synchronous=True, gate=StaleSynchronous(0))
    with pytest.raises(ValueError, match=re.escape("lr=None, optimizer=None: give the one or the other")):
        LockStep(algorithm, Quadratic(), x, num_replicas=2)
    with pytest.raises(ValueError, match="must be as many, and at least 1"):
        Simulation([], [], [], synchronous=True)
    with pytest.raises(ValueError, match="<1 scripts of durations>: must be one for each of 2 replicas"):
        simulate(algorithm, 2, 1, compute_time=[[1.0]])
    with pytest.raises(ValueError, match="the script of replica 1's durations is over"):
        simulate(algorithm, 2, 2, compute_time=[[1.0, 1.0], [1.0]])
    with pytest.raises(ValueError, match="give at least one"):
        simulate(algorithm, 2, None)


def test_what_would_hang_over_an_all_reduce_raises():
    center = SynchronousCenter(torch.zeros(2), 2)
    first, _ = center.handles
    snapshot = first.pull()
    with pytest.raises(RuntimeError, match="a delta of torch.float32, shape \\(3,\\)"):
        first.push(torch.zeros(3), read_at=0)
    with pytest.raises(RuntimeError, match="replica 0 read the center at 2; it is at 0"):
        first.push(torch.zeros(2), read_at=2)
    first.push(torch.zeros(2), read_at=snapshot.clock)
    with pytest.raises(RuntimeError, match="replica 0 pushes twice in one round"):
        first.push(torch.zeros(2), read_at=snapshot.clock)
    with pytest.raises(RuntimeError, match="it would wait for ever"):
        first.pull()
    snapshot.value.add_(1)
    with pytest.raises(RuntimeError, match="which is only lent"):
        assert center.value is None
