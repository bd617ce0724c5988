"""All replicas over a synchronous center as one tensor."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm, Exchange, Snapshot
from lightning_easgd.rules import CenterRule
from lightning_easgd.simulation.centers import pull_and_push
from lightning_easgd.simulation.objectives import Objective
from lightning_easgd.simulation.replicas import OptimizerFactory, Vector, descent

__all__ = ["LockStep"]


class LockStep:
    """All replicas over a synchronous center as one (p, d) tensor, with one algorithm object for all.

    For algorithms that treat every number of the vector alike, so that p rows are no different from a longer vector.
    Without noise the trajectory is bit-identical to that of ``Simulation(synchronous=True)``; the noise is drawn for
    all replicas at once and differs.

    Args:
        algorithm: the algorithm; used, not copied.
        objective: what all descend.
        begin: (d,) where all begin, or (p, d), where each does. Copied.
        num_replicas: p.
        lr: the rate of plain SGD; or
        optimizer: called with the list of one parameter, (p, d): an optimizer that treats every number alike. The
            algorithm is bound to it.
        center: (d,) its value. Default: replica 0's.
        rule: what it does with a round's sum. Default: the algorithm's.
        seed: of the noise.
        start: whether to call the algorithm's ``start``, which refuses hyper-parameters that cannot work.

    Raises:
        ValueError: the algorithm needs an asynchronous center, or tells replicas apart; or ``lr`` and ``optimizer`` are
            not one of the two.

    Attributes:
        algorithm: the algorithm.
        num_replicas: p.
        replica: 0; to the algorithm all replicas are one.
        replicas: (p, d), moved in place.
        center: (d,), moved in place.
        clock: additions so far; p per round.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        objective: Objective,
        begin: Tensor,
        *,
        num_replicas: int,
        lr: float | None = None,
        optimizer: OptimizerFactory | None = None,
        center: Tensor | None = None,
        rule: CenterRule | None = None,
        seed: int = 0,
        start: bool = True,
    ) -> None:
        if algorithm.asynchronous_only:
            raise ValueError(f"LockStep(algorithm={algorithm!r}): must be one for a synchronous center")
        if algorithm.num_told or algorithm.needs_loss:
            raise ValueError(f"LockStep(algorithm={algorithm!r}): it tells replicas apart; take Simulation")
        self.algorithm, self.num_replicas, self.replica = algorithm, num_replicas, 0
        self.replicas = begin.expand(num_replicas, begin.shape[-1]).clone()
        self.center = self.replicas[0].clone() if center is None else center.clone()
        self.clock = 0
        self.rule = algorithm.rule(num_replicas) if rule is None else rule
        self._memory = [torch.zeros_like(self.center) for _ in range(self.rule.num_vectors)]
        self._scratch: Tensor | None = None
        self._vector = Vector(self.replicas)
        generator = torch.Generator().manual_seed(seed)
        self._update = descent(algorithm, objective, self.replicas, lr, optimizer, generator)
        if start:
            algorithm.start(self._vector, self)

    @torch.no_grad()
    def run(self, num_steps: int, observe: Callable[[int], None] | None = None) -> None:
        """Goes on; may be called again.

        Args:
            num_steps: how many more steps each replica makes.
            observe: called after each, with the number of steps done in this call.
        """
        for t in range(num_steps):
            self.algorithm.step(self._vector, self, self._update)
            if observe is not None:
                observe(t + 1)

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        """Takes the no numbers of an algorithm that tells nothing."""
        del numbers

    def told(self) -> Tensor:
        """Returns (num_replicas, 0)."""
        return self.center.new_zeros(self.num_replicas, 0)

    def pull(self) -> Snapshot:
        """Returns the center, for the algorithm."""
        return Snapshot(self.center, self.clock)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds all replicas' deltas, (p, d), as one sum."""
        weight = self.rule.weight(self.clock - read_at)
        self.rule.apply_(self.center, (delta * weight).sum(0), *self._memory)
        self.clock += self.num_replicas

    def borrow(self) -> Tensor:
        """Lends (p, d) memory, for the algorithm."""
        if self._scratch is None:
            self._scratch = torch.empty_like(self.replicas)
        return self._scratch

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """Pulls, computes and pushes for all replicas."""
        return pull_and_push(self, x, delta, scale)
