"""EAMSGD, elastic averaging with Nesterov momentum: arXiv:1412.6651, Algorithm 2 and section 2.

Synchronous form, all right-hand sides at time t::

    v^i <- delta v^i - eta g^i(x^i + delta v^i)
    x^i <- x^i + v^i - alpha (x^i - c)
    c   <- c + alpha sum_i (x^i - c)

The elastic force acts on x and stays out of the velocity. ``torch.optim.SGD(nesterov=True)`` keeps the look-ahead point
y = x + delta v in the module's parameters and v = -lr buf in its momentum buffer; with that,
``y <- y - lr (g(y) + delta buf)`` is the first line and the first half of the second, to the letter. So the module and
its optimizer stay as they are, and what is exchanged is::

    x^i = y^i - delta v^i = y^i + delta lr buf

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, v^i              read from ``replica`` (y) and the optimizer's momentum buffer
c, p                  ``center``, ``num_replicas``
tau                   ``period``, in optimizer steps
alpha, beta           ``moving_rate``, ``center_rate``, as in EASGD
delta, eta            the optimizer's momentum and learning rate, for each parameter group its own
====================  =====================================================================================

Departures: when the learning rate changes, torch's velocity is rescaled with it, since the buffer holds v / lr. x is
taken with the rate of the last step, which makes its move in every step exactly the first line's, the change included.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.algorithms.easgd import EASGD
from lightning_easgd.interfaces import Center, Replica

__all__ = ["EAMSGD"]


class EAMSGD(Algorithm):
    """Elastic averaging SGD with Nesterov momentum inside, exact on ``torch.optim.SGD(nesterov=True)``.

    The momentum is the module's optimizer's: the paper's is 0.99, with a learning rate 5 to 100 times below EASGD's.
    Reductions: with an optimizer without momentum it is bit-identical to EASGD. Effective step size: set by the center
    rate, as with EASGD, and multiplied by 1 / (1 - delta). Extra memory: one vector of the parameters' size.
    """

    separable = True
    initial_clock = 1

    def __init__(self, period: int = 10, moving_rate: float | None = None, center_rate: float | None = None) -> None:
        """Creates the algorithm. The arguments, their defaults and errors are those of ``EASGD``."""
        self._elastic = EASGD(period, moving_rate, center_rate)
        self.period = period
        self._optimizer: Optimizer | None = None
        self._parameters: list[tuple[Tensor, int]] = []  # each with the index of its parameter group
        self._lrs: list[float] = []  # of each group, as of the last step

    def rates(self, num_replicas: int) -> tuple[float, float]:
        """Returns (alpha, beta) as they are with so many replicas."""
        return self._elastic.rates(num_replicas)

    def check(self, num_replicas: int) -> None:
        """Refuses and warns of what ``EASGD.check`` does; raises like it."""
        self._elastic.check(num_replicas)

    def bind(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Takes the optimizer whose momentum is meant. See ``Algorithm.bind``.

        Raises:
            ValueError: it is not ``torch.optim.SGD``, or has momentum that is not Nesterov's.
        """
        if not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"EAMSGD is defined for torch.optim.SGD(nesterov=True), not for {type(optimizer).__name__}; 'easgd' "
                "takes any optimizer"
            )
        for i, group in enumerate(optimizer.param_groups):
            if group["momentum"] != 0 and not group["nesterov"]:
                raise ValueError(
                    f"EAMSGD is defined for torch.optim.SGD(nesterov=True); parameter group {i} has "
                    f"momentum={group['momentum']} and nesterov=False. Set nesterov=True, or take 'easgd'"
                )
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._optimizer = optimizer
        self._parameters = [(p, groups[id(p)]) for p in parameters]
        self._note_lrs()

    def start(self, replica: Replica, center: Center) -> None:
        """Prepares for the first step. See ``Algorithm.start``.

        Raises:
            ValueError: ``bind`` was not called before.
        """
        if self._optimizer is None:
            raise ValueError("EAMSGD.start: call bind(optimizer, parameters) first; the momentum is the optimizer's")
        self._elastic.start(replica, center)

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration of Algorithm 2. Blocks only on an exchange, for the center's last additions."""

        def update() -> None:
            local_update()  # v <- delta v - eta g(y);  x <- x + v;  y = x + delta v
            self._note_lrs()

        self._elastic.clock = self.clock
        self._elastic.step(_Behind(replica, self._add_behind), center, update)
        self.clock += 1

    def _note_lrs(self) -> None:
        assert self._optimizer is not None
        self._lrs = [float(group["lr"]) for group in self._optimizer.param_groups]

    def _add_behind(self, y: Tensor) -> None:
        """Adds ``delta lr buf`` to ``y`` (d,), which makes it x; nothing before the first step."""
        assert self._optimizer is not None
        views = y.view(-1).split_with_sizes([p.numel() for p, _ in self._parameters])
        for view, (parameter, group) in zip(views, self._parameters, strict=True):
            buffer = self._optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                momentum = self._optimizer.param_groups[group]["momentum"]
                view.view(parameter.shape).add_(buffer, alpha=momentum * self._lrs[group])

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period and both rates as they are with so many replicas."""
        alpha, beta = self.rates(num_replicas)
        return {**super().hyperparameters(num_replicas), "moving_rate": alpha, "center_rate": beta}

    def state_dict(self) -> dict[str, Any]:
        """Returns the clock and the learning rates of the last step; the velocity is in the optimizer's."""
        return {**super().state_dict(), "lrs": list(self._lrs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._lrs = [float(lr) for lr in state["lrs"]]

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"EAM{repr(self._elastic)[2:]}"


class _Behind:
    """The replica as x instead of the look-ahead point y. A move of x is one of y, as v stays."""

    def __init__(self, replica: Replica, add_behind: Callable[[Tensor], None]) -> None:
        self._replica, self._add_behind = replica, add_behind
        self.add_, self.write_ = replica.add_, replica.write_

    def read(self, out: Tensor | None = None) -> Tensor:
        x = self._replica.read(out=out)
        self._add_behind(x)
        return x
