"""EASGD's arguments, checks, clock and state. Its arithmetic is in test_easgd_theory.py."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from lightning_easgd.algorithms import EASGD, Algorithm, displacement_, stable_step_sizes
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.simulation import SynchronousCenter
from tests.in_process import interrupted, quadratic_steps, run_synchronous, vectors


@pytest.mark.parametrize("period", [0, -1, 2.5, True, "10", None])
def test_period_must_be_a_positive_integer(period):
    text = f"EASGD(period={period!r}): period must be an integer >= 1, in optimizer steps"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        EASGD(period=period)


@pytest.mark.parametrize("name", ["moving_rate", "center_rate"])
@pytest.mark.parametrize("rate", [float("nan"), float("inf"), float("-inf")])
def test_rates_must_be_finite(name, rate):
    text = f"EASGD({name}={rate!r}): {name} must be a finite number or None"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        EASGD(**{name: rate})


def test_defaults():
    algorithm = EASGD()
    assert isinstance(algorithm, Algorithm)
    assert algorithm.period == 10
    assert algorithm.clock == 0
    for p in (1, 2, 3, 4, 7, 16):
        assert algorithm.rates(p) == (min(0.9 / p, 0.1), 0.9)
        assert EASGD(center_rate=0.9).rates(p) == (0.9 / p, 0.9)  # the paper's
        assert EASGD(order="gauss_seidel").rates(p) == (0.9 / p, 0.9)


@pytest.mark.parametrize(
    ("algorithm", "num_replicas", "drift"),
    [
        (EASGD(4, center_rate=0.9), 2, 2 / 3),  # the paper's rates: p / (p + 1)
        (EASGD(4, center_rate=0.9), 4, 4 / 5),
        (EASGD(4, moving_rate=0.05), 7, 7 / 8),
        (EASGD(4), 2, 0.9),
        (EASGD(4), 4, 0.9),
        (EASGD(4), 16, 16 / 17),
        (EASGD(4, moving_rate=0.3, center_rate=0.5), 3, 0.5 / 0.8),
    ],
    ids=repr,
)
def test_what_is_left_of_a_common_drift(algorithm, num_replicas, drift):
    """Where all replicas move by d a period, they and the center come to move by beta / (alpha + beta) d."""
    replicas = vectors([0.0] * num_replicas)
    center = SynchronousCenter(replicas[0].read(), num_replicas)
    algorithms = [copy.deepcopy(algorithm) for _ in replicas]
    updates = [lambda r=r: r.add_(torch.ones_like(r.read()), alpha=1 / 4) for r in replicas]
    run_synchronous(algorithms, replicas, updates, 400, center=center)
    before = [center.value.clone(), *(r.read().clone() for r in replicas)]
    run_synchronous(algorithms, replicas, updates, 4, center=center)
    for now, then in zip([center.value, *(r.read() for r in replicas)], before, strict=True):
        torch.testing.assert_close(now - then, torch.full_like(then, drift), rtol=1e-10, atol=0)


def test_each_rate_follows_from_the_other():
    assert EASGD(moving_rate=0.1).rates(4) == (0.1, 0.4)
    assert EASGD(center_rate=0.5).rates(4) == (0.125, 0.5)
    assert EASGD(moving_rate=0.1, center_rate=0.5).rates(4) == (0.1, 0.5)
    assert EASGD(moving_rate=0.0).rates(4) == (0.0, 0.0)
    assert EASGD(center_rate=0.0).rates(4) == (0.0, 0.0)


def test_repr_is_the_constructor_call():
    for algorithm in (
        EASGD(),
        EASGD(3, 0.1),
        EASGD(period=1, moving_rate=-0.9, center_rate=1.0),
        EASGD(center_rate=0.5, order="gauss_seidel"),
    ):
        again = eval(repr(algorithm), {"EASGD": EASGD})
        assert (again.period, again.moving_rate, again.center_rate, again.order) == (
            algorithm.period,
            algorithm.moving_rate,
            algorithm.center_rate,
            algorithm.order,
        )


@pytest.mark.parametrize("num_replicas", [1, 2, 4, 16])
def test_check_accepts_the_defaults(num_replicas):
    EASGD().check(num_replicas)
    EASGD(period=1).check(num_replicas)
    EASGD(moving_rate=0.0).check(num_replicas)
    EASGD(moving_rate=0.99 / num_replicas).check(num_replicas)


@pytest.mark.parametrize(("moving_rate", "num_replicas"), [(0.41, 4), (0.5, 4), (1.01, 1), (0.2, 16), (3.0, 2)])
def test_check_refuses_rates_that_no_step_size_makes_stable(moving_rate, num_replicas):
    with pytest.raises(ValueError, match="no step size is stable") as raised:
        EASGD(moving_rate=moving_rate).check(num_replicas)
    assert str(raised.value) == (
        f"EASGD(period=10, moving_rate={moving_rate}, center_rate=None) with {num_replicas} replicas: no step size is "
        f"stable with a moving rate of {moving_rate:g} and a center rate of {num_replicas * moving_rate:g}; a moving "
        f"rate above 0 and below 2 / (num_replicas + 1) = {2 / (num_replicas + 1):g} can be, "
        f"{min(0.9 / num_replicas, 0.1):g} is the default"
    )


# 2 / (p + 1) itself is the edge; with some of these p rounding puts it a little inside.
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4, 5, 6, 7, 13, 15, 64])
def test_check_refuses_the_edge(num_replicas):
    with pytest.raises(ValueError, match=re.escape("below 2 / (num_replicas + 1)")):
        EASGD(moving_rate=2 / (num_replicas + 1)).check(num_replicas)


@pytest.mark.parametrize("moving_rate", [-0.1, -1e-6])
def test_check_refuses_negative_moving_rates_alone(moving_rate):
    with pytest.raises(ValueError, match="a moving rate above 0"):
        EASGD(moving_rate=moving_rate).check(4)


def test_check_warns_beyond_the_papers_range():
    text = (
        "EASGD(period=10, moving_rate=0.3, center_rate=None) with 4 replicas: a center rate of 1.2 is beyond the "
        "paper's range (0 to 1): the center overshoots the mean of the replicas and amplifies their noise; 0.9 is the "
        "default"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        EASGD(moving_rate=0.3).check(4)
    with pytest.warns(UserWarning, match=re.escape("a center rate of 1.5 is beyond")):
        EASGD(center_rate=1.5).check(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EASGD(center_rate=1.0).check(4)


def test_start_checks():
    replica = vectors([0.0])[0]
    center = SynchronousCenter(replica.read(), 4)
    with pytest.raises(ValueError, match="no step size is stable"):
        EASGD(moving_rate=0.5).start(replica, center.handles[0])
    EASGD().start(replica, center.handles[0])
    assert center.pulls == [0, 0, 0, 0]


def test_hyperparameters_are_the_rates_in_force():
    assert EASGD().hyperparameters(4) == {
        "algorithm": "EASGD",
        "period": 10,
        "moving_rate": 0.1,
        "center_rate": 0.9,
    }
    values = EASGD(period=2, moving_rate=0.25).hyperparameters(2)
    assert values == {"algorithm": "EASGD", "period": 2, "moving_rate": 0.25, "center_rate": 0.5}
    assert all(type(v) in (str, int, float) for v in values.values())


@pytest.mark.parametrize("period", [1, 2, 5])
def test_is_due_on_the_first_step_and_every_period_after(period):
    algorithm, replica = EASGD(period=period), vectors([1.0])[0]
    center = SynchronousCenter(replica.read(), 1)
    due = []
    for _ in range(3 * period + 1):
        due.append(algorithm.is_due)
        pulls = center.pulls[0]
        algorithm.step(replica, center.handles[0], lambda: None)
        assert center.pulls[0] - pulls == due[-1]
    assert due == [t % period == 0 for t in range(3 * period + 1)]
    assert algorithm.clock == 3 * period + 1
    assert center.clock == 4


def test_state_dict_round_trip_keeps_the_rhythm():
    values = [1.0, -2.0, 4.0]
    whole, halves = vectors(values), vectors(values)
    whole_center = run_synchronous(
        [EASGD(period=4, moving_rate=0.2) for _ in values], whole, quadratic_steps(whole, 0.1), 11
    )

    first = [EASGD(period=4, moving_rate=0.2) for _ in values]
    center = run_synchronous(first, halves, quadratic_steps(halves, 0.1), 6)
    states = [pickle.loads(pickle.dumps(a.state_dict())) for a in first]
    assert states == [{"clock": 6}] * 3
    second = [EASGD(period=4, moving_rate=0.2) for _ in values]
    for algorithm, state in zip(second, states, strict=True):
        algorithm.load_state_dict(state)
    assert [a.clock for a in second] == [6] * 3
    run_synchronous(second, halves, quadratic_steps(halves, 0.1), 5, center=center)

    assert torch.equal(center.value, whole_center.value)
    for a, b in zip(halves, whole, strict=True):
        assert torch.equal(a.read(), b.read())


@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("at", [3, 4, 5])
def test_it_goes_on_from_its_state_to_the_last_bit(at, order):
    assert torch.equal(*interrupted(lambda: EASGD(3, 0.2, order=order), at))


@pytest.mark.parametrize("orders", [("jacobi", "gauss_seidel"), ("gauss_seidel", "jacobi")])
def test_the_order_may_be_another_at_a_restart(orders):
    """The clock is kept, and nothing of the other order: the first step reads the center as it is."""
    before, after, fresh = (EASGD(3, 0.2, order=order) for order in (*orders, orders[1]))
    (replica,) = vectors([1.0])
    center = run_synchronous([before], [replica], quadratic_steps([replica], 0.1), 3)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == {"clock": 3}
    fresh.clock = 3
    ends = []
    for algorithm in (after, fresh):
        (x,) = vectors([float(replica.read())])
        own = SynchronousCenter(center.value, 1)
        run_synchronous([algorithm], [x], quadratic_steps([x], 0.1), 4, center=own, start=False)
        ends.append((x.read(), own.value))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])
def test_copies_are_independent(copied):
    original, replica = EASGD(period=2, moving_rate=0.3), vectors([1.0])[0]
    center = SynchronousCenter(torch.zeros(1, dtype=torch.float64), 1)
    original.step(replica, center.handles[0], lambda: None)
    other = copied(original)
    assert (other.clock, other.period, other.moving_rate) == (1, 2, 0.3)
    for _ in range(3):
        other.step(replica, center.handles[0], lambda: None)
    assert (original.clock, other.clock) == (1, 4)
    assert EASGD().clock == 0


def test_the_force_that_is_kept_is_a_buffer_and_not_a_memory():
    algorithm = EASGD(period=1, moving_rate=0.25)
    for value in (1.0, 3.0):
        replica = vectors([value], num_runs=5)[0]
        center = SynchronousCenter(torch.zeros(5, dtype=torch.float64), 1)
        algorithm.step(replica, center.handles[0], lambda: None)
        assert torch.equal(replica.read(), torch.full((5,), 0.75 * value, dtype=torch.float64))


def test_the_displacement_leaves_the_center():
    x = torch.tensor([1.0, 2.0, -3.0])
    c = torch.tensor([0.5, 2.0, 1.0])
    center = c.clone()
    displacement_(x, center)
    assert x.tolist() == [0.5, 0.0, -4.0]
    assert torch.equal(center, c)


def test_the_displacement_of_half_precision_is_in_the_centers_precision():
    x = ParameterVector([torch.tensor([1.0, 1.0], dtype=torch.bfloat16)]).read()
    displacement_(x, torch.tensor([1.0 - 2**-20, 1.0 + 2**-20]))
    assert x.dtype == torch.float32
    assert x.tolist() == [2**-20, -(2**-20)]  # far below what bfloat16 resolves near 1


def test_stable_step_sizes_of_special_rates():
    assert stable_step_sizes(4, 0.0, 0.0) == (0.0, 2.0)
    assert stable_step_sizes(4, 0.0, 0.9) == pytest.approx((0.0, 2.0))
    assert stable_step_sizes(4, 0.5, 2.0) is None
    assert stable_step_sizes(4, -0.1, -0.4) is None
    assert stable_step_sizes(4, 0.1, 0.0) == pytest.approx((0.0, 1.9))  # replicas tied to a center at rest
    # Heavy ball: e < 2 (1 + m).
    assert stable_step_sizes(1, -0.9, 1.0) == pytest.approx((0.0, 3.8))
    # Differences between replicas, which one replica does not have, grow unless -alpha < e < 2 - alpha.
    assert stable_step_sizes(2, -0.4, 0.9) == pytest.approx((0.4, 2.4))
    assert stable_step_sizes(1, -0.4, 0.9) == pytest.approx((0.0, 3 / 1.1))


def test_check_warns_where_only_large_steps_are_stable():
    with pytest.warns(UserWarning, match="learning rate times curvature is between 0.4 and 2.4"):
        EASGD(1, -0.4, 0.9).check(2)


@pytest.mark.parametrize("rate", ["0.1", True])
def test_rates_that_are_no_numbers_are_refused(rate):
    with pytest.raises(ValueError, match="moving_rate must be a finite number or None"):
        EASGD(moving_rate=rate)
