"""The loop of Parle and Entropy-SGD: local updates around a point that stands, and one step of that point per period.

Of one replica, x its outer point, y the module's parameters, z their running average::

    y <- y - eta' [g(y) + (y - x) / gamma]        every step: the module's optimizer, the force in its gradient
    z <- alpha z + (1 - alpha) y                  every step
    v <- mu v + eta d                             in a period's last step, d the outer gradient:
    x <- x - eta d - mu v                             d = (x - z) + (1 / rho) (x - target)
    y <- x;  z <- x

``(x - z) / gamma`` is the gradient of the local entropy; 1 / gamma is absorbed in the outer rate eta. With every outer
step gamma and rho shrink: ``max(minimum, initial s^m)`` after m of them.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms._accumulation import require_period
from lightning_easgd.algorithms._state import restored, saved
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.interfaces import Center, ProximalTerm, Replica

__all__ = [
    "InnerRate",
    "LocalEntropy",
    "Schedule",
    "annealed",
    "check_annealing",
    "nesterov_bound",
    "outer_step_",
    "scoping_in_force",
]

InnerRate = Literal["constant", "scheduled"]


def annealed(initial: float, minimum: float, scoping: float, num_steps: int) -> float:
    """Returns ``max(minimum, initial * scoping**num_steps)``; infinity stays."""
    return initial if math.isinf(initial) else max(minimum, initial * scoping**num_steps)


def outer_step_(x: Tensor, velocity: Tensor, move: Tensor, *, momentum: float) -> None:
    """Makes one step with Nesterov momentum: ``v <- mu v + move;  x <- x - move - mu v``.

    Args:
        x: the outer point; modified.
        velocity: v, of the same shape, in units of x; modified.
        move: the learning rate times the gradient; kept.
        momentum: mu, in [0, 1).
    """
    velocity.mul_(momentum).add_(move)
    x.sub_(move).sub_(velocity, alpha=momentum)


def nesterov_bound(momentum: float) -> float:
    """Returns the s below which ``v <- mu v + s x; x <- x - s x - mu v`` is stable: 2 (1 + mu) / (1 + 2 mu).

    The map has trace ``1 + mu - s (1 + mu)`` and determinant ``mu (1 - s)``; of the Jury conditions
    ``1 + trace + det > 0`` is the first to fail.
    """
    return 2 * (1 + momentum) / (1 + 2 * momentum)


def check_annealing(owner: str, scoping: float | None, **pairs: tuple[float, float]) -> None:
    """Raises ``ValueError`` unless ``scoping`` is in (0, 1] or None, and each pair holds an initial and a least value.

    Args:
        owner: the algorithm's name, for the message.
        scoping: s.
        pairs: by argument, for instance ``scope=(scope, min_scope)``: 0 < minimum <= initial, which may be infinite.
    """
    if scoping is not None and not 0 < scoping <= 1:
        raise ValueError(f"{owner}(scoping={scoping!r}): must be above 0 and at most 1, or None")
    for name, (initial, minimum) in pairs.items():
        if not initial > 0:
            raise ValueError(f"{owner}({name}={initial!r}): must be above 0; infinity switches it off")
        if not 0 < minimum <= initial:
            raise ValueError(f"{owner}(min_{name}={minimum!r}): must be above 0 and at most {name}={initial!r}")


def scoping_in_force(algorithm: Algorithm, scoping: float | None) -> float:
    """Returns ``scoping``, or ``1 - 1 / (2 B)`` where it is None, B the algorithm's ``batches_per_epoch``.

    Raises:
        ValueError: both are None.
    """
    if scoping is not None:
        return scoping
    if algorithm.batches_per_epoch is None:
        raise ValueError(
            f"{type(algorithm).__name__}(scoping=None) follows the number of batches in an epoch, which the training "
            "data do not tell: give scoping, for instance 0.999"
        )
    return 1 - 0.5 / algorithm.batches_per_epoch


class Schedule:
    """The learning rates of an optimizer, and the references that its scheduler multiplies.

    A group's reference is what torch's schedulers leave in it, ``max_lr`` or else ``initial_lr``; without a scheduler
    the rate that it had when it was first seen.

    Args:
        owner: the algorithm's name, for messages.
        optimizer: torch's own.
        noted: the rates of the first groups as they were first seen, for groups that have been seen before.

    Raises:
        ValueError: a group has no learning rate, or none has one above 0.
    """

    def __init__(self, owner: str, optimizer: Optimizer, noted: Sequence[float] = ()) -> None:
        self._optimizer = optimizer
        self.noted = list(noted)
        if not all("lr" in group for group in optimizer.param_groups):
            raise ValueError(f"{owner}: {type(optimizer).__name__} has a parameter group without 'lr', which it needs")
        if not any(reference > 0 for reference in self.references()):
            raise ValueError(
                f"{owner}: all learning rates of {type(optimizer).__name__} are 0, so that there is none to measure "
                "the schedule by; begin above 0, or use a torch scheduler, which leaves an 'initial_lr'"
            )

    def references(self) -> list[float]:
        """Returns each group's reference."""
        groups = self._optimizer.param_groups
        self.noted += [float(group["lr"]) for group in groups[len(self.noted) :]]
        return [
            float(group.get("max_lr", group.get("initial_lr", noted)))
            for group, noted in zip(groups, self.noted, strict=True)
        ]

    def rates(self) -> list[float]:
        """Returns each group's current learning rate."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def ratio(self) -> float:
        """Returns rate over reference, of the first group whose reference is above 0."""
        pairs = zip(self.rates(), self.references(), strict=True)
        return next(rate / reference for rate, reference in pairs if reference > 0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Puts the references in the place of the rates for a while; then the very objects that were there are back."""
        groups = list(self._optimizer.param_groups)
        scheduled = [group["lr"] for group in groups]
        for group, reference in zip(groups, self.references(), strict=True):
            lr = group["lr"]  # some optimizers take a tensor and nothing else
            group["lr"] = torch.full_like(lr, reference) if isinstance(lr, Tensor) else reference
        try:
            yield
        finally:
            for group, lr in zip(groups, scheduled, strict=True):
                group["lr"] = lr


class LocalEntropy(Algorithm):
    """The loop above, without elastic coupling. Abstract.

    Extra memory: x, z, v and one buffer, four vectors of the parameters' size.

    Attributes:
        outer_lr: eta, as long as the module's scheduler has not changed the learning rate.
        outer_momentum: mu.
        scope: gamma before the first outer step.
        min_scope: the least gamma.
        averaging_decay: alpha.
        scoping: s, or None where it follows ``batches_per_epoch``.
        inner_lr: "constant" or "scheduled".
    """

    synchronous_only = True  # the center is the replicas' mean

    def __init__(
        self,
        period: int,
        outer_lr: float,
        outer_momentum: float,
        scope: float,
        min_scope: float,
        averaging_decay: float,
        scoping: float | None,
        inner_lr: InnerRate,
    ) -> None:
        name = type(self).__name__
        self.period = require_period(name, period)
        if not 0 < outer_lr < math.inf:
            raise ValueError(f"{name}(outer_lr={outer_lr!r}): must be a finite number above 0")
        if not 0 <= outer_momentum < 1:
            raise ValueError(f"{name}(outer_momentum={outer_momentum!r}): must be at least 0 and below 1")
        if not 0 <= averaging_decay < 1:
            raise ValueError(f"{name}(averaging_decay={averaging_decay!r}): must be at least 0 and below 1")
        if inner_lr not in get_args(InnerRate):
            raise ValueError(f"{name}(inner_lr={inner_lr!r}): must be 'constant' or 'scheduled'")
        check_annealing(name, scoping, scope=(scope, min_scope))
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        self.scope, self.min_scope = scope, min_scope
        self.averaging_decay = averaging_decay
        self.scoping = scoping
        self.needs_batches_per_epoch = scoping is None
        self.inner_lr: InnerRate = inner_lr
        self._schedule: Schedule | None = None
        self._outer: Tensor | None = None  # x
        self._average: Tensor | None = None  # z
        self._velocity: Tensor | None = None  # v
        self._buffer: Tensor | None = None
        self._rate = 0.0  # eta of the last outer step

    @property
    def is_ending(self) -> bool:
        """Whether the next ``step`` is the last of a period and adds to the center."""
        return self.clock % self.period == self.period - 1

    @property
    def outer_steps(self) -> int:
        """The number m of outer steps that lie behind."""
        return self.clock // self.period

    @property
    def current_scope(self) -> float:
        """The current scope gamma."""
        return self._annealed(self.scope, self.min_scope)

    @property
    @abstractmethod
    def current_stiffness(self) -> float:
        """The current 1 / rho; 0 without coupling."""

    def _annealed(self, initial: float, minimum: float) -> float:
        return annealed(initial, minimum, scoping_in_force(self, self.scoping), self.outer_steps)

    def bind(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Takes the optimizer whose learning rates the outer rate follows. See ``Algorithm.bind``.

        Raises:
            ValueError: the optimizer has no learning rate above 0.
        """
        del parameters
        self._schedule = Schedule(type(self).__name__, optimizer, self._schedule.noted if self._schedule else ())

    def proximal_term(self) -> ProximalTerm | None:
        """Returns ``||y - x||^2 / (2 gamma)``; None where gamma is infinite, and before ``start``."""
        scope = self.current_scope
        return None if self._outer is None or math.isinf(scope) else ProximalTerm(1 / scope, self._outer)

    def start(self, replica: Replica, center: Center) -> None:
        """Begins a period at the replica's parameters, with an outer velocity of zero. See ``Algorithm.start``."""
        super().start(replica, center)
        self._outer = replica.read()
        self._average = self._outer.clone()
        self._velocity = torch.zeros_like(self._outer)
        self._buffer = torch.empty_like(self._outer)

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks only where a period ends or, if the target is new, begins; for the center.

        Raises:
            RuntimeError: ``start`` was not called.
            ValueError: scoping follows the number of batches in an epoch, and that is not known.
        """
        _, average, _, buffer = self._vectors()
        scoping_in_force(self, self.scoping)  # at the first step, not where the first outer step is due
        self._begin(replica, center)
        if self._schedule is None or self.inner_lr == "scheduled":
            local_update()  # y <- y - eta' [g(y) + (y - x) / gamma]
        else:
            with self._schedule.held():
                local_update()
        self._perturb(replica)
        average.lerp_(replica.read(out=buffer), 1 - self.averaging_decay)  # z <- alpha z + (1 - alpha) y
        if self.is_ending:
            self._end(replica, center)
        self.clock += 1

    def _begin(self, replica: Replica, center: Center) -> None:
        """Does what a step begins with: nothing."""
        del replica, center

    def _perturb(self, replica: Replica) -> None:
        """Adds to y after the local update: nothing."""
        del replica

    def _end(self, replica: Replica, center: Center) -> None:
        """Makes the outer step and tells the center. Reads the center only now: the sum had a whole period."""
        x, z, velocity, buffer = self._vectors()
        snapshot = center.pull()
        eta = self._next_rate(velocity)
        move = torch.sub(x, z, out=z)
        if stiffness := self.current_stiffness:
            move.add_(torch.sub(x, snapshot.value, out=buffer), alpha=stiffness)
        outer_step_(x, velocity, move.mul_(eta), momentum=self.outer_momentum)
        center.push(torch.sub(x, snapshot.value, out=buffer).div_(center.num_replicas), read_at=snapshot.clock)
        self._return(replica)

    def _return(self, replica: Replica) -> None:
        """``y <- x; z <- x``."""
        x, z, *_ = self._vectors()
        replica.write_(x)
        z.copy_(x)

    def _next_rate(self, *velocities: Tensor) -> float:
        """Returns eta, and scales the velocities down with it where it has fallen.

        So does torch.optim.SGD, whose velocity is without its rate; where that has risen it scales the velocity up,
        too, and with it the rounding error of whatever was found at a rate near zero.
        """
        eta = self.outer_lr * (1.0 if self._schedule is None else self._schedule.ratio())
        if eta < self._rate:
            for velocity in velocities:
                velocity.mul_(eta / self._rate)
        self._rate = eta
        return eta

    def _vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._outer is None or self._average is None or self._velocity is None or self._buffer is None:
            raise RuntimeError(f"{type(self).__name__}.step: call start(replica, center) first")
        return self._outer, self._average, self._velocity, self._buffer

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period and all arguments; ``scoping`` is the one in force, None while unknown."""
        known = self.scoping is not None or self.batches_per_epoch is not None
        return {
            **super().hyperparameters(num_replicas),
            **self._arguments(),
            "scoping": scoping_in_force(self, self.scoping) if known else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns clock, number of batches in an epoch, x, z, v, the last outer rate and the first learning rates."""
        return {
            **super().state_dict(),
            "batches_per_epoch": self.batches_per_epoch,
            "rate": self._rate,
            "noted_lrs": None if self._schedule is None else list(self._schedule.noted),
            "outer": saved(self._outer),
            "average": saved(self._average),
            "velocity": saved(self._velocity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self.batches_per_epoch = state["batches_per_epoch"]
        self._rate = float(state["rate"])
        if self._schedule is not None and state["noted_lrs"] is not None:
            self._schedule.noted = [float(lr) for lr in state["noted_lrs"]]
        self._outer, self._average = restored(state["outer"]), restored(state["average"])
        self._velocity = restored(state["velocity"])
        self._buffer = None if self._outer is None else torch.empty_like(self._outer)

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._arguments().items())})"

    def _arguments(self) -> dict[str, Any]:
        return {
            "period": self.period,
            "outer_lr": self.outer_lr,
            "outer_momentum": self.outer_momentum,
            "scope": self.scope,
            "min_scope": self.min_scope,
            "averaging_decay": self.averaging_decay,
            "scoping": self.scoping,
            "inner_lr": self.inner_lr,
        }
