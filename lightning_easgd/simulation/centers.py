"""Centers in one process, for a simulation: what an all-reduce does, and what a server does, without a wire."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_easgd.algorithms import Center, Exchange, Snapshot
from lightning_easgd.rules import Addition, CenterRule

__all__ = ["AsynchronousCenter", "SynchronousCenter", "pull_and_push"]


@dataclass(frozen=True)
class _Done:
    """An exchange that is over."""

    delta: Tensor

    def wait(self) -> Tensor:
        """Returns the delta."""
        return self.delta

    def done(self) -> None:
        """Gives the delta back, which is nobody else's."""


def pull_and_push(center: Center, x: Tensor, delta: Callable[[Tensor, Tensor], None], scale: float) -> Exchange:
    """Makes an exchange of its two halves: here nobody can come between them. See ``Center.exchange``."""
    snapshot = center.pull()
    delta(x, snapshot.value)
    center.push(x if scale == 1 else x * scale, read_at=snapshot.clock)
    return _Done(x)


class _Handle:
    """A center as one replica reaches it."""

    def __init__(self, center: "SynchronousCenter | AsynchronousCenter", replica: int) -> None:
        self.num_replicas = center.num_replicas
        self.replica = replica
        self._center = center
        self._scratch: Tensor | None = None

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        self._center.tell(self.replica, numbers)

    def told(self) -> Tensor:
        return self._center.told()

    def pull(self) -> Snapshot:
        return self._center.pull(self.replica)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._center.push(self.replica, delta, read_at)

    def borrow(self) -> Tensor:
        if self._scratch is None:
            self._scratch = torch.empty_like(self._center.value)
        return self._scratch

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        return pull_and_push(self, x, delta, scale)


class SynchronousCenter:
    """A center that adds the pushes of a round, one of each replica, as one sum when the round is complete.

    It does what an all-reduce does: a push launches the sum, and the next pull completes it. What would hang there, or
    differ between replicas, raises ``RuntimeError`` here.

    Args:
        initial: (d,), copied.
        num_replicas: p.
        rule: what it does with a round's sum. Default: ``Addition``.
        num_told: how many numbers each replica tells the others with a push.

    Attributes:
        num_replicas: p.
        clock: additions so far; p per round.
        rule: the rule.
        handles: the center as each replica reaches it.
        pulls: how often each replica has pulled.
        pushed: the deltas of the last complete round, in the order of the replicas.
    """

    def __init__(self, initial: Tensor, num_replicas: int, rule: CenterRule | None = None, num_told: int = 0) -> None:
        self.num_replicas = num_replicas
        self.clock = 0
        self.rule = Addition() if rule is None else rule
        self.handles: list[Center] = [_Handle(self, i) for i in range(num_replicas)]
        self.pulls = [0] * num_replicas
        self.pushed: list[Tensor] = []
        self._value = initial.clone()
        self._version = self._value._version
        self._memory = [torch.zeros_like(initial) for _ in range(self.rule.num_vectors)]
        self._round: dict[int, Tensor] = {}
        self._next_rows, self._sent, self._told = ([(0.0,) * num_told] * num_replicas for _ in range(3))

    @property
    def value(self) -> Tensor:
        """(d,) the center after the last complete round. Not a copy."""
        _require_unwritten(self._value, self._version)
        return self._value

    def is_outstanding(self, replica: int) -> bool:
        """Returns whether the replica has pushed to a round that is not complete: a pull would wait for the others."""
        return replica in self._round

    def tell(self, replica: int, numbers: Sequence[float] | Tensor) -> None:
        """Sets what the replica tells the others with its next push, and from then on."""
        self._next_rows[replica] = tuple(float(number) for number in numbers)

    def told(self) -> Tensor:
        """Returns (num_replicas, num_told), the numbers told in the last complete round."""
        return torch.tensor(self._told, dtype=self._value.dtype)

    def pull(self, replica: int) -> Snapshot:
        """Returns the center; refuses a replica whose push is outstanding."""
        value = self.value
        if replica in self._round:
            raise RuntimeError(f"replica {replica} pulls before all have pushed: it would wait for ever")
        self.pulls[replica] += 1
        return Snapshot(value, self.clock)

    def push(self, replica: int, delta: Tensor, read_at: int) -> None:
        """Adds to the round, and the round to the center when it is complete."""
        if replica in self._round:
            raise RuntimeError(f"replica {replica} pushes twice in one round")
        if read_at != self.clock:
            raise RuntimeError(f"replica {replica} read the center at {read_at}; it is at {self.clock}")
        value = self.value
        _require_like(delta, value)
        self._round[replica] = delta * self.rule.weight(self.clock - read_at)
        self._sent[replica] = self._next_rows[replica]
        if len(self._round) == self.num_replicas:
            # The sum is taken in the order of the replicas, whichever replica pushed first.
            self.pushed = [self._round[i] for i in range(self.num_replicas)]
            self.rule.apply_(value, torch.stack(self.pushed).sum(0), *self._memory)
            self._version = value._version
            self._told = list(self._sent)
            self.clock += self.num_replicas
            self._round.clear()


class AsynchronousCenter:
    """A center that adds each push by itself, as it comes.

    Args:
        initial: (d,), copied.
        num_replicas: p.
        rule: what it does with a delta. Default: ``Addition``.
        num_told: how many numbers each replica tells the others with a push.

    Attributes:
        num_replicas: p.
        clock: additions so far.
        rule: the rule.
        handles: the center as each replica reaches it.
        staleness: of the last addition, in additions.
    """

    def __init__(self, initial: Tensor, num_replicas: int, rule: CenterRule | None = None, num_told: int = 0) -> None:
        self.num_replicas = num_replicas
        self.clock = 0
        self.rule = Addition() if rule is None else rule
        self.handles: list[Center] = [_Handle(self, i) for i in range(num_replicas)]
        self.staleness = 0
        self._value = initial.clone()
        self._version = self._value._version
        self._memory = [torch.zeros_like(initial) for _ in range(self.rule.num_vectors)]
        self._next_rows, self._told = ([(0.0,) * num_told] * num_replicas for _ in range(2))

    @property
    def value(self) -> Tensor:
        """(d,) the center. Not a copy: it moves with the next addition."""
        _require_unwritten(self._value, self._version)
        return self._value

    def tell(self, replica: int, numbers: Sequence[float] | Tensor) -> None:
        """Sets what the replica tells the others with its next push, and from then on."""
        self._next_rows[replica] = tuple(float(number) for number in numbers)

    def told(self) -> Tensor:
        """Returns (num_replicas, num_told), the numbers that each replica told with its last push."""
        return torch.tensor(self._told, dtype=self._value.dtype)

    def pull(self, replica: int) -> Snapshot:
        """Returns the center."""
        del replica
        return Snapshot(self.value, self.clock)

    def push(self, replica: int, delta: Tensor, read_at: int) -> None:
        """Adds ``delta`` to the center, with the weight that its staleness gets."""
        value = self.value
        _require_like(delta, value)
        self.staleness = self.clock - read_at
        weight = self.rule.weight(self.staleness)
        self.rule.apply_(value, delta if weight == 1 else delta * weight, *self._memory)
        self._version = value._version
        self._told[replica] = self._next_rows[replica]
        self.clock += 1


def _require_unwritten(value: Tensor, version: int) -> None:
    if value._version != version:
        raise RuntimeError("somebody wrote to the center's value, which is only lent")


def _require_like(delta: Tensor, value: Tensor) -> None:
    if delta.shape != value.shape or delta.dtype != value.dtype:
        raise RuntimeError(
            f"a delta of {delta.dtype}, shape {tuple(delta.shape)}, was pushed to a center of {value.dtype}, shape "
            f"{tuple(value.shape)}"
        )
