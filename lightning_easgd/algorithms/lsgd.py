"""Leader SGD: Teng, Gao, Chalus, Choromanska, Goldfarb, Weller, NeurIPS 2019, arXiv:1905.10395.

Every replica is pulled towards the one whose loss is lowest, the leader l, and the leader by nobody::

    x^i <- x^i - eta g^i(x^i) - r (x^i - c)       c = x^l as of the last exchange;  r = 0 for l itself

with ``r = leader_rate + step_rate / period`` in the step that follows an exchange and ``r = step_rate / period`` in the
others, all right-hand sides at time t. The center variable *is* the leader's parameters: what is evaluated and saved is
the leader.

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c, p             ``replica``, ``center``, ``num_replicas``
tau                   ``period``, in optimizer steps
r                     ``leader_rate`` once per period, and ``step_rate`` spread over it
eta g^i               ``local_update``: whatever the module's optimizer does
====================  =====================================================================================

The leader descends F alone, so that where it comes to rest F is stationary, and there is no symmetric trap between two
minima (EASGD's, on ``(x^2 - 1)^2 / 4`` with rho < 2/3). A follower may still be held in another minimum than the
leader's: there where r / eta < 1/4.

In a period's last step the leader pushes ``x - c``, the others zero, and each tells the mean of its training losses
over the period; both are read in the next period's first step. So an exchange is one all-reduce, which goes on beside
whatever lies between two steps, and after a whole number of periods the center is the leader's current parameters.

Departures:

* The losses of a period are known with the exchange that ends the period. They therefore choose the replica that pushes
  with the *next* exchange: the leader's parameters are new, and its election is one period old. In the first two
  periods no replica is pulled.
* There is one leader. The paper also has one for each group of replicas; here a replica may be a group of devices
  (``replica_size``), which compute one gradient together.
* As in the authors' code, the rates do not follow the learning rate. The authors' code averages the replicas for its
  evaluations; here the leader is evaluated.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.algorithms._accumulation import require_period
from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.interfaces import Center, Replica

__all__ = ["LSGD", "elected"]


def elected(losses: Tensor) -> int | None:
    """Returns the index of the lowest loss, the first of equal ones; None where none is finite.

    Args:
        losses: (num_replicas,), not finite for a replica that cannot lead.
    """
    known = torch.where(losses.isfinite(), losses, math.inf)
    leader = int(known.argmin())
    return leader if math.isfinite(known[leader]) else None


class LSGD(Algorithm):
    """Leader SGD with any optimizer inside.

    Reductions: with both rates 0, or with one replica, ``num_replicas`` independent runs. Effective step size: that of
    one replica; it does not grow with their number. Extra memory: the leader and the displacement from it, two vectors
    of the parameters' size. A step costs two passes more.

    A replica that has no loss for a period, or one that is not finite, does not lead; of equal losses the lowest index
    leads. After an exchange with which nobody led, nobody is pulled until the next.
    """

    synchronous_only = True  # the losses of one exchange elect one leader
    num_told = 3  # whether a loss is known; the loss; whether this replica has pushed as the leader
    needs_loss = True

    def __init__(self, period: int = 16, leader_rate: float = 0.1, step_rate: float = 0.1) -> None:
        """Creates the algorithm.

        Args:
            period: optimizer steps from one exchange to the next, >= 1. Default 16 (the authors' code: 4, 16 or 64).
            leader_rate: the pull once per period, >= 0. Default 0.1 (there: c).
            step_rate: the pull of a whole period's steps together, >= 0. Default 0.1 (there: p).

        Raises:
            ValueError: an argument is out of range, or ``leader_rate + step_rate / period`` is above 1, which
                overshoots the leader.
        """
        self.period = require_period("LSGD", period)
        for name, rate in (("leader_rate", leader_rate), ("step_rate", step_rate)):
            if not 0 <= rate < math.inf:
                raise ValueError(f"LSGD({name}={rate!r}): must be a finite number, at least 0")
        if leader_rate + step_rate / period > 1:
            raise ValueError(
                f"LSGD(period={period}, leader_rate={leader_rate}, step_rate={step_rate}): leader_rate + step_rate / "
                "period must be at most 1, where a step ends at the leader"
            )
        self.leader_rate = leader_rate
        self.step_rate = step_rate
        self._leader: Tensor | None = None  # the center as it was pulled
        self._read_at = 0
        self._follows = self._leads = False  # whether it is pulled in this period; whether it pushes at its end
        self._buffer: Tensor | None = None
        self._forget_losses()
        self._has_loss = False  # whether any was ever observed

    @property
    def is_ending(self) -> bool:
        """Whether the next ``step`` is the last of a period and pushes."""
        return self.clock % self.period == self.period - 1

    def start(self, replica: Replica, center: Center) -> None:
        """Forgets the leader and the losses so far. See ``Algorithm.start``."""
        super().start(replica, center)
        self._leader = self._buffer = None
        self._forget_losses()

    def _forget_losses(self) -> None:
        self._loss_sum: Tensor | float = 0.0
        self._num_losses = 0

    def observe_loss(self, loss: Tensor) -> None:
        """Adds a mini-batch's loss, a number, to the period's; it stays on its device. See ``Algorithm``."""
        self._loss_sum = self._loss_sum + loss.detach().double()
        self._num_losses += 1
        self._has_loss = True

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks at the beginning of a period, for the center; at its end only for the device.

        Raises:
            ValueError: two periods are over, and no loss was observed.
        """
        is_first, is_last = self.is_due, self.is_ending
        leader = self._leader
        if is_first or leader is None:
            leader = self._leader = self._begin(center)
        rate = (self.leader_rate if is_first else 0.0) + self.step_rate / self.period
        is_pulled = self._follows and rate != 0
        if is_pulled:
            displacement = self._buffer = replica.read(out=self._buffer).sub_(leader)
        local_update()  # x <- x - eta g(x)
        if is_pulled:
            replica.add_(displacement, alpha=-rate)  # x <- x - r (x_t - c)
        if is_last:
            self._end(replica, center, leader)
        self.clock += 1

    def _begin(self, center: Center) -> Tensor:
        """Returns where the leader is; elects the next leader, on all replicas the same."""
        snapshot = center.pull()
        self._read_at = snapshot.clock
        is_known, losses, has_led = center.told().unbind(1)
        self._leads = elected(losses.where(is_known > 0, math.nan)) == center.replica
        self._follows = bool(has_led.any()) and not has_led[center.replica]
        return snapshot.value.clone()

    def _end(self, replica: Replica, center: Center, leader: Tensor) -> None:
        """Tells the period's loss, and adds to the center what makes it the leader that was elected."""
        if self.clock >= self.period and not self._has_loss:
            raise ValueError(
                f"{self!r}: two periods are over and no training loss was observed; return it from training_step, "
                "which manual optimization need not do, or take a method without a leader: 'local_sgd', 'easgd'"
            )
        center.tell(self._losses())
        self._forget_losses()
        delta = self._buffer = replica.read(out=self._buffer).sub_(leader)
        if not self._leads:
            delta.mul_(0.0)  # what is not finite stays so: a follower that has diverged is found like a leader
        center.push(delta, read_at=self._read_at)  # c <- x^l

    def _losses(self) -> Tensor | list[float]:
        """Returns whether the period's mean loss is known, that or 0, and whether this replica leads; on its device."""
        loss = self._loss_sum / self._num_losses if self._num_losses else math.nan
        if isinstance(loss, Tensor):
            known = loss.isfinite()
            leads = torch.full_like(loss, self._leads)
            return torch.stack([known.to(loss.dtype), torch.where(known, loss, 0.0), leads])
        return [1.0, loss, self._leads] if math.isfinite(loss) else [0.0, 0.0, self._leads]

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period and both rates."""
        rates = {"leader_rate": self.leader_rate, "step_rate": self.step_rate}
        return {**super().hyperparameters(num_replicas), **rates}

    def state_dict(self) -> dict[str, Any]:
        """Returns the clock, the leader as it was pulled, the roles in this period, and the period's losses."""
        return {
            **super().state_dict(),
            "leader": saved(self._leader),
            "read_at": self._read_at,
            "follows": self._follows,
            "leads": self._leads,
            "loss_sum": float(self._loss_sum),
            "num_losses": self._num_losses,
            "has_loss": self._has_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._leader = restored(state["leader"])
        self._read_at = int(state["read_at"])
        self._follows, self._leads = bool(state["follows"]), bool(state["leads"])
        self._loss_sum, self._num_losses = float(state["loss_sum"]), int(state["num_losses"])
        self._has_loss = bool(state["has_loss"])

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"LSGD(period={self.period}, leader_rate={self.leader_rate}, step_rate={self.step_rate})"
