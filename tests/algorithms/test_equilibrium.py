"""Hermans' early exchange: when it triggers, in closed form, and that nothing else changes."""

import copy
import math
import pickle
import re

import pytest
import torch

from lightning_easgd.algorithms import EASGD, Equilibrium
from lightning_easgd.simulation import AsynchronousCenter, Event, Quadratic, Simulation, SynchronousCenter
from tests.in_process import interrupted, quadratic_steps, run_synchronous, vectors

F64 = torch.float64
NEVER = -math.inf


def exchanges(
    algorithm: EASGD, *, lr: float, curvature: float = 1.0, begin: float = 1.0, num_steps: int = 60
) -> list[int]:
    """Returns the steps at which one replica, alone with its center, exchanges."""
    (replica,) = vectors([begin])
    center = AsynchronousCenter(replica.read(), 1)
    found: list[int] = []
    (update,) = quadratic_steps([replica], lr, curvature=curvature)
    algorithm.start(replica, center.handles[0])
    for step in range(num_steps):
        before, is_due = center.clock, algorithm.is_due
        algorithm.step(replica, center.handles[0], update)
        assert (center.clock > before) == is_due
        if is_due:
            found.append(step)
    return found


@pytest.mark.parametrize("curvature", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("moving_rate", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("margin", [-0.02, 0.0, 0.005])
def test_it_triggers_at_the_step_of_the_closed_form(curvature, moving_rate, margin):
    """x_k = q^k x_0 and c = x_0 = 1: in step k, ||update|| = e q^k and ||force|| = alpha (1 - q^k)."""
    lr = 0.05
    e = lr * curvature
    q = 1 - e
    # e q^k - alpha (1 - q^k) < margin
    k = math.log((moving_rate + margin) / (moving_rate + e)) / math.log(q)
    first = math.floor(k) + 1
    assert abs(k - round(k)) > 1e-6, "rounding would decide"
    algorithm = EASGD(1000, moving_rate, early_exchange=True, margin=margin)
    found = exchanges(algorithm, lr=lr, curvature=curvature, num_steps=first + 2)
    assert found == [0, first + 1]  # the step after the one in which the condition holds


def test_the_period_counts_from_the_early_exchange():
    """A margin, here the optimizer's learning rate, that one step meets."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    algorithm = EASGD(4, 0.1, early_exchange=True)
    algorithm.bind(optimizer, [parameter])
    (replica,) = vectors([1.0])
    center = AsynchronousCenter(replica.read(), 1)
    (update,) = quadratic_steps([replica], 0.1)
    algorithm.start(replica, center.handles[0])
    due = []
    for step in range(14):
        if algorithm.is_due:
            due.append(step)
        optimizer.param_groups[0]["lr"] = math.inf if step == 5 else NEVER
        algorithm.step(replica, center.handles[0], update)
    assert due == [0, 4, 6, 10]


def test_near_the_minimum_the_margin_of_the_learning_rate_makes_it_exchange_in_each_step():
    """||eta g|| < eta where |x| < 1."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=F64))
    algorithm = EASGD(10, 0.1, early_exchange=True)
    algorithm.bind(torch.optim.SGD([parameter], lr=0.1), [parameter])
    assert exchanges(algorithm, lr=0.1, begin=0.9, num_steps=8) == list(range(8))
    # Far from it the learning rate is next to nothing: 5 q^k - 5 (1 - q^k) < 0.1 in step 7.
    assert exchanges(algorithm, lr=0.1, begin=50.0, num_steps=9) == [0, 8]


def simulated(algorithm: EASGD, num_replicas: int, *, num_steps: int = 40) -> tuple[Simulation, list[Event]]:
    events: list[Event] = []
    simulation = Simulation.of(
        algorithm,
        Quadratic(noise=1.0),
        torch.full((5,), 3.0, dtype=F64),
        num_replicas=num_replicas,
        synchronous=False,
        lr=0.1,
        compute_time=lambda random: random.uniform(0.5, 1.5),
        seed=3,
        observe=events.append,
    )
    simulation.run(num_steps)
    return simulation, events


def test_with_a_margin_that_is_never_met_it_is_easgd_to_the_last_bit():
    plain, _ = simulated(EASGD(5), 3)
    watched, _ = simulated(EASGD(5, early_exchange=True, margin=NEVER), 3)
    assert torch.equal(plain.center.value, watched.center.value)
    for a, b in zip(plain.replicas, watched.replicas, strict=True):
        assert torch.equal(a.read(), b.read())
    assert plain.clocks == watched.clocks == [8, 8, 8]


def test_without_it_nothing_is_early():
    plain, _ = simulated(EASGD(7), 3, num_steps=21)
    assert plain.clocks == [3, 3, 3]
    assert not EASGD(7).asynchronous_only


def test_with_a_margin_that_is_always_met_the_period_is_one():
    every, _ = simulated(EASGD(1, 0.2), 3)
    always, _ = simulated(EASGD(10, 0.2, early_exchange=True, margin=math.inf), 3)
    assert torch.equal(every.center.value, always.center.value)


def test_each_replica_decides_alone():
    simulation, events = simulated(EASGD(20, early_exchange=True, margin=0.05), 4, num_steps=100)
    assert len(set(simulation.clocks)) > 1
    assert sum(simulation.clocks) == sum(event.kind == "add" for event in events)
    assert min(simulation.clocks) > 5  # of the period alone


def test_only_over_an_asynchronous_center():
    algorithm = EASGD(early_exchange=True, margin=0.1)
    assert algorithm.asynchronous_only
    with pytest.raises(ValueError, match="needs an asynchronous center"):
        Simulation.of(algorithm, Quadratic(), torch.zeros(1), num_replicas=2, synchronous=True, lr=0.1)


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13])
def test_it_goes_on_from_its_state_to_the_last_bit(at):
    """With one replica, so that it may decide alone over the synchronous center of the helper."""

    def make(margin: float | None = None) -> EASGD:
        return EASGD(6, 0.2, early_exchange=True, margin=margin)

    without, restarted = interrupted(make, at, momentum=0.5, num_replicas=1)
    assert torch.equal(without, restarted)
    never, _ = interrupted(lambda: make(NEVER), at, momentum=0.5, num_replicas=1)
    assert not torch.equal(without, never)  # it did exchange early


@pytest.mark.parametrize("early", [True, False])
def test_it_may_be_switched_on_or_off_at_a_restart(early):
    before, after = EASGD(4, early_exchange=not early), EASGD(4, early_exchange=early)
    parameter = torch.nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    (replica,) = vectors([1.0])
    for algorithm in (before, after):
        algorithm.bind(optimizer, [parameter])
    center = run_synchronous([before], [replica], quadratic_steps([replica], 0.1), 6)
    after.start(replica, center.handles[0])
    after.load_state_dict(before.state_dict())
    assert after.clock == 6
    assert after.is_due == early  # it must read the center before it can do without
    assert after.state_dict().keys() == after.__class__(4, early_exchange=early).state_dict().keys()


def test_copies_decide_alike():
    algorithm = EASGD(100, 0.4, early_exchange=True, margin=0.0)
    other = pickle.loads(pickle.dumps(copy.deepcopy(algorithm)))
    assert exchanges(algorithm, lr=0.1) == exchanges(other, lr=0.1) != [0]


def test_the_rate_is_the_optimizers_as_it_is():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.3}])
    equilibrium = Equilibrium()
    equilibrium.bind(optimizer)
    assert equilibrium.margin_in_force() == 0.3
    optimizer.param_groups[1]["lr"] = torch.tensor(0.25)
    assert equilibrium.margin_in_force() == 0.25
    assert Equilibrium(0.5).margin_in_force() == 0.5


def test_a_margin_is_bound_or_given():
    replica = vectors([0.0])[0]
    handle = SynchronousCenter(replica.read(), 1).handles[0]
    with pytest.raises(
        ValueError, match=re.escape("EASGD(margin=None): call bind(optimizer, parameters) before start")
    ):
        EASGD(early_exchange=True).start(replica, handle)
    EASGD(early_exchange=True, margin=0.1).start(replica, handle)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=re.escape("EASGD(margin=None): SGD has a parameter group without 'lr'")):
        EASGD(early_exchange=True).bind(optimizer, [parameter])
    EASGD(early_exchange=True, margin=0.1).bind(optimizer, [parameter])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"early_exchange": True, "order": "gauss_seidel"}, "EASGD(early_exchange=True, order='gauss_seidel'): order"),
        ({"margin": 0.1}, "EASGD(early_exchange=False, margin=0.1): margin must be a number and goes"),
        (
            {"early_exchange": True, "margin": math.nan},
            "EASGD(early_exchange=True, margin=nan): margin must be a number",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        EASGD(**arguments)


def test_it_shows_in_hyperparameters_and_repr():
    algorithm = EASGD(3, 0.1, early_exchange=True, margin=0.5)
    assert repr(eval(repr(algorithm), {"EASGD": EASGD})) == repr(algorithm)
    assert algorithm.hyperparameters(2) == {
        **EASGD(3, 0.1).hyperparameters(2),
        "early_exchange": True,
        "margin": 0.5,
    }


def test_who_starts_anew_reads_the_center_first():
    """As after a reset: what it knew of the center is of another vector, maybe."""
    algorithm = EASGD(4, 0.1, early_exchange=True, margin=NEVER)
    (replica,) = vectors([1.0])
    center = run_synchronous([algorithm], [replica], quadratic_steps([replica], 0.1), 2)
    assert not algorithm.is_due
    algorithm.start(replica, center.handles[0])
    assert algorithm.is_due
