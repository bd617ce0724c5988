"""What is known of elastic averaging in closed form, against what is implemented: six plots, no training, no data.

    python examples/theory.py                      # writes docs/theory.png, in less than a minute
    python examples/theory.py --fast --out theory.png

Lines are formulas, dots are the package's own algorithms in its simulation. Where a step is linear the simulation is
asked for its matrix: coordinates are independent runs, so one step from the unit vectors gives all columns.

* Round-robin ADMM and EASGD: spectral radius of a cycle on x^2 / 2 (arXiv:1412.6651, section 4).
* Variance of the center under gradient noise, against SGD on a batch that is as large (section 3).
* Mean square after a step on a quadratic whose curvature is noise itself (Zhang's thesis, arXiv:1605.02216).
* Two replicas in two wells: a trap below an elasticity of 2/3 (thesis).
* The moving rate that converges fastest is negative (thesis).
"""

import argparse
import copy
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from lightning_easgd.algorithms import ADMM, EASGD, Algorithm, LocalSGD
from lightning_easgd.gates import RoundRobin
from lightning_easgd.simulation import DoubleWell, LockStep, MultiplicativeNoise, Objective, Quadratic, Simulation

F64 = torch.float64


def radius(matrix: Tensor) -> float:
    """Returns the spectral radius."""
    return float(torch.linalg.eigvals(matrix).abs().max())


def linspace(first: float, last: float, num: int) -> list[float]:
    return torch.linspace(first, last, num, dtype=F64).tolist()


# --- round-robin turns ------------------------------------------------------------------------------------------------


def easgd_cycle(p: int, eta: float, alpha: float) -> float:
    """Returns the spectral radius of a turn of each replica on x^2 / 2; the state is (x^1, ..., x^p, c)."""
    unit = torch.eye(p + 1, dtype=F64)
    simulation = Simulation.of(
        EASGD(1, alpha), Quadratic(), unit[:p], num_replicas=p, lr=eta, synchronous=False, gate=RoundRobin(),
        center=unit[p], start=False,
    )  # fmt: skip
    simulation.run(1)
    return radius(torch.stack([*(r.read() for r in simulation.replicas), simulation.center.value]))


def admm_cycle(p: int, eta: float, rho: float) -> float:
    """Returns the same for ADMM; the state is the multipliers and x, of which c is the mean of the differences."""
    multipliers, x = torch.eye(2 * p, dtype=F64).split(p)
    simulation = Simulation.of(
        ADMM(1, eta * rho), Quadratic(), x, num_replicas=p, lr=eta, synchronous=False,
        center=(x - multipliers).mean(0), start=False,
    )  # fmt: skip
    for algorithm, mine, own in zip(simulation.algorithms, multipliers, x, strict=True):
        algorithm.load_state_dict({"clock": 0, "multiplier": mine, "held": own - mine})
    simulation.run(1)
    after = [a.state_dict()["multiplier"] for a in simulation.algorithms]
    return radius(torch.stack([*after, *(r.read() for r in simulation.replicas)]))


def draw_cycles(axes: Iterable[Axes], fast: bool) -> None:
    p, num = 3, 4 if fast else 24
    etas = torch.logspace(-4, -2, num, dtype=F64).tolist()
    rhos = torch.logspace(math.log10(0.05), 1, num, dtype=F64).tolist()
    maps = [
        torch.tensor([[cycle(p, eta, rho) for eta in etas] for rho in rhos], dtype=F64)
        for cycle in (admm_cycle, lambda p, eta, rho: easgd_cycle(p, eta, eta * rho))
    ]
    norm = TwoSlopeNorm(1.0, min(float(m.min()) for m in maps), 1.0012)
    for ax, name, values in zip(axes, ("ADMM", "EASGD"), maps, strict=True):
        mesh = ax.pcolormesh(etas, rhos, values, norm=norm, cmap="RdBu_r", shading="nearest")
        unstable = 100 * float((values > 1 + 1e-9).to(F64).mean())
        ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="elasticity $\\rho$")
        ax.set_title(f"{name} in turns, {p} replicas: {unstable:.0f} % unstable")
        ax.plot(1e-3, 2.5, "k*")  # the paper's figure 1
        ax.figure.colorbar(mesh, ax=ax, label="spectral radius", ticks=[0.992, 0.996, 1, 1.0006, 1.0012], format="%.4f")


# --- the variance of the center ---------------------------------------------------------------------------------------


def closed_variance(p: int, eta: float, beta: float) -> float:
    """Returns the center's asymptotic variance on x^2 / 2 under gradient noise of variance 1."""
    alpha = beta / p
    a, k = eta + (p + 1) * alpha, eta * p * alpha
    return alpha * eta * (2 - a + k) / ((4 - 2 * a + k) * (a - k))


def measured_variance(p: int, eta: float, beta: float, num_runs: int) -> float:
    """Returns the same of so many runs, each seen ten times, 15 steps apart."""
    begin = torch.zeros(num_runs, dtype=F64)
    run = LockStep(EASGD(1, center_rate=beta), Quadratic(noise=1.0), begin, num_replicas=p, lr=eta, start=False)
    run.run(200)
    squares = []
    for _ in range(10):
        run.run(15)
        squares.append(float(run.center.square().mean()))
    return sum(squares) / len(squares)


def draw_variance(ax: Axes, fast: bool) -> None:
    eta = 0.1
    for p, last, color in ((4, 1.45, "C0"), (16, 1.75, "C1")):
        betas = linspace(0.05, last, 100)
        dots = linspace(0.1, last, 4 if fast else 10)
        ax.plot(betas, [p * closed_variance(p, eta, beta) for beta in betas], color, label=f"EASGD, {p} replicas")
        ax.plot(dots, [p * measured_variance(p, eta, beta, 200 if fast else 4000) for beta in dots], f"{color}o", ms=4)
    ax.axhline(eta / (2 - eta), color="k", ls="--", label="SGD, batch of as many")
    ax.set(xlabel="center rate $\\beta$", ylabel="replicas × variance", title="Variance of the center", ylim=(0, 0.1))
    ax.legend()


# --- noise in the curvature -------------------------------------------------------------------------------------------


def step_matrices(algorithm: Algorithm, p: int, eta: float, objective: Objective, num_draws: int = 1) -> Tensor:
    """Returns what a synchronous step does to (x^1, ..., x^p, c): (num_draws, p + 1, p + 1), a draw of the noise each.

    The seed is always the same, and so are the draws that each unit vector meets.
    """
    columns = []
    for unit in torch.eye(p + 1, dtype=F64):
        begin = unit[:, None].expand(p + 1, num_draws)
        run = LockStep(
            copy.deepcopy(algorithm), objective, begin[:p], num_replicas=p, lr=eta, center=begin[p], start=False
        )
        run.run(1)
        columns.append(torch.cat([run.replicas, run.center[None]]))
    return torch.stack(columns, -1).transpose(0, 1)


def mean_square_rate(algorithm: Algorithm, p: int, eta: float, mean: float, std: float) -> float:
    """Returns by what a step multiplies mean squares in the long run where curvatures have this mean and deviation.

    A step is linear in each replica's curvature, M = M_mean + sum_i (h_i - mean) D_i, so that the second moments of the
    state move by E[M x M] = M_mean x M_mean + std^2 sum_i D_i x D_i, with Kronecker products.
    """
    (middle,) = step_matrices(algorithm, p, eta, Quadratic(mean))
    second = torch.kron(middle, middle)
    for i in range(p):
        curvature = torch.full((p, 1), mean, dtype=F64)
        curvature[i] += 1
        (other,) = step_matrices(algorithm, p, eta, Quadratic(curvature))
        second += std**2 * torch.kron(other - middle, other - middle)
    return radius(second)


def measured_mean_square_rate(algorithm: Algorithm, p: int, eta: float, mean: float, std: float, draws: int) -> float:
    """Returns the same, of so many steps with Gamma-distributed curvatures."""
    matrices = step_matrices(algorithm, p, eta, MultiplicativeNoise(mean, std), draws)
    n = (p + 1) ** 2
    products = matrices.reshape(draws, n).T @ matrices.reshape(draws, n) / draws  # E[M_ij M_kl] at (ij, kl)
    return radius(products.view(p + 1, p + 1, p + 1, p + 1).transpose(1, 2).reshape(n, n))


def draw_rates(ax: Axes, fast: bool) -> None:
    mean, std, p, delta = 1.0, 2.0, 4, 0.5
    etas, dots = linspace(0.02, 0.9, 6 if fast else 60), linspace(0.1, 0.8, 2 if fast else 8)
    draws = 1000 if fast else 40_000
    # The mean of p Gamma-distributed curvatures is one, too; momentum is EASGD of one replica with a negative rate.
    for i, (label, algorithm, num, deviation) in enumerate(
        (
            (f"SGD, batch of {p}", LocalSGD(1), p, std),
            (f"momentum {delta}, batch of {p}", EASGD(1, -delta, 1.0), 1, std / math.sqrt(p)),
            (f"EASGD, {p} replicas, $\\beta$ = 0.9", EASGD(1, center_rate=0.9), p, std),
        )
    ):
        ax.plot(etas, [mean_square_rate(algorithm, num, eta, mean, deviation) for eta in etas], f"C{i}", label=label)
        measured = [measured_mean_square_rate(algorithm, num, eta, mean, deviation, draws) for eta in dots]
        ax.plot(dots, measured, f"C{i}o", ms=4)
    ax.axhline(1, color="k", lw=0.5)
    ax.set(xlabel="learning rate", ylabel="mean square, by step", title="Curvature of mean 1, deviation 2")
    ax.set_ylim(0.4, 1.5)
    ax.legend(loc="upper left")


# --- two wells --------------------------------------------------------------------------------------------------------


def trap(elasticity: float, num_steps: int) -> tuple[float, float]:
    """Returns |x| and |c| in the end, of two replicas that begin near (s, -s), c = 0, with s^2 = 1 - elasticity."""
    s, eta = math.sqrt(1 - elasticity), 0.1
    begin = torch.tensor([[s + 1e-3], [-s + 2e-3]], dtype=F64)
    run = LockStep(
        EASGD(1, eta * elasticity), DoubleWell(), begin, num_replicas=2, lr=eta,
        center=torch.tensor([1e-3], dtype=F64),
    )  # fmt: skip
    run.run(num_steps)
    return abs(float(run.replicas[0])), abs(float(run.center))


def draw_trap(ax: Axes, fast: bool) -> None:
    edge = 2 / 3
    trapped, free = linspace(0, edge, 50), [edge, 1.0]
    ax.plot(trapped + free, [math.sqrt(1 - r) for r in trapped] + [1.0, 1.0], "C0", label="a replica, $|x|$")
    ax.plot([0, edge, *free], [0, 0, 1, 1], "C1", label="the center, $|c|$")
    dots = [0.3, 0.9] if fast else [0.05, 0.2, 0.35, 0.5, 0.6, 0.64, 0.69, 0.72, 0.8, 0.95]
    ends = [trap(r, 6000) for r in dots]
    ax.plot(dots, [x for x, _ in ends], "C0o", ms=4)
    ax.plot(dots, [c for _, c in ends], "C1o", ms=4)
    ax.axvline(edge, color="k", lw=0.5)
    ax.set(xlabel="elasticity $\\rho$", ylabel="at the end", title="Two replicas in two wells")
    ax.legend()


# --- a negative moving rate -------------------------------------------------------------------------------------------


def pair_radius(e: float, alpha: float, beta: float) -> float:
    """Returns the spectral radius of a step of mean replica and center on x^2 / 2, from the simulation."""
    return radius(step_matrices(EASGD(1, alpha, beta), 1, e, Quadratic())[0])


def closed_pair_radius(e: float, alpha: float, beta: float) -> float:
    """Returns the same from trace and determinant."""
    trace, det = 2 - e - alpha - beta, (1 - e) * (1 - beta) - alpha
    root = trace**2 / 4 - det
    return math.sqrt(det) if root < 0 else abs(trace) / 2 + math.sqrt(root)


def draw_negative(ax: Axes, fast: bool) -> None:
    e = 0.1
    alphas, dots = linspace(-0.7, 0.3, 11 if fast else 201), linspace(-0.65, 0.25, 4 if fast else 10)
    for beta, color in ((0.4, "C0"), (0.9, "C1")):
        ax.plot(alphas, [closed_pair_radius(e, a, beta) for a in alphas], color, label=f"$\\beta$ = {beta}")
        ax.plot(dots, [pair_radius(e, a, beta) for a in dots], f"{color}o", ms=4)
        ax.plot(-((math.sqrt(beta) - math.sqrt(e)) ** 2), 1 - math.sqrt(e * beta), "k*")
    ax.plot(alphas, [abs(1 - e - a) for a in alphas], "k:", label="differences of replicas")
    ax.axvline(0, color="k", lw=0.5)
    ax.set(xlabel="moving rate $\\alpha$", ylabel="spectral radius", ylim=(0.65, 1.5))
    ax.set_title("Best moving rate: negative (stars)")
    ax.legend(loc="upper right")


def draw(fast: bool = False) -> Figure:
    """Returns all plots; ``fast`` has few points, to see whether it works."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    (admm, easgd, variance), (rates, wells, negative) = figure.subplots(2, 3)
    draw_cycles((admm, easgd), fast)
    draw_variance(variance, fast)
    draw_rates(rates, fast)
    draw_trap(wells, fast)
    draw_negative(negative, fast)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/theory.png"), help="image (default: docs/theory.png)")
    parser.add_argument("--fast", action="store_true", help="few points: seconds instead of a minute")
    args = parser.parse_args()
    figure = draw(args.fast)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=75)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
