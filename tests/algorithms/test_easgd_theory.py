"""EASGD against closed forms, all through the public class, the simulation's center and float64.

The objective is h x^2 / 2 with gradient noise of standard deviation sigma: g = h x - sigma xi. In the formulas
e = eta h, a = e + (p + 1) alpha, k = e p alpha.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_easgd.algorithms import EASGD, stable_step_sizes
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.simulation import SynchronousCenter
from tests.in_process import quadratic_steps, run_synchronous, vectors

F64 = torch.float64


def modes(p: int, e: float, alpha: float) -> tuple[float, float, float, float]:
    """Returns gamma and phi, the two eigenvalues of mean replica and center, then a and k."""
    a, k = e + (p + 1) * alpha, e * p * alpha
    root = math.sqrt(a * a - 4 * k)
    return 1 - (a - root) / 2, 1 - (a + root) / 2, a, k


# --- the linear map of a period ---------------------------------------------------------------------------------------


def linear_map(
    num_replicas: int, e: float, moving_rate: float, center_rate: float | None = None, period: int = 1
) -> Tensor:
    """Returns what ``period`` public steps do to (x^1, ..., x^p, c) on the noiseless quadratic, (p + 1, p + 1).

    Coordinate j of all vectors belongs to a run that begins with unit vector j, so one call gives all columns.
    """
    p = num_replicas
    unit = torch.eye(p + 1, dtype=F64)
    replicas = [ParameterVector([unit[i].clone()]) for i in range(p)]
    center = run_synchronous(
        [EASGD(period, moving_rate, center_rate) for _ in range(p)],
        replicas,
        quadratic_steps(replicas, e),
        period,
        center=SynchronousCenter(unit[p], p),
        start=False,  # also of interest where check refuses
    )
    return torch.stack([*(r.read() for r in replicas), center.value])


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


def gauss_seidel_map(p: int, e: float, alpha: float, beta: float) -> Tensor:
    """Returns what one public step in Gauss-Seidel order does to (x^1, ..., x^p, c), as ``linear_map`` does."""
    unit = torch.eye(p + 1, dtype=F64)
    replicas = [ParameterVector([unit[i].clone()]) for i in range(p)]
    center = run_synchronous(
        [EASGD(1, alpha, beta, order="gauss_seidel") for _ in range(p)],
        replicas,
        quadratic_steps(replicas, e),
        1,
        center=SynchronousCenter(unit[p], p),
        start=False,
    )
    return torch.stack([*(r.read() for r in replicas), center.value])


def test_gauss_seidel_order_is_its_pair_matrix():
    p, e, alpha, beta = 3, 0.1, 0.3, 0.8
    full = gauss_seidel_map(p, e, alpha, beta)
    mean = torch.zeros(2, p + 1, dtype=F64)
    mean[0, :p], mean[1, p] = 1 / p, 1
    q, a = (1 - e) * (1 - alpha), (1 - e) * alpha
    pair = torch.tensor([[q, a], [beta * q, 1 - beta + beta * a]], dtype=F64)
    torch.testing.assert_close(mean @ full, pair @ mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [-0.2, 0.0, 0.3, 1.0, 1.4])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 1.9, 4.0])
@pytest.mark.parametrize("p", [1, 4])
def test_stable_step_sizes_in_gauss_seidel_order(p, alpha, beta):
    def rho(e: float) -> float:
        full = gauss_seidel_map(p, e, alpha, beta)
        return radius(full[:p, :p] if beta == 0 else full)  # a center that never moves has the eigenvalue 1

    interval = stable_step_sizes(p, alpha, beta, "gauss_seidel")
    if interval is None:
        assert all(rho(e) >= 1 - 1e-9 for e in (1e-3, 1e-2, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0))
        return
    low, high = interval
    assert all(rho(low + f * (min(high, 50) - low)) < 1 for f in (0.01, 0.3, 0.7, 0.99))
    if high < math.inf:
        assert rho(high + 0.01 * (high - low)) > 1
    if low > 0 or beta > 0:  # a center that never moves holds replicas on a negative curvature, too
        assert rho(low - 0.01 * (min(high, 50) - low)) > 1


def test_linear_map_is_equations_5_and_6():
    p, e, alpha = 3, 0.1, 0.2
    expected = torch.diag(torch.tensor([1 - e - alpha] * p + [1 - p * alpha], dtype=F64))
    expected[:p, p] = expected[p, :p] = alpha
    torch.testing.assert_close(linear_map(p, e, alpha), expected, rtol=0, atol=1e-15)


def test_linear_map_of_rates_given_apart():
    p, e, alpha, beta = 3, 0.1, -0.05, 0.6
    expected = torch.diag(torch.tensor([1 - e - alpha] * p + [1 - beta], dtype=F64))
    expected[:p, p] = alpha
    expected[p, :p] = beta / p
    torch.testing.assert_close(linear_map(p, e, alpha, beta), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("e", [0.1, 0.7])
@pytest.mark.parametrize("period", [1, 2, 4, 16])
def test_map_of_a_period(period, e):
    p, alpha = 4, 0.225
    q = (1 - e) ** (period - 1)
    full = linear_map(p, e, alpha, period=period)
    mean = torch.zeros(2, p + 1, dtype=F64)  # (x, c) -> (mean x, c)
    mean[0, :p], mean[1, p] = 1 / p, 1
    pair = torch.tensor([[q * (1 - e - alpha), q * alpha], [p * alpha, 1 - p * alpha]], dtype=F64)
    torch.testing.assert_close(mean @ full, pair @ mean, rtol=0, atol=1e-14)
    spread = torch.zeros(p + 1, dtype=F64)
    spread[0], spread[1] = 1, -1
    torch.testing.assert_close(full @ spread, q * (1 - e - alpha) * spread, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("period", "per_step"), [(1, 0.92150), (4, 0.92351), (16, 0.93209), (64, 0.96505)])
def test_rate_of_convergence_by_period(period, per_step):
    assert radius(linear_map(4, 0.1, 0.225, period=period)) ** (1 / period) == pytest.approx(per_step, abs=1e-5)


def test_eigenvalues_are_gamma_phi_and_the_spread():
    p, e, alpha = 4, 0.1, 0.225
    gamma, phi, _, _ = modes(p, e, alpha)
    expected = torch.tensor(sorted([gamma, phi] + [1 - e - alpha] * (p - 1)), dtype=F64)
    torch.testing.assert_close(
        torch.linalg.eigvals(linear_map(p, e, alpha)).real.sort().values, expected, rtol=0, atol=1e-12
    )


# --- stability --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_replicas", "e", "edge"), [(4, 0.1, 0.395833), (4, 1.0, 0.333333), (1, 1.0, 0.666667), (16, 0.1, 0.117284)]
)
def test_stability_edge_by_bisection(num_replicas, e, edge):
    low, high = 0.01, 1.5
    assert radius(linear_map(num_replicas, e, low)) < 1 < radius(linear_map(num_replicas, e, high))
    while high - low > 1e-7:
        middle = (low + high) / 2
        if radius(linear_map(num_replicas, e, middle)) < 1:
            low = middle
        else:
            high = middle
    assert low == pytest.approx(edge, abs=1e-6)
    assert low == pytest.approx(2 * (2 - e) / (2 + num_replicas * (2 - e)), abs=1e-6)
    # The same edge, read along the other axis.
    assert stable_step_sizes(num_replicas, edge, num_replicas * edge)[1] == pytest.approx(e, abs=1e-4)


@pytest.mark.parametrize(("moving_rate", "grows"), [(0.3958 - 0.005, False), (0.3958 + 0.005, True)])
def test_stability_edge_by_running(moving_rate, grows):
    p, e = 4, 0.1
    replicas = vectors([1.0, 2.0, 3.0, -1.0])
    center = run_synchronous(
        [EASGD(1, moving_rate) for _ in range(p)],
        replicas,
        quadratic_steps(replicas, e),
        600,
        center=SynchronousCenter(torch.full((1,), 5.0, dtype=F64), p),
        start=False,
    )
    assert (abs(float(center.value)) > 1e3) == grows
    assert (abs(float(center.value)) < 0.1) != grows


def _rate_grid() -> list[tuple[int, float, float]]:
    grid = []
    for p in (1, 2, 4, 16):
        grid += [(p, alpha, p * alpha) for alpha in (0.01, 0.5 / p, 0.9 / p, 1.5 / p, 2.1 / p, -0.1)]
    for p in (1, 2, 5):
        grid += [
            (p, alpha, beta)
            for alpha in (-0.9, -0.4, -0.05, 0.0, 0.1, 0.7, 1.3)
            for beta in (-0.2, 0.3, 0.9, 1.0, 1.7, 2.0, 2.3)
        ]
    return grid


@pytest.mark.parametrize(("num_replicas", "moving_rate", "center_rate"), _rate_grid())
def test_stable_step_sizes_agree_with_the_spectral_radius(num_replicas, moving_rate, center_rate):
    def rho(e: float) -> float:
        return radius(linear_map(num_replicas, e, moving_rate, center_rate))

    interval = stable_step_sizes(num_replicas, moving_rate, center_rate)
    if interval is None:
        assert all(rho(e) >= 1 - 1e-9 for e in (1e-3, 1e-2, 0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0))
        return
    low, high = interval
    assert 0 <= low < high < math.inf
    for fraction in (0.01, 0.3, 0.5, 0.7, 0.99):
        assert rho(low + fraction * (high - low)) < 1
    for fraction in (0.01, 0.1, 1.0):
        assert rho(high + fraction * (high - low)) > 1
        assert rho(low - fraction * (high - low)) > 1  # at low = 0: a negative curvature


# --- trajectory and noise ---------------------------------------------------------------------------------------------

START, CENTER_START = (1.0, 2.0, 3.0, -1.0), 5.0
P, E, ALPHA = 4, 0.1, 0.225


def mean_center(t: int) -> float:
    """T1: E[c_t]."""
    gamma, phi, _, _ = modes(P, E, ALPHA)
    u0 = sum(x - ALPHA / (1 - P * ALPHA - phi) * CENTER_START for x in START)
    return gamma**t * CENTER_START + (gamma**t - phi**t) / (gamma - phi) * ALPHA * u0


def variance_center(t: int) -> float:
    """T1: Var[c_t] with sigma = h = 1."""
    g, f, _, _ = modes(P, E, ALPHA)
    bracket = (
        (g**2 - g ** (2 * t)) / (1 - g**2)
        + (f**2 - f ** (2 * t)) / (1 - f**2)
        - 2 * (g * f - (g * f) ** t) / (1 - g * f)
    )
    return (P * ALPHA * E) ** 2 / (g - f) ** 2 * bracket / P


def trajectory(num_steps: int, num_runs: int, noise: float) -> dict[int, Tensor]:
    replicas = vectors(START, num_runs)
    centers: dict[int, Tensor] = {}
    run_synchronous(
        [EASGD(1, ALPHA) for _ in START],
        replicas,
        quadratic_steps(replicas, E, noise=noise),
        num_steps,
        center=SynchronousCenter(torch.full((num_runs,), CENTER_START, dtype=F64), P),
        observe=lambda t, c: centers.update({t: c.clone()}),
    )
    return centers


def test_mean_trajectory():
    centers = trajectory(60, 1, noise=0.0)
    for t, center in centers.items():
        assert float(center) == pytest.approx(mean_center(t), abs=1e-10)
    for t, value in ((1, 1.625), (2, 1.93438), (5, 1.46657), (20, 0.43032)):
        assert float(centers[t]) == pytest.approx(value, abs=1e-5)


def test_noise_reaches_the_center_one_step_late_and_then_as_predicted():
    centers = trajectory(20, 100_000, noise=1.0)
    assert bool((centers[1] == centers[1][0]).all())  # Var[c_1] = 0, exactly
    assert float(centers[1][0]) == pytest.approx(1.625, abs=1e-14)
    # The relative sampling error of a variance is sqrt(2 / runs) = 0.45 %.
    for t, value in ((2, 0.002025), (5, 0.005259), (20, 0.010009)):
        assert variance_center(t) == pytest.approx(value, abs=1e-6)
        assert float(centers[t].var()) == pytest.approx(value, rel=0.02)
        assert float(centers[t].mean()) == pytest.approx(mean_center(t), abs=4 * math.sqrt(value / 100_000))


def stationary_variances(
    p: int, eta: float, beta: float, h: float, variance: float, *, period: int, num_runs: int, num_samples: int
) -> tuple[float, float]:
    """Returns the variances of center and replica 0, over runs and over samples far apart in time.

    A sample is taken after whole periods; those 15 steps apart have correlation 0.3, and their squares 0.09.
    """
    replicas = vectors([0.0] * p, num_runs)
    squares: list[tuple[float, float]] = []

    def observe(t: int, center: Tensor) -> None:
        if t >= 112 and t % 16 == 0:
            squares.append((float(center.square().mean()), float(replicas[0].read().square().mean())))

    run_synchronous(
        [EASGD(period, center_rate=beta) for _ in range(p)],
        replicas,
        quadratic_steps(replicas, eta, curvature=h, noise=math.sqrt(variance), seed=100),
        112 + 16 * (num_samples - 1),
        observe=observe,
    )
    assert len(squares) == num_samples
    center, replica = torch.tensor(squares, dtype=F64).mean(0).tolist()
    return center, replica


@pytest.mark.parametrize(
    ("p", "eta", "beta", "h", "variance", "value"),
    [
        (4, 0.1, 0.9, 1.0, 1.0, 0.0104558),
        (4, 0.5, 0.9, 1.0, 1.0, 0.0658245),
        (16, 0.1, 0.9, 1.0, 10.0, 0.0304321),
        (1, 0.1, 0.5, 2.0, 1.0, 0.0120321),
    ],
)
def test_asymptotic_variance_of_the_center(p, eta, beta, h, variance, value):
    alpha = beta / p
    _, _, a, k = modes(p, eta * h, alpha)
    closed = alpha * eta * variance / h * (2 - a + k) / ((4 - 2 * a + k) * (a - k))
    assert closed == pytest.approx(value, rel=1e-5)
    # 64000 nearly independent samples: a sampling error of 0.6 %.
    center, replica = stationary_variances(p, eta, beta, h, variance, period=1, num_runs=8_000, num_samples=8)
    assert center == pytest.approx(closed, rel=0.025)
    assert center < replica
    if (p, eta) == (4, 0.1):
        assert replica == pytest.approx(0.024502, rel=0.025)


@pytest.mark.parametrize(("period", "value"), [(4, 0.010777), (16, 0.010962)])
def test_asymptotic_variance_hardly_depends_on_the_period(period, value):
    center, _ = stationary_variances(4, 0.1, 0.9, 1.0, 1.0, period=period, num_runs=20_000, num_samples=6)
    assert center == pytest.approx(value, rel=0.025)


# --- identities -------------------------------------------------------------------------------------------------------


def random_state(p: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[ParameterVector], SynchronousCenter]:
    generator = torch.Generator().manual_seed(seed)
    replicas = [ParameterVector([torch.randn(d, generator=generator, dtype=dtype)]) for _ in range(p)]
    return replicas, SynchronousCenter(torch.randn(d, generator=generator, dtype=dtype), p)


def nothing() -> None:
    pass


def with_one_rate(moving_rate: float | None) -> EASGD:
    """The paper's form, beta = p alpha; with its own center rate where no moving rate is given."""
    return EASGD(1, center_rate=0.9) if moving_rate is None else EASGD(1, moving_rate)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12)])
@pytest.mark.parametrize(("p", "moving_rate"), [(1, 0.5), (2, 0.45), (3, 0.1), (4, None), (16, None)])
def test_exchange_conserves_the_sum_of_replicas_and_center(p, moving_rate, dtype, tolerance):
    replicas, center = random_state(p, 1000, dtype)

    def total() -> Tensor:
        return torch.stack([*(r.read() for r in replicas), center.value]).to(F64).sum(0)

    before, x = total(), [r.read() for r in replicas]
    run_synchronous([with_one_rate(moving_rate) for _ in range(p)], replicas, [nothing] * p, 1, center=center)
    assert float((total() - before).norm() / before.norm()) < tolerance
    assert all(not torch.equal(r.read(), old) for r, old in zip(replicas, x, strict=True))
    assert center.clock == p


def test_gradients_change_the_sum_by_themselves_alone():
    p, eta = 4, 0.1
    replicas, center = random_state(p, 50, F64)
    x = torch.stack([r.read() for r in replicas])
    before = x.sum(0) + center.value
    run_synchronous([with_one_rate(None) for _ in range(p)], replicas, quadratic_steps(replicas, eta), 1, center=center)
    after = torch.stack([r.read() for r in replicas]).sum(0) + center.value
    torch.testing.assert_close(after, before - eta * x.sum(0), rtol=0, atol=1e-13)


class _Recorded:
    """A replica that keeps what it was moved by."""

    def __init__(self, replica: ParameterVector) -> None:
        self._replica = replica
        self.moves: list[Tensor] = []

    def read(self, out: Tensor | None = None) -> Tensor:
        return self._replica.read(out)

    def add_(self, update: Tensor, *, alpha: float = 1.0) -> None:
        self.moves.append(alpha * update)
        self._replica.add_(update, alpha=alpha)

    def write_(self, value: Tensor) -> None:
        raise AssertionError("EASGD only adds to a replica")


def moves_and_pushes(p: int, moving_rate: float | None) -> tuple[list[Tensor], list[Tensor]]:
    plain, center = random_state(p, 100, F64)
    replicas = [_Recorded(r) for r in plain]
    run_synchronous([with_one_rate(moving_rate) for _ in range(p)], replicas, [nothing] * p, 1, center=center)
    assert center.clock == p  # the round is complete
    assert float(center.value.norm()) > 0
    assert all(len(r.moves) == 1 for r in replicas)
    return [r.moves[0] for r in replicas], center.pushed


# In floating point 3 * 0.1 / 3, 6 * 0.05 / 6 and 12 * 0.05 / 12 are not what was multiplied.
@pytest.mark.parametrize(
    ("p", "moving_rate"), [(1, 0.1), (4, 0.1), (3, 0.1), (6, 0.05), (12, 0.05), (3, None), (7, None), (16, None)]
)
def test_replica_and_center_get_the_same_force_to_the_last_bit(p, moving_rate):
    for move, push in zip(*moves_and_pushes(p, moving_rate), strict=True):
        assert torch.equal(move, -push)


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_nothing_moves_where_all_replicas_are_at_the_center(period, dtype):
    value = torch.randn(100, dtype=dtype, generator=torch.Generator().manual_seed(0))
    replicas = [ParameterVector([value.clone()]) for _ in range(4)]
    center = run_synchronous([EASGD(period) for _ in replicas], replicas, [nothing] * 4, 5)
    assert torch.equal(center.value, value)
    assert all(torch.equal(r.read(), value) for r in replicas)


def test_center_jumps_to_the_mean_at_center_rate_one():
    replicas, center = random_state(4, 20, F64)
    x, c = torch.stack([r.read() for r in replicas]), center.value.clone()
    run_synchronous([EASGD(1, center_rate=1.0) for _ in replicas], replicas, [nothing] * 4, 1, center=center)
    torch.testing.assert_close(center.value, x.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.stack([r.read() for r in replicas]), 0.75 * x + 0.25 * c, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rates", [(0.2, None), (0.1, 0.7)])
def test_gradient_is_taken_before_the_elastic_move_and_the_center_sees_the_old_replica(rates):
    p, period, alpha = 3, 2, rates[0]
    gain = alpha if rates[1] is None else rates[1] / p
    replicas, center = random_state(p, 5, F64)
    seen: list[list[Tensor]] = [[] for _ in range(p)]

    def make(i: int) -> Callable[[], None]:
        def local_update() -> None:
            seen[i].append(replicas[i].read())
            replicas[i].add_(torch.sin(replicas[i].read()), alpha=-0.1)

        return local_update

    updates = [make(i) for i in range(p)]
    algorithms = [EASGD(period, *rates) for _ in range(p)]
    for t in range(7):
        x, c = [r.read() for r in replicas], center.value.clone()
        run_synchronous(algorithms, replicas, updates, 1, center=center)
        for i in range(p):
            assert len(seen[i]) == t + 1, "local_update is called once a step"
            assert torch.equal(seen[i][-1], x[i]), "local_update sees the replica before the elastic move"
            expected = x[i] - 0.1 * torch.sin(x[i]) - (alpha * (x[i] - c) if t % period == 0 else 0)
            torch.testing.assert_close(replicas[i].read(), expected, rtol=0, atol=1e-14)
        moved = gain * sum(x[i] - c for i in range(p)) if t % period == 0 else 0
        torch.testing.assert_close(center.value, c + moved, rtol=0, atol=1e-14)
    assert center.clock == 4 * p
    assert center.pulls == [4] * p


def test_order_within_a_step_does_not_matter():
    outcomes = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        replicas, center = random_state(4, 20, torch.float32)
        steps = quadratic_steps(replicas, 0.1, noise=1.0)
        run_synchronous([EASGD(3) for _ in replicas], replicas, steps, 20, center=center, order=order)
        outcomes.append(torch.stack([*(r.read() for r in replicas), center.value]))
    assert torch.equal(*outcomes)


def test_a_local_update_that_raises_leaves_clock_and_replica_as_they_were():
    algorithm, (replica, *_), center = EASGD(1, 0.5), *random_state(1, 3, F64)
    x = replica.read()

    def fail() -> None:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        algorithm.step(replica, center.handles[0], fail)
    assert algorithm.clock == 0
    assert torch.equal(replica.read(), x)


# --- reductions -------------------------------------------------------------------------------------------------------


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
}


def optimizer_step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Callable[[], None]:
    """Returns one step of ``optimizer`` on a stream of random batches of its own."""
    generator = torch.Generator().manual_seed(seed)

    def step() -> None:
        inputs = torch.randn(8, 6, generator=generator)
        loss = (module(inputs) - inputs[:, :3].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("period", [1, 7])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_replica_without_elastic_force_is_the_optimizer_alone(name, period):
    alone, coupled = _mlp(), _mlp()
    alone_optimizer, coupled_optimizer = OPTIMIZERS[name](alone), OPTIMIZERS[name](coupled)
    start = ParameterVector(coupled.parameters()).read()
    step = optimizer_step(alone, alone_optimizer, seed=1)
    for _ in range(50):
        step()
    center = run_synchronous(
        [EASGD(period, moving_rate=0.0)],
        [ParameterVector(coupled.parameters())],
        [optimizer_step(coupled, coupled_optimizer, seed=1)],
        50,
    )
    for ours, theirs in zip(coupled.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    for ours, theirs in zip(coupled_optimizer.state.values(), alone_optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(center.value, start)
    assert not torch.equal(ParameterVector(coupled.parameters()).read(), start)


def test_replicas_without_elastic_force_are_independent_runs():
    p = 3
    modules = [_mlp() for _ in range(p)]
    start = ParameterVector(modules[0].parameters()).read()
    expected = []
    for i in range(p):
        module = copy.deepcopy(modules[i])
        step = optimizer_step(module, OPTIMIZERS["sgd"](module), seed=i)
        for _ in range(20):
            step()
        expected.append(ParameterVector(module.parameters()).read())
    replicas = [ParameterVector(m.parameters()) for m in modules]
    steps = [optimizer_step(m, OPTIMIZERS["sgd"](m), seed=i) for i, m in enumerate(modules)]
    values: list[Tensor] = []
    run_synchronous(
        [EASGD(2, moving_rate=0.0) for _ in range(p)],
        replicas,
        steps,
        20,
        observe=lambda _, c: values.append(c.clone()),
    )
    for replica, alone in zip(replicas, expected, strict=True):
        assert torch.equal(replica.read(), alone)
    assert all(torch.equal(c, start) for c in values)
    assert not torch.equal(expected[0], expected[1])


def test_replicas_without_elastic_force_may_still_move_the_center():
    replicas, center = random_state(3, 10, F64)
    x, c = torch.stack([r.read() for r in replicas]), center.value.clone()
    run_synchronous([EASGD(1, 0.0, 0.5) for _ in replicas], replicas, [nothing] * 3, 1, center=center)
    assert torch.equal(torch.stack([r.read() for r in replicas]), x)
    torch.testing.assert_close(center.value, 0.5 * c + 0.5 * x.mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_is_a_negative_moving_rate(momentum):
    def gradient(x: Tensor) -> Tensor:
        return torch.cos(x) + 0.3  # of sin x + 0.3 x, which is not convex

    eta, start = 0.1, torch.linspace(-4, 4, 17, dtype=F64)
    replica = ParameterVector([start.clone()])
    centers: list[Tensor] = []
    replicas: list[Tensor] = []

    def observe(_: int, center: Tensor) -> None:
        centers.append(center.clone())
        replicas.append(replica.read())

    run_synchronous(
        [EASGD(period=1, moving_rate=-momentum, center_rate=1.0)],
        [replica],
        [lambda: replica.add_(gradient(replica.read()), alpha=-eta)],
        50,
        observe=observe,
    )
    before, x = start, start
    for t in range(50):
        before, x = x, x + momentum * (x - before) - eta * gradient(x)
        torch.testing.assert_close(replicas[t], x, rtol=0, atol=1e-12)
        torch.testing.assert_close(centers[t], before, rtol=0, atol=1e-12)

    # The same by torch's own momentum.
    point = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([point], lr=eta, momentum=momentum)
    for _ in range(50):
        point.grad = gradient(point.detach())
        optimizer.step()
    torch.testing.assert_close(replicas[-1], point.detach(), rtol=0, atol=1e-12)


def test_bfloat16_replicas_are_drawn_together_by_a_center_in_float32():
    replicas = [ParameterVector([torch.full((4,), v, dtype=torch.bfloat16)]) for v in (-1.0, 1.0, 3.0)]
    center = SynchronousCenter(torch.zeros(4), 3)
    run_synchronous([with_one_rate(None) for _ in replicas], replicas, [nothing] * 3, 60, center=center)
    assert center.value.dtype == torch.float32
    # The sum (-1 + 1 + 3 + 0) is shared by four, up to bfloat16's rounding of what the replicas move by.
    for value in (center.value, *(r.read() for r in replicas)):
        torch.testing.assert_close(value, torch.full((4,), 0.75), rtol=0, atol=0.02)
