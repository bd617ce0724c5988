"""Averages of the center against their recursions, and what they are for: the variance of a Polyak average."""

import copy
import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_easgd.algorithms import EASGD, Downpour
from lightning_easgd.averages import CenterAverage, MovingAverage, PolyakAverage, TailAverage
from lightning_easgd.simulation import LockStep, Quadratic, Simulation

F64 = torch.float64
CENTERS = torch.randn(40, 7, dtype=F64, generator=torch.Generator().manual_seed(0))
ALL = [PolyakAverage(), MovingAverage(0.1), TailAverage(39, 0.25)]

each = pytest.mark.parametrize("average", ALL, ids=repr)


def feed(average: CenterAverage, centers: Tensor, clocks: range) -> Tensor:
    average = copy.deepcopy(average)
    for center, clock in zip(centers, clocks, strict=True):
        average.update(center, clock)
    return average.value


def recursion(rate: Callable[[int], float], centers: Tensor) -> Tensor:
    """z_{t+1} = (1 - a_{t+1}) z_t + a_{t+1} c_t from z_0 = c_0, as the paper has it."""
    z = centers[0]
    for t, c in enumerate(centers):
        z = (1 - rate(t + 1)) * z + rate(t + 1) * c
    return z


def test_polyak_is_the_papers_recursion_and_the_mean():
    value = feed(PolyakAverage(), CENTERS, range(40))
    torch.testing.assert_close(value, recursion(lambda t: 1 / t, CENTERS), rtol=0, atol=1e-14)
    torch.testing.assert_close(value, CENTERS.mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rate", [0.001, 0.3])
def test_a_constant_rate_is_the_papers_recursion(rate):
    value = feed(MovingAverage(rate), CENTERS, range(40))
    torch.testing.assert_close(value, recursion(lambda t: rate, CENTERS), rtol=0, atol=1e-14)


def test_the_papers_rate_is_the_default():
    assert MovingAverage().rate == 0.001


@pytest.mark.parametrize(
    ("total", "fraction", "length"), [(39, 0.25, 10), (39, 1.0, 40), (39, 0.001, 1), (30, 0.1, 13)]
)
def test_the_tail_is_a_mean_of_its_own(total, fraction, length):
    value = feed(TailAverage(total, fraction), CENTERS, range(40))
    torch.testing.assert_close(value, CENTERS[-length:].mean(0), rtol=0, atol=1e-14)


def test_before_the_tail_the_newest_center_counts():
    assert torch.equal(feed(TailAverage(39, 0.25), CENTERS[:30], range(30)), CENTERS[29])
    assert not torch.equal(feed(TailAverage(39, 0.25), CENTERS[:32], range(32)), CENTERS[31])


@pytest.mark.parametrize("num_additions", [10, 100, 1000, 12345])
@pytest.mark.parametrize("percent", [10, 20, 30, 60, 70, 90])
def test_the_tail_has_the_length_that_was_asked_for(num_additions, percent):
    average = TailAverage(num_additions, percent / 100)
    first = -(-num_additions * (100 - percent) // 100)  # exact
    average.update(torch.zeros(1), 0)
    average.update(torch.ones(1), first)
    assert float(average.value) == 1  # nothing of the past
    average.update(torch.full((1,), 3.0), first + 1)
    assert float(average.value) == 2


@each
@pytest.mark.parametrize("stride", [2, 3, 13])
def test_a_center_stands_for_the_additions_that_were_not_seen(average, stride):
    # The same as to see each center as often as there were additions since the last.
    clocks = range(0, 40, stride)
    repeated = CENTERS[[stride * math.ceil(t / stride) for t in range(clocks[-1] + 1)]]
    value = feed(average, CENTERS[::stride], clocks)
    torch.testing.assert_close(value, feed(average, repeated, range(len(repeated))), rtol=0, atol=1e-14)


def test_an_average_that_begins_late_knows_nothing_of_before():
    value = feed(PolyakAverage(), CENTERS[20:], range(1020, 1040))
    torch.testing.assert_close(value, CENTERS[20:].mean(0), rtol=0, atol=1e-14)


@each
def test_a_clock_that_stands_changes_nothing(average):
    average = copy.deepcopy(average)
    for t in range(35):
        average.update(CENTERS[t], t)
    before = average.value.clone()
    average.update(CENTERS[3], 34)
    assert torch.equal(average.value, before)


@each
def test_a_constant_center_is_its_own_average(average):
    assert torch.equal(feed(average, CENTERS[:1].expand(40, 7), range(40)), CENTERS[0])


@each
def test_the_center_is_neither_kept_nor_written(average):
    average, center = copy.deepcopy(average), CENTERS[0].clone()
    average.update(center, 0)
    center.fill_(9)
    assert torch.equal(average.value, CENTERS[0])
    average.update(center, 1)
    assert torch.equal(center, torch.full((7,), 9.0, dtype=F64))


@pytest.mark.parametrize(
    ("center", "given", "kept"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (F64, None, F64),
        (torch.float32, F64, F64),
        (F64, torch.float32, torch.float32),
    ],
)
def test_precision(center, given, kept):
    average = PolyakAverage(given)
    for t in range(3):
        average.update(torch.tensor([256.0 + 2 * t], dtype=center), t)
    assert average.value.dtype == kept
    assert float(average.value) == pytest.approx(258)


def test_float64_resolves_what_float32_does_not():
    # The 2^26th center moves the mean by far less than float32 resolves.
    for dtype, moves in ((torch.float32, False), (F64, True)):
        average = PolyakAverage(dtype)
        average.load_state_dict({"clock": 2**26 - 2, "value": torch.ones(1, dtype=dtype), "first": 0})
        average.update(torch.full((1,), 2.0), 2**26 - 1)
        assert (float(average.value) == 1 + 2**-26) == moves


@each
@pytest.mark.parametrize("at", [0, 1, 17, 33])
def test_it_goes_on_from_its_state_to_the_last_bit(average, at):
    whole, first, second = (copy.deepcopy(average) for _ in range(3))
    for t in range(40):
        whole.update(CENTERS[t], 3 * t)
        if t < at:
            first.update(CENTERS[t], 3 * t)
        if t == at:
            state = pickle.loads(pickle.dumps(first.state_dict()))
            second.load_state_dict(state)
            first.update(CENTERS[t], 3 * t)  # goes on by itself
        if t >= at:
            second.update(CENTERS[t], 3 * t)
    assert torch.equal(second.value, whole.value)
    assert second.clock == whole.clock == 117


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_copies_are_independent(average, copied):
    original = copy.deepcopy(average)
    original.update(CENTERS[0], 0)
    other = copied(original)
    other.update(CENTERS[1], 35)
    assert torch.equal(original.value, CENTERS[0])
    assert (original.clock, other.clock) == (0, 35)
    assert not torch.equal(other.value, CENTERS[0])


def test_errors():
    average = PolyakAverage()
    with pytest.raises(RuntimeError, match="PolyakAverage.value: there is no average before the first update"):
        average.value  # noqa: B018
    with pytest.raises(ValueError, match=re.escape("PolyakAverage.update(clock=-1): must not be below 0")):
        average.update(torch.zeros(2), -1)
    average.update(torch.zeros(2), 5)
    with pytest.raises(ValueError, match=re.escape("PolyakAverage.update(clock=4): must not be below 5")):
        average.update(torch.zeros(2), 4)
    with pytest.raises(ValueError, match=re.escape("<center of shape (3,)>): must be (2,)")):
        average.update(torch.zeros(3), 6)
    assert average.clock == 5
    for rate in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"MovingAverage(rate={rate!r}): must be above 0 and below 1")):
            MovingAverage(rate)
    for num in (0, 1.5, True):
        with pytest.raises(ValueError, match=re.escape(f"TailAverage(num_additions={num!r}): must be an integer >= 1")):
            TailAverage(num)
    for fraction in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"(fraction={fraction!r}): must be above 0 and at most 1")):
            TailAverage(10, fraction)
    with pytest.raises(ValueError, match=re.escape("MovingAverage(dtype=torch.int64): must be a floating point type")):
        MovingAverage(dtype=torch.int64)


def test_repr_is_the_constructor_call():
    for average in (*ALL, PolyakAverage(F64), MovingAverage(0.5, F64), TailAverage(3, 0.1, F64)):
        again = eval(repr(average), {"torch": torch, **{type(a).__name__: type(a) for a in ALL}})
        assert vars(again) == vars(average)


# --- through the simulation -------------------------------------------------------------------------------------------


def test_the_average_of_an_asynchronous_center_is_of_every_addition():
    average, seen = PolyakAverage(), []

    def observe(event) -> None:
        if event.kind == "add":
            seen.append(simulation.center.value.clone())
            average.update(seen[-1], event.clock)

    simulation = Simulation.of(
        Downpour(2), Quadratic(noise=1.0), torch.linspace(-1, 1, 5, dtype=F64), num_replicas=3, lr=0.1,
        synchronous=False, compute_time=lambda random: random.expovariate(1.0), observe=observe,
    )  # fmt: skip
    seen.append(simulation.center.value.clone())
    average.update(seen[0], 0)  # ADOWNPOUR
    simulation.run(40)
    assert len(seen) == 1 + 3 * 20
    torch.testing.assert_close(average.value, torch.stack(seen).mean(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("eta", "center_rate", "curvature"), [(0.1, 0.9, 1.0), (0.4, 0.5, 1.0), (0.1, 0.9, 2.0)])
@pytest.mark.parametrize("make", [PolyakAverage, lambda: TailAverage(4 * 1000, 0.75)], ids=["polyak", "tail"])
def test_the_average_of_the_center_is_statistically_optimal(make, eta, center_rate, curvature):
    """T6: T Var[z_T] tends to sigma^2 / (p h^2), whatever eta and the rates."""
    p, num_runs, average = 4, 4000, make()
    run = LockStep(
        EASGD(1, center_rate=center_rate), Quadratic(curvature, 1.0), torch.zeros(num_runs, dtype=F64), num_replicas=p,
        lr=eta,
    )  # fmt: skip
    average.update(run.center, run.clock)
    run.run(1000, observe=lambda t: average.update(run.center, run.clock))
    length = 1000 if isinstance(average, PolyakAverage) else 750
    # The variance of 4000 runs has a sampling error of 2.2 %; T is short of infinity by some 2 %.
    assert length * float(average.value.var()) == pytest.approx(1 / (p * curvature**2), rel=0.08)
    assert float(run.center.var()) > 5 / (length * p * curvature**2)  # the center itself stays noisy
