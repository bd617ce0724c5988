"""Elastic averaging that exchanges early: where a replica gains no more by going on alone.

Joeri Hermans, "On scalable deep learning and parallelizing gradient descent", thesis (Maastricht and CERN, 2017): a
replica's work is useful while its gradient pulls it further than the elastic force will pull it back. It exchanges
before its period is up when::

    ||eta g(x)|| - ||eta rho (x - c)|| < eta

====================  =====================================================================================
symbol                name
====================  =====================================================================================
eta g(x)              ``update``: what the local update has just subtracted, whatever the optimizer is
x - c                 ``displacement``, x before that update, c the center as this replica read it last
eta rho               ``moving_rate``
eta (on the right)    ``margin``; by default the optimizer's learning rate, the largest of its groups'
====================  =====================================================================================

Between two exchanges EASGD's local steps feel no elastic force, so that this is a trigger and no state of rest. Near a
minimum, where ``||g|| < 1``, it holds in every step: the method then exchanges in each, as with a period of 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms._elastic import ElasticLoop, ElasticRates, displacement_
from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.interfaces import Center, Replica

__all__ = ["EarlyExchange", "Equilibrium"]


class Equilibrium:
    """Watches the local updates of one replica for the condition above.

    Memory: two vectors of the parameters' size. A step costs two reads of the parameters and two norms more, and on
    CUDA it waits for the device.

    Args:
        margin: the right-hand side; any number, infinities included. None: the bound optimizer's learning rate.
    """

    def __init__(self, margin: float | None = None) -> None:
        self.margin = margin
        self._optimizer: Optimizer | None = None
        self._before: Tensor | None = None  # x before the local update
        self._anchor: Tensor | None = None  # c as it was read last
        self._update_norm = self._displacement_norm = torch.zeros(())

    def bind(self, optimizer: Optimizer) -> None:
        """Takes the optimizer whose learning rate is the margin where none was given.

        Raises:
            ValueError: none was given, and a parameter group has no learning rate.
        """
        if self.margin is None and not all("lr" in group for group in optimizer.param_groups):
            name = type(optimizer).__name__
            raise ValueError(f"EASGD(margin=None): {name} has a parameter group without 'lr', so give margin")
        self._optimizer = optimizer

    def start(self) -> None:
        """Forgets the center that was read: the condition holds at the earliest after the next reading.

        Raises:
            ValueError: there is no margin, and no optimizer that has one.
        """
        self.margin_in_force()
        self._before = self._anchor = None

    def around(self, replica: Replica, local_update: Callable[[], None], spare: Tensor | None) -> None:
        """Makes the local update and measures it.

        Args:
            replica: the parameters.
            local_update: called once.
            spare: (d,) to overwrite, in a step that exchanges nothing; None in one that does, where ``reads`` follows.
        """
        self._before = replica.read(out=self._before)
        local_update()
        update = replica.read(out=self._anchor if spare is None else spare).sub_(self._before)
        self._update_norm = torch.linalg.vector_norm(update)
        if spare is None:
            self._anchor = update  # its memory; the value comes with ``reads``
        elif self._anchor is not None:
            self._displacement_norm = torch.linalg.vector_norm(torch.sub(self._before, self._anchor, out=spare))

    def reads(self, displacement: Tensor) -> None:
        """Notes the center that was read in this step, by x - c, (d,), x as it was before the local update."""
        assert self._before is not None
        self._anchor = torch.sub(self._before, displacement, out=self._anchor)
        self._displacement_norm = torch.linalg.vector_norm(displacement)

    def holds(self, moving_rate: float) -> bool:
        """Returns whether the condition holds with the last local update. Not before a center was read."""
        if self._anchor is None:
            return False
        gap = float(self._update_norm - abs(moving_rate) * self._displacement_norm)
        return gap < self.margin_in_force()

    def margin_in_force(self) -> float:
        """Returns the current margin.

        Raises:
            ValueError: there is none, and no optimizer that has one.
        """
        if self.margin is not None:
            return self.margin
        if self._optimizer is None:
            raise ValueError("EASGD(margin=None): call bind(optimizer, parameters) before start, or give margin")
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Returns the center that was read."""
        return {"anchor": saved(self._anchor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._anchor = restored(state["anchor"])


class EarlyExchange(ElasticLoop):
    """The loop of ``easgd`` with that trigger: ``EASGD(early_exchange=True)``. Each replica decides by itself.

    An exchange is the paper's, eqs. 5 and 6. The next is due a period after it, or in the step after one in which the
    condition holds. Memory: the message, and the two vectors of ``Equilibrium``.

    Args:
        period: tau, optimizer steps from one exchange to the next at most.
        margin: of the condition; see ``Equilibrium``.
    """

    asynchronous_only = True
    separable = False  # the condition is on a distance of the whole

    def __init__(self, period: int, margin: float | None = None) -> None:
        super().__init__(period)
        self._equilibrium = Equilibrium(margin)
        self._due_at = 0  # the clock at which the next exchange is due
        self._message: Tensor | None = None  # overwritten in steps that exchange nothing

    def is_due(self, clock: int) -> bool:
        """Whether the period is up at ``clock``, or the condition has held."""
        return clock >= self._due_at

    def bind(self, optimizer: Optimizer) -> None:
        """Takes the optimizer whose learning rate is the margin where none was given; raises like ``Equilibrium``."""
        self._equilibrium.bind(optimizer)

    def start(self, clock: int) -> None:
        """Makes an exchange due: a replica must have read a center to do without. Raises like ``Equilibrium``."""
        self._message = None
        self._equilibrium.start()
        self._due_at = clock

    def step(
        self, clock: int, replica: Replica, center: Center, local_update: Callable[[], None], rates: ElasticRates
    ) -> None:
        """Performs one iteration. Blocks only on an exchange, for the center's last additions."""
        alpha, _ = rates.of(center.num_replicas)
        if self.is_due(clock):
            self._due_at = clock + self.period
            x = self._message = replica.read(out=self._message)  # before anything moves
            force = center.exchange(x, displacement_, scale=rates.gain(center.num_replicas))  # c <- c + alpha (x - c)
            self._equilibrium.around(replica, local_update, None)  # x <- x - eta g(x)
            displacement = force.wait()
            replica.add_(displacement, alpha=-alpha)  # x <- x - alpha (x_t - c_t)
            self._equilibrium.reads(displacement)
            force.done()
        else:
            self._equilibrium.around(replica, local_update, self._message)
        if self._equilibrium.holds(alpha):
            self._due_at = clock + 1

    def arguments(self) -> dict[str, Any]:
        """Returns that it is on, and its margin as it was given."""
        return {"early_exchange": True, "margin": self._equilibrium.margin}

    def state_dict(self) -> dict[str, Any]:
        """Returns when the next exchange is due, and the center that was read."""
        return {"due_at": self._due_at, **self._equilibrium.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; after another form's, an exchange is due."""
        if "due_at" in state:
            self._due_at = int(state["due_at"])
            self._equilibrium.load_state_dict(state)
            self._message = None if state["anchor"] is None else torch.empty_like(state["anchor"])
