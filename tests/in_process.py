"""A synchronous center for replicas that take turns in one thread: the arithmetic of an algorithm without a network.

Coordinates are independent wherever the objective is, so a vector of R coordinates is R runs of a one-dimensional
problem at once: Monte Carlo at the price of a few vector operations.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm, Exchange, Replica, Snapshot
from lightning_easgd.communication import Completed
from lightning_easgd.flatten import ParameterVector


class InProcessCenter:
    """A center that adds the pushes of a round, one of each replica, as one sum when the round is complete.

    It is what an all-reduce does, which is launched by the push and completed by the next pull. What would hang there
    or differ between replicas raises here.

    Args:
        initial: (d,), copied.
        num_replicas: p.

    Attributes:
        num_replicas: p.
        clock: additions so far; p a round.
        handles: the center as each replica reaches it.
        pulls: how often each replica has pulled.
        pushed: the deltas of the last complete round, in the order of the replicas.
    """

    def __init__(self, initial: Tensor, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self.clock = 0
        self.handles = [Handle(self, i) for i in range(num_replicas)]
        self.pulls = [0] * num_replicas
        self.pushed: list[Tensor] = []
        self._value = initial.clone()
        self._version = self._value._version
        self._round: dict[int, Tensor] = {}

    @property
    def value(self) -> Tensor:
        """(d,) the center after the last complete round. Not a copy."""
        self._settle()
        return self._value

    def _settle(self) -> None:
        assert self._value._version == self._version, "somebody wrote to the center's value, which is only lent"
        if len(self._round) == self.num_replicas:
            # Whoever pushed first, the sum is taken in the order of the replicas.
            self.pushed = [self._round[i] for i in range(self.num_replicas)]
            self._value.add_(torch.stack(self.pushed).sum(0))
            self._version = self._value._version
            self.clock += self.num_replicas
            self._round.clear()

    def _pull(self, replica: int) -> Snapshot:
        self._settle()
        assert replica not in self._round, f"replica {replica} pulls before all have pushed: it would wait for ever"
        self.pulls[replica] += 1
        return Snapshot(self._value, self.clock)

    def _push(self, replica: int, delta: Tensor, read_at: int) -> None:
        assert replica not in self._round, f"replica {replica} pushes twice in one round"
        assert read_at == self.clock, f"replica {replica} read the center at {read_at}; it is at {self.clock}"
        assert delta.shape == self._value.shape
        assert delta.dtype == self._value.dtype
        self._round[replica] = delta.clone()


class Handle:
    """An ``InProcessCenter`` as one replica reaches it."""

    def __init__(self, center: InProcessCenter, replica: int) -> None:
        self.num_replicas = center.num_replicas
        self._center = center
        self._replica = replica

    def pull(self) -> Snapshot:
        return self._center._pull(self._replica)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._center._push(self._replica, delta, read_at)

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        snapshot = self.pull()
        delta(x, snapshot.value)
        self.push(x if scale == 1 else scale * x, read_at=snapshot.clock)
        return Completed(x)


def run_synchronous(
    algorithms: Sequence[Algorithm],
    replicas: Sequence[Replica],
    gradient_steps: Sequence[Callable[[], None]],
    num_steps: int,
    *,
    center: InProcessCenter | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    order: Sequence[int] | None = None,
    start: bool = True,
) -> InProcessCenter:
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
        center = InProcessCenter(replicas[0].read(), len(replicas))
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
