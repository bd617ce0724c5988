"""Leader SGD: its recurrence, who leads, what stays where it is, and what the simulation gives it to know."""

import copy
import math
import pickle
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import EASGD, LSGD, Algorithm, Center, Replica, elected
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.simulation import (
    DoubleWell,
    LockStep,
    Loss,
    MultiplicativeNoise,
    Objective,
    Quadratic,
    Simulation,
    SynchronousCenter,
)
from tests.in_process import run_synchronous

F64 = torch.float64
NAN = math.nan
SKEWED = Quadratic(torch.tensor([0.05, 1.0], dtype=F64))  # a slow coordinate and a fast one
# Replica 0 is best in the beginning, 1 in the end, which is best where it is slow; 2 is worst.
ROWS = torch.tensor([[3.0, 0.1], [1.0, 1.5], [6.0, 3.0]], dtype=F64)


def simulated(algorithm: LSGD | EASGD, objective: Objective, begin: Tensor, num_steps: int, lr: float) -> Simulation:
    simulation = Simulation.of(algorithm, objective, begin, num_replicas=len(begin), synchronous=True, lr=lr, seed=5)
    simulation.run(num_steps)
    return simulation


def values(simulation: Simulation) -> Tensor:
    return torch.stack([replica.read() for replica in simulation.replicas])


class Group:
    """Replicas that descend ``SKEWED``, one step at a time; ``hears(replica, loss)`` may falsify what one observes."""

    def __init__(
        self,
        make: Callable[[], LSGD],
        rows: Tensor,
        hears: Callable[[int, Tensor], Tensor | None] = lambda _, loss: loss,
        lr: float = 0.1,
    ) -> None:
        self.make, self.hears, self.lr = make, hears, lr
        self.replicas = [ParameterVector([row.clone()]) for row in rows]
        self.center = SynchronousCenter(rows[0], len(rows), num_told=LSGD.num_told)
        self.algorithms = [make() for _ in rows]
        self.is_started = False

    def update(self, i: int) -> None:
        (x,) = self.replicas[i].parameters
        heard = self.hears(i, SKEWED.loss(x, torch.Generator()))
        if heard is not None:
            self.algorithms[i].observe_loss(heard)
        x.sub_(SKEWED.exact(x), alpha=self.lr)

    def run(self, num_steps: int, order: Sequence[int] | None = None) -> None:
        updates = [lambda i=i: self.update(i) for i in range(len(self.replicas))]
        start, self.is_started = not self.is_started, True
        run_synchronous(
            self.algorithms, self.replicas, updates, num_steps, center=self.center, order=order, start=start
        )

    def restart(self) -> None:
        """New algorithms, as after a checkpoint."""
        states = pickle.loads(pickle.dumps([a.state_dict() for a in self.algorithms]))
        self.algorithms = [self.make() for _ in self.algorithms]
        for algorithm, replica, handle, state in zip(
            self.algorithms, self.replicas, self.center.handles, states, strict=True
        ):
            algorithm.start(replica, handle)
            algorithm.load_state_dict(state)

    @property
    def values(self) -> Tensor:
        return torch.stack([replica.read() for replica in self.replicas])


# --- arithmetic -------------------------------------------------------------------------------------------------------


def reference(rows: Tensor, lr: float, period: int, leader_rate: float, step_rate: float, num_steps: int):
    """Yields replicas, center and leader after each step."""
    x, c, losses, leader = rows.clone(), rows[0].clone(), None, None
    curvature = torch.tensor([0.05, 1.0], dtype=F64)
    for t in range(num_steps):
        if t % period == 0:
            followed, leader = leader, None if losses is None else min(range(len(x)), key=losses.__getitem__)
            sums = [0.0] * len(x)
        rate = step_rate / period + (leader_rate if t % period == 0 else 0)
        for i, row in enumerate(x):
            sums[i] += float((curvature * row * row).sum()) / 2
            pull = rate * (row - c) if followed not in (None, i) else 0
            x[i] = row - lr * curvature * row - pull
        if t % period == period - 1:
            losses = [s / period for s in sums]
            if leader is not None:
                c = x[leader].clone()
        yield x.clone(), c, leader


@pytest.mark.parametrize(
    ("period", "leader_rate", "step_rate"), [(1, 0.1, 0.0), (1, 0.2, 0.1), (3, 0.3, 0.2), (4, 0, 1)]
)
def test_it_is_the_recurrence(period, leader_rate, step_rate):
    simulation = Simulation.of(
        LSGD(period, leader_rate, step_rate), SKEWED, ROWS, num_replicas=3, synchronous=True, lr=0.1
    )
    leaders = set()
    for x, c, leader in reference(ROWS, 0.1, period, leader_rate, step_rate, 12 * period):
        simulation.run(1)
        leaders.add(leader)
        torch.testing.assert_close(values(simulation), x, rtol=0, atol=1e-12)
        torch.testing.assert_close(simulation.center.value, c, rtol=0, atol=1e-12)
    assert leaders == {None, 0, 1}


def test_without_rates_replicas_are_independent_to_the_last_bit():
    begin = torch.linspace(-2, 2, 12, dtype=F64).view(3, 4)
    alone = simulated(EASGD(4, 0.0), DoubleWell(noise=0.5), begin, 30, 0.1)
    led = simulated(LSGD(4, 0.0, 0.0), DoubleWell(noise=0.5), begin, 30, 0.1)
    assert torch.equal(values(alone), values(led))


def test_one_replica_is_alone_to_the_last_bit():
    begin = torch.linspace(-2, 2, 4, dtype=F64).view(1, 4)
    alone = simulated(EASGD(4, 0.0), DoubleWell(noise=0.5), begin, 30, 0.1)
    led = simulated(LSGD(4, 0.4, 0.4), DoubleWell(noise=0.5), begin, 30, 0.1)
    assert torch.equal(values(alone), values(led))
    assert float((led.center.value - alone.replicas[0].read()).norm()) > 0  # of a period before


def test_nobody_moves_before_somebody_has_led():
    led, alone = (Group(lambda c=c: LSGD(3, c, c), ROWS) for c in (0.5, 0.0))
    led.run(6)
    alone.run(6)
    assert torch.equal(led.values, alone.values)
    led.run(1)
    alone.run(1)
    assert not torch.equal(led.values, alone.values)


@pytest.mark.parametrize("stiffness", [0.1, 0.2, 0.24, 0.26, 0.3, 0.6])
@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("kind", ["leader_rate", "step_rate"])
def test_a_follower_is_pinned_in_its_own_well_iff_r_is_below_a_quarter(stiffness, period, kind):
    """The leader is at -1, where (x + 1)(x^2 - x + r) = 0 is stationary for the other."""
    lr = 0.1
    pull = {"leader_rate": 0.0, "step_rate": 0.0, kind: stiffness * lr * period}
    simulation = simulated(LSGD(period, **pull), DoubleWell(), torch.tensor([[-1.0], [1.0]], dtype=F64), 600, lr)
    leader, follower = (float(replica.read()) for replica in simulation.replicas)
    assert leader == -1.0
    if stiffness > 0.25:
        assert follower == pytest.approx(-1.0, abs=1e-6)
    else:  # where the pull comes once a period the follower goes to and fro by less than that
        exact = kind == "step_rate" or period == 1
        pinned = (1 + math.sqrt(1 - 4 * stiffness)) / 2
        assert follower == pytest.approx(pinned, abs=1e-6 if exact else 4 * stiffness * lr)


def test_there_is_no_symmetric_trap_as_there_is_for_easgd():
    lr, elasticity = 0.1, 0.3
    s = math.sqrt(1 - elasticity)
    begin = torch.tensor([[s], [-s]], dtype=F64)
    trapped = Simulation.of(
        EASGD(1, lr * elasticity),
        DoubleWell(),
        begin,
        num_replicas=2,
        synchronous=True,
        lr=lr,
        center=torch.zeros(1, dtype=F64),
    )
    trapped.run(400)
    torch.testing.assert_close(values(trapped), begin, rtol=0, atol=1e-6)
    free = simulated(LSGD(1, lr * elasticity, 0.0), DoubleWell(), begin, 400, lr)
    torch.testing.assert_close(values(free), torch.ones(2, 1, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("point", [-1.0, 0.0, 1.0])
def test_stationary_points_stay_stationary(point):
    begin = torch.full((3, 2), point, dtype=F64)
    assert torch.equal(values(simulated(LSGD(2, 0.5, 0.5), DoubleWell(), begin, 20, 0.1)), begin)


def test_the_leader_is_pulled_by_nobody():
    begin = torch.tensor([[1.0], [0.2], [-0.4]], dtype=F64)  # the first is at rest, and the best
    simulation = simulated(LSGD(3, 0.4, 0.2), DoubleWell(), begin, 40, 0.1)
    assert float(simulation.replicas[0].read()) == 1.0
    assert float(simulation.center.value) == 1.0
    torch.testing.assert_close(values(simulation), torch.ones(3, 1, dtype=F64), rtol=0, atol=1e-3)


# --- who leads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "leader"),
    [
        ([3.0, 1.0, 2.0], 1),
        ([-3.0, 1.0, -4.0], 2),
        ([2.0, 1.0, 1.0], 1),
        ([NAN, 5.0, 7.0], 1),
        ([-math.inf, math.inf, 1e30], 2),
        ([NAN, math.inf], None),
        ([0.0], 0),
    ],
)
def test_who_is_elected(losses, leader):
    assert elected(torch.tensor(losses)) == leader


@pytest.mark.parametrize("period", [1, 4])
def test_the_center_is_whoever_had_the_lowest_loss_as_of_the_exchange_before(period):
    heard: list[list[float]] = [[] for _ in ROWS]

    def hears(i: int, loss: Tensor) -> Tensor:
        heard[i].append(float(loss))
        return loss

    group = Group(lambda: LSGD(period, 0.3, 0.1), ROWS, hears)
    before = None
    for exchange in range(12):
        group.run(period)
        means = [sum(losses[-period:]) / period for losses in heard]
        told = group.center.told()
        assert told[:, :2].tolist() == [[1.0, pytest.approx(mean)] for mean in means]
        if before is None:
            assert not told[:, 2].any()
            assert torch.equal(group.center.value, ROWS[0])
        else:
            assert told[:, 2].nonzero().flatten().tolist() == [before]
            torch.testing.assert_close(group.center.value, group.values[before], rtol=0, atol=1e-14)
            assert [bool(delta.any()) for delta in group.center.pushed] == [i == before for i in range(3)]
        before = means.index(min(means))
        assert exchange or before == 0
    assert before == 1


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0]])
def test_all_agree_whoever_comes_first(order):
    one, other = (Group(lambda: LSGD(3, 0.2, 0.3), ROWS) for _ in range(2))
    one.run(31)
    other.run(31, order)
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.center.value, other.center.value)


@pytest.mark.parametrize("bad", [NAN, -math.inf])
def test_a_replica_with_a_loss_that_is_not_finite_does_not_lead(bad):
    """Replica 0 would be the first to lead; one of its losses in each period is bad."""
    number = 0

    def hears(i: int, loss: Tensor) -> Tensor:
        nonlocal number
        number += i == 0
        return torch.tensor(bad) if i == 0 and number % 3 == 0 else loss

    group = Group(lambda: LSGD(3, 0.1, 0.1), ROWS, hears)
    leaders = []
    for _ in range(10):
        group.run(3)
        assert group.center.told()[0].tolist() == [0.0, 0.0, 0.0]
        leaders.append(group.center.told()[:, 2].tolist())
    assert leaders == [[0.0, 0.0, 0.0]] + 9 * [[0.0, 1.0, 0.0]]


def test_a_replica_that_has_no_loss_any_more_does_not_lead():
    def hears(i: int, loss: Tensor) -> Tensor | None:
        return loss if i or group.algorithms[0].clock < 2 else None

    group = Group(lambda: LSGD(2, 0.1, 0.1), ROWS, hears)
    leaders = []
    for _ in range(5):
        group.run(2)
        leaders.append(group.center.told()[:, 2].tolist())
    assert leaders == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]] + 3 * [[0.0, 1.0, 0.0]]


def test_where_nobody_has_led_nobody_is_pulled():
    def hears(_: int, loss: Tensor) -> Tensor:
        return torch.tensor(NAN) if is_deaf else loss

    is_deaf = False
    group = Group(lambda: LSGD(2, 0.3, 0.3), ROWS, hears)
    group.run(4)
    is_deaf = True
    group.run(2)  # who was elected before leads this time
    assert group.center.told()[:, 2].any()
    group.run(2)
    assert not group.center.told()[:, 2].any()
    before = group.values
    group.run(2)
    torch.testing.assert_close(
        group.values, before * (1 - 0.1 * torch.tensor([0.05, 1.0], dtype=F64)) ** 2, rtol=0, atol=1e-14
    )


def test_a_follower_that_diverges_is_not_silent():
    """What it pushes is not finite, as a leader's would be, so that whoever looks after that finds it."""
    group = Group(lambda: LSGD(2), ROWS)
    group.run(5)
    assert group.algorithms[2].state_dict()["follows"]
    group.replicas[2].parameters[0][1] = math.inf
    group.run(1)
    assert not group.center.pushed[2].isfinite().all()


def test_without_any_loss_it_says_so_at_the_second_exchange():
    group = Group(lambda: LSGD(3), ROWS, lambda *_: None)
    group.run(5)
    text = (
        "LSGD(period=3, leader_rate=0.1, step_rate=0.1): two periods are over and no training loss was observed; "
        "return it from training_step"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        group.run(1)


# --- state and arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 11, 12])
def test_it_goes_on_from_its_state_to_the_last_bit(at):
    whole, halves = (Group(lambda: LSGD(3, 0.2, 0.3), ROWS) for _ in range(2))
    whole.run(25)
    halves.run(at)
    halves.restart()
    halves.run(25 - at)
    assert torch.equal(whole.values, halves.values)
    assert torch.equal(whole.center.value, halves.center.value)


def test_the_mean_of_the_losses_is_over_mini_batches_and_keeps_no_graph():
    algorithm = LSGD()
    parameter = torch.nn.Parameter(torch.tensor(2.0))
    for factor in (1.0, 2.0, 6.0):
        algorithm.observe_loss((factor * parameter).half())
    state = algorithm.state_dict()
    assert (state["loss_sum"], state["num_losses"]) == (18.0, 3)
    assert not copy.deepcopy(algorithm)._loss_sum.requires_grad


def test_who_starts_anew_forgets():
    group = Group(lambda: LSGD(4), ROWS)
    group.run(10)
    algorithm = group.algorithms[0]
    algorithm.start(group.replicas[0], group.center.handles[0])
    state = algorithm.state_dict()
    assert (state["leader"], state["loss_sum"], state["num_losses"], state["clock"]) == (None, 0.0, 0, 10)
    group.run(2)
    assert group.center.told()[0, 1] == pytest.approx(float(SKEWED.loss(group.values[0], torch.Generator())), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"period": 0}, "LSGD(period=0): period must be an integer >= 1"),
        ({"leader_rate": -0.1}, "LSGD(leader_rate=-0.1): must be a finite number, at least 0"),
        ({"step_rate": math.inf}, "LSGD(step_rate=inf): must be a finite number, at least 0"),
        ({"leader_rate": NAN}, "LSGD(leader_rate=nan): must be a finite number, at least 0"),
        (
            {"period": 2, "leader_rate": 0.8, "step_rate": 0.5},
            "LSGD(period=2, leader_rate=0.8, step_rate=0.5): leader_rate + step_rate / period must be at most 1",
        ),
    ],
)
def test_arguments_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        LSGD(**arguments)


def test_hyperparameters_and_repr():
    algorithm = LSGD(8, 0.2, 0.3)
    assert repr(eval(repr(algorithm), {"LSGD": LSGD})) == "LSGD(period=8, leader_rate=0.2, step_rate=0.3)"
    assert algorithm.hyperparameters(4) == {"algorithm": "LSGD", "period": 8, "leader_rate": 0.2, "step_rate": 0.3}
    LSGD(1, 1.0, 0.0).check(1)


# --- what the simulation gives it -------------------------------------------------------------------------------------


def test_it_needs_replicas_that_can_be_told_apart_and_meet():
    with pytest.raises(ValueError, match="needs a synchronous center"):
        Simulation.of(LSGD(), Quadratic(), torch.zeros(2, 1), num_replicas=2, synchronous=False, lr=0.1)
    with pytest.raises(ValueError, match=re.escape("it tells replicas apart; take Simulation")):
        LockStep(LSGD(), Quadratic(), torch.zeros(2, 1), num_replicas=2, lr=0.1)


@pytest.mark.parametrize(
    "objective",
    [
        Quadratic(0.7),
        Quadratic(torch.tensor([0.5, 1.0, 2.0], dtype=F64), noise=0.3),
        DoubleWell(),
        DoubleWell(noise=0.3),
        MultiplicativeNoise(1.0, 0.5),
        Loss(lambda x, g: (torch.randn(x.shape, dtype=F64, generator=g) * x + x.cos()).sum(-1)),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_the_gradient_is_that_of_the_loss(objective):
    x = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    point = x.clone().requires_grad_()
    losses = objective.loss(point, torch.Generator().manual_seed(2))
    assert losses.shape == (2,)
    (expected,) = torch.autograd.grad(losses.sum(), point)
    torch.testing.assert_close(objective.gradient(x, torch.Generator().manual_seed(2)), expected)
    assert objective.loss(x[0], torch.Generator().manual_seed(2)).shape == ()


class Teller(Algorithm):
    """Tells its replica's index and clock with each push."""

    num_told = 2

    def __init__(self, period: int) -> None:
        self.period = period
        self.heard: list[list[list[float]]] = []

    def check(self, num_replicas: int) -> None:
        pass

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        local_due = self.is_due
        if local_due:
            snapshot = center.pull()
            self.heard.append(center.told().tolist())
        local_update()
        if local_due:
            center.tell([center.replica + 1, self.clock])
            center.push(torch.zeros_like(snapshot.value), read_at=snapshot.clock)
        self.clock += 1


@pytest.mark.parametrize("synchronous", [True, False])
def test_what_is_told_comes_with_the_push(synchronous):
    simulation = Simulation.of(
        Teller(2), Quadratic(), torch.zeros(2, 1, dtype=F64), num_replicas=2, synchronous=synchronous, lr=0.1
    )
    simulation.run(6)
    for algorithm in simulation.algorithms:
        assert isinstance(algorithm, Teller)
        assert algorithm.heard == [[[0, 0], [0, 0]], [[1, 0], [2, 0]], [[1, 2], [2, 2]]]
    assert simulation.center.told().tolist() == [[1, 4], [2, 4]]


def test_what_is_told_arrives_with_the_delta_and_not_before():
    """Replica 0's messages take 2.5 s; the other's none. A step takes 1 s."""
    simulation = Simulation.of(
        Teller(1),
        Quadratic(),
        torch.zeros(2, 1, dtype=F64),
        num_replicas=2,
        synchronous=False,
        lr=0.1,
        latency=[iter([2.5] * 99), iter([0.0] * 99)],
    )
    simulation.run(until=8.4)
    # Replica 0 begins its first step at 2.5 with the center's answer at 5, ends it at 6: its push arrives at 8.5.
    assert simulation.center.told().tolist() == [[0, 0], [2, 7]]
    simulation.run(until=8.5)
    assert simulation.center.told()[0].tolist() == [1, 0]
