"""Parle's outer step towards mean_a z^a, the replicas' averages, which the authors' codes have in place of mean_a x^a.

The authors need a second all-reduce for it; here one is enough. With zbar = mean_a z^a, xbar = mean_a x^a, which the
center is, R = 1 / rho, and e = eta (1 + R) (xbar - zbar), the mean move, the mean of the replicas' outer steps is::

    vbar <- mu vbar + e
    xbar <- xbar - e - mu vbar        that is, xbar - (1 + mu) e - mu^2 vbar

It is linear, so that each replica can push its part of it when a period ends; and what the center has become tells all
of them e when the next one begins, where they make their own outer steps.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_easgd.algorithms._local_entropy import outer_step_
from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.interfaces import Center

__all__ = ["AveragesTarget"]


class AveragesTarget:
    """One replica's knowledge of the mean outer step. Memory: vbar and the center that was pulled, two vectors."""

    def __init__(self) -> None:
        self._anchor: Tensor | None = None  # the center as it was pulled, xbar, and its clock
        self._read_at = 0
        self._mean_velocity: Tensor | None = None  # vbar
        self._share: float | None = None  # of the mean move in each replica's, while an outer step is pending

    def start(self) -> None:
        """Forgets all."""
        self._anchor = self._mean_velocity = self._share = None

    def must_pull(self, *, is_first: bool) -> bool:
        """Returns whether a step must begin with ``pull``: a period's first, and one that knows no center yet."""
        return is_first or self._anchor is None

    def pull(self, center: Center, x: Tensor, own: Tensor, velocity: Tensor, *, momentum: float) -> bool:
        """Reads the center. If an outer step is pending, makes it, and returns that it did; blocks for the center.

        Args:
            center: xbar.
            x: the outer point; modified.
            own: what ``propose`` has left in z; modified.
            velocity: v; modified.
            momentum: mu.
        """
        snapshot = center.pull()
        is_pending = self._share is not None
        if self._share is not None:
            assert self._anchor is not None
            mean_velocity = self.mean_velocity()
            mean = self._anchor.sub_(snapshot.value).sub_(mean_velocity, alpha=momentum * momentum).div_(1 + momentum)
            mean_velocity.mul_(momentum).add_(mean)  # vbar <- mu vbar + e
            outer_step_(x, velocity, own.add_(mean, alpha=self._share), momentum=momentum)  # + eta R (xbar - zbar)
            self._share = None
        self._anchor = snapshot.value.clone() if self._anchor is None else self._anchor.copy_(snapshot.value)
        self._read_at = snapshot.clock
        return is_pending

    def mean_velocity(self) -> Tensor:
        """Returns vbar, which the caller may scale."""
        assert self._anchor is not None
        if self._mean_velocity is None:
            self._mean_velocity = torch.zeros_like(self._anchor)
        return self._mean_velocity

    def propose(
        self, center: Center, x: Tensor, z: Tensor, buffer: Tensor, *, rate: float, momentum: float, stiffness: float
    ) -> None:
        """Pushes this replica's part of the mean outer step; keeps what it knows of its own move in z.

        Args:
            center: xbar.
            x: the outer point.
            z: the average; overwritten by ``eta [(x - z) + R (x - xbar)]``.
            buffer: overwritten.
            rate: eta.
            momentum: mu.
            stiffness: R.
        """
        assert self._anchor is not None
        torch.sub(x, z, out=z)
        part = torch.sub(x, self._anchor, out=buffer).sub_(z, alpha=rate * (1 + momentum) * (1 + stiffness))
        part.sub_(self.mean_velocity(), alpha=momentum * momentum).div_(center.num_replicas)
        center.push(part, read_at=self._read_at)
        z.add_(torch.sub(x, self._anchor, out=buffer), alpha=stiffness).mul_(rate)
        self._share = stiffness / (1 + stiffness)

    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive a restart."""
        vectors = {"anchor": saved(self._anchor), "mean_velocity": saved(self._mean_velocity)}
        return {**vectors, "read_at": self._read_at, "share": self._share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._anchor, self._mean_velocity = restored(state["anchor"]), restored(state["mean_velocity"])
        self._read_at, self._share = int(state["read_at"]), state["share"]
