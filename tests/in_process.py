"""Replicas that take turns in one thread over the simulation's synchronous center: plain calls, in a given order.

Coordinates are independent wherever the objective is, so a vector of R coordinates is R runs of a one-dimensional
problem at once: Monte Carlo at the price of a few vector operations.
"""

import pickle
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm, Replica
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.simulation import SynchronousCenter


def run_synchronous(
    algorithms: Sequence[Algorithm],
    replicas: Sequence[Replica],
    gradient_steps: Sequence[Callable[[], None]],
    num_steps: int,
    *,
    center: SynchronousCenter | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    order: Sequence[int] | None = None,
    start: bool = True,
) -> SynchronousCenter:
    """Steps all replicas ``num_steps`` times, in turn, and returns their center.

    Args:
        algorithms: one for each replica.
        replicas: the parameters of each replica, moved in place.
        gradient_steps: the local update of each replica.
        num_steps: optimizer steps of every replica.
        center: to go on with. Default: a new one, with the value of replica 0.
        observe: called after every step with the number of steps done and the center's value.
        order: whose turn it is within a step. Default: that of their indices.
        start: whether to call the algorithms' ``start``, which refuses hyper-parameters that cannot work.
    """
    if center is None:
        center = SynchronousCenter(replicas[0].read(), len(replicas))
    if start:
        for algorithm, replica, handle in zip(algorithms, replicas, center.handles, strict=True):
            algorithm.start(replica, handle)
    for t in range(num_steps):
        for i in range(len(replicas)) if order is None else order:
            algorithms[i].step(replicas[i], center.handles[i], gradient_steps[i])
        if observe is not None:
            observe(t + 1, center.value)
    return center


def vectors(values: Sequence[float], num_runs: int = 1, dtype: torch.dtype = torch.float64) -> list[ParameterVector]:
    """Returns one replica for each value: (num_runs,) coordinates that all begin with it."""
    return [ParameterVector([torch.full((num_runs,), v, dtype=dtype)]) for v in values]


def quadratic_steps(
    replicas: Sequence[ParameterVector], rate: float, *, curvature: float = 1.0, noise: float = 0.0, seed: int = 0
) -> list[Callable[[], None]]:
    """Returns one SGD step a replica on ``curvature x^2 / 2`` in each coordinate: x <- x - rate (curvature x - xi).

    Args:
        replicas: each of one tensor.
        rate: eta.
        curvature: h.
        noise: sigma, the standard deviation of the normal xi; from a generator of each replica's own.
        seed: of replica 0's generator; the others' follow.
    """

    def make(x: Tensor, generator: torch.Generator) -> Callable[[], None]:
        def step() -> None:
            x.mul_(1 - rate * curvature)
            if noise:
                x.add_(torch.randn(x.shape, generator=generator, dtype=x.dtype), alpha=rate * noise)

        return step

    return [make(r.parameters[0], torch.Generator().manual_seed(seed + i)) for i, r in enumerate(replicas)]


def interrupted(
    make: Callable[[], Algorithm], at: int, *, momentum: float = 0.0, num_replicas: int = 3, num_steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Returns two trajectories of replicas and center: in one go, and with new algorithms from step ``at`` on.

    Those get, as in a restart from a checkpoint, ``bind`` and ``start`` and then what the old ones' ``state_dict``
    returned; the replicas and their optimizers are new, too, with the values of the old. The center is the same: what
    it remembers is its transport's to keep. With step ``at`` the learning rate changes, in both.

    Args:
        make: returns an algorithm.
        at: steps before the restart, > 0.
        momentum: of the optimizers, Nesterov's.
        num_replicas: p.
        num_steps: in all.

    Returns:
        Twice (num_steps, p + 1, d): the replicas, each on a loss of its own, and the center.
    """
    rows = torch.randn(num_replicas, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(is_interrupted: bool) -> Tensor:
        center = SynchronousCenter(rows.mean(0), num_replicas, make().rule(num_replicas))
        path: list[Tensor] = []
        parameters = [torch.nn.Parameter(row.clone()) for row in rows]

        def build(lr: float) -> tuple[list[Algorithm], list[torch.optim.SGD]]:
            optimizers = [torch.optim.SGD([x], lr=lr, momentum=momentum, nesterov=momentum > 0) for x in parameters]
            algorithms = [make() for _ in parameters]
            for algorithm, optimizer, x in zip(algorithms, optimizers, parameters, strict=True):
                algorithm.bind(optimizer, [x])
            return algorithms, optimizers

        def go(algorithms: list[Algorithm], optimizers: list[torch.optim.SGD], steps: int, start: bool) -> None:
            def update(i: int) -> None:
                x = parameters[i].detach()
                parameters[i].grad = x.cos() + 0.6 * x + i
                optimizers[i].step()

            run_synchronous(
                algorithms,
                [ParameterVector([x]) for x in parameters],
                [lambda i=i: update(i) for i in range(num_replicas)],
                steps,
                center=center,
                observe=lambda _, c: path.append(torch.stack([*(x.detach() for x in parameters), c])),
                start=start,
            )

        algorithms, optimizers = build(0.05)
        go(algorithms, optimizers, at, start=True)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02
        if is_interrupted:
            states = pickle.loads(pickle.dumps([a.state_dict() for a in algorithms]))
            velocities = [optimizer.state_dict() for optimizer in optimizers]
            parameters = [torch.nn.Parameter(x.detach().clone()) for x in parameters]
            algorithms, optimizers = build(0.02)
            go(algorithms, optimizers, 0, start=True)
            for algorithm, optimizer, state, velocity in zip(algorithms, optimizers, states, velocities, strict=True):
                optimizer.load_state_dict(velocity)
                algorithm.load_state_dict(state)
        go(algorithms, optimizers, num_steps - at, start=False)
        return torch.stack(path)

    return run(False), run(True)
