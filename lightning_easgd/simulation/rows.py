"""Many small replicas as rows of one tensor: the bits of each one's own steps, at the price of a few operations."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.simulation.objectives import Separable

__all__ = ["LARGEST_ROW", "Row", "Rows"]


_ROWS_A_ROUND = 4  # from here on a step of many rows at once costs less than one by one
LARGEST_ROW = 256  # in numbers; beyond it is memory and not the number of operations that costs


class Rows:
    """Replicas as rows of one tensor, whose steps of plain SGD are put off until somebody looks at them.

    Then the steps of all are made together. Nobody can tell: a step reads nothing but its own row and its replica's own
    generator, and is elementwise.

    Args:
        algorithms: the replicas', for their proximal terms.
        objective: what all descend.
        values: (p, d), moved in place.
        lr: the rate.
        generators: one for each replica.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        objective: Separable,
        values: Tensor,
        lr: float,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._values, self._rows = values, list(values.unbind())
        self._drawn = torch.empty_like(values) if objective.is_noisy else None
        self._drawn_rows = [] if self._drawn is None else list(self._drawn.unbind())
        self._objective, self._rate, self._generators = objective, -lr, generators
        self._proximal_terms = [algorithm.proximal_term for algorithm in algorithms]
        self._owed: dict[int, int] = {}  # steps that were put off, by replica
        self._total = 0
        self._most = 0  # at least as many as any replica's

    def step(self, i: int) -> None:
        """Makes a step, or puts it off."""
        term = self._proximal_terms[i]()
        if term is not None:
            x = self.settled(i)
            slope = self._objective.gradient(x, self._generators[i])
            x.add_(slope.add(x - term.anchor, alpha=term.stiffness), alpha=self._rate)
            return
        self._owed[i] = owed = self._owed.get(i, 0) + 1
        self._total += 1
        if owed > self._most:
            self._most = owed

    def settled(self, i: int) -> Tensor:
        """Returns (d,), the replica's row with all its steps made."""
        x, owed = self._rows[i], self._owed.get(i, 0)
        if not owed:
            return x
        # All rows cost as many rounds of operations as the most that one owes, this one by itself what it owes.
        if self._total * owed >= _ROWS_A_ROUND * self._most**2:
            self._settle_all()
            return x
        del self._owed[i]
        self._total -= owed
        for _ in range(owed):
            x.add_(self._objective.gradient(x, self._generators[i]), alpha=self._rate)
        return x

    def _settle_all(self) -> None:
        order = sorted(self._owed, key=self._owed.__getitem__, reverse=True)
        index = torch.tensor(order)
        x, drawn = self._values[index], None
        num_rows = len(order)
        for t in range(self._owed[order[0]]):
            while self._owed[order[num_rows - 1]] <= t:
                num_rows -= 1
            rows = x[:num_rows]
            if self._drawn is not None:
                for i, out in zip(order[:num_rows], self._drawn_rows, strict=False):
                    self._objective.draw_(out, self._generators[i])
                drawn = self._drawn[:num_rows]
            rows.add_(self._objective.slope(rows, drawn), alpha=self._rate)
        self._values[index] = x
        self._owed.clear()
        self._total = self._most = 0


class Row:
    """A replica that is one of ``Rows``."""

    def __init__(self, rows: Rows, replica: int) -> None:
        self._settled = partial(rows.settled, replica)

    @property
    def value(self) -> Tensor:
        """(d,) the current vector."""
        return self._settled()

    def read(self, out: Tensor | None = None) -> Tensor:
        """Copies the vector into ``out`` (allocated when None) and returns it."""
        return self._settled().clone() if out is None else out.copy_(self._settled())

    def add_(self, update: Tensor, *, alpha: float = 1.0) -> None:
        """Adds ``alpha * update`` in place."""
        self._settled().add_(update, alpha=alpha)

    def write_(self, value: Tensor) -> None:
        """Replaces the vector by ``value``."""
        self._settled().copy_(value)
