"""Center rules: what happens to a delta that arrives at the center.

A rule is the center's half of an algorithm: plain addition is what the elastic averaging paper does (Zhang,
Choromanska, LeCun, arXiv:1412.6651, eq. 4: ``c <- c + alpha * sum_i (x^i - c)``). Rules know neither replicas nor
transports: a transport calls them, under whatever lock makes the addition atomic.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Addition", "CenterRule", "MomentumCenter", "OuterOptimizer", "StalenessWeight"]


class CenterRule(ABC):
    """Says what the center does with a delta. Picklable; its state travels in checkpoints.

    Attributes:
        num_vectors: how many vectors of the center's size the rule remembers (a momentum: 1). They begin as zeros and
            live where the center does; the transport keeps them and hands them to ``apply_``.
        synchronous_only: whether ``apply_`` must see the whole center, always the same tensor, as only a synchronous
            transport promises.
    """

    num_vectors: int = 0
    synchronous_only: ClassVar[bool] = False

    @abstractmethod
    def weight(self, staleness: int) -> float:
        """Returns the factor that a delta gets.

        Args:
            staleness: additions that the center has seen since the replica read it, >= 0.
        """

    @abstractmethod
    def apply_(self, center: Tensor, delta: Tensor, *memory: Tensor, alpha: float = 1.0) -> None:
        """Adds ``alpha * delta`` to ``center`` in place, elementwise: a transport may call it by chunks.

        Args:
            center: (m,) the center or a chunk of it; modified.
            delta: (m,) of the same dtype and device; not modified.
            memory: ``num_vectors`` tensors like ``center``; modified.
            alpha: the delta's factor, ``weight`` included.
        """

    def applied(self, center: Tensor, delta: Tensor, out: Tensor) -> None:
        """Writes the result that ``apply_`` would give for ``center`` into ``out``. For a rule without vectors.

        Args:
            center: (m,) the center or a chunk of it; not modified.
            delta: (m,) of the same dtype and device, its weight included.
            out: (m,) likewise; it may be ``delta`` itself.
        """
        value = center.clone()
        self.apply_(value, delta)
        out.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the rule remembers between deltas besides its vectors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        del state


class Addition(CenterRule):
    """``c <- c + delta``: eq. 4 of arXiv:1412.6651 when ``delta`` is the elastic force."""

    def weight(self, staleness: int) -> float:
        """Returns 1: every delta counts the same, however old."""
        del staleness
        return 1.0

    def apply_(self, center: Tensor, delta: Tensor, *memory: Tensor, alpha: float = 1.0) -> None:
        """Adds ``alpha * delta`` to ``center`` in place."""
        del memory
        center.add_(delta, alpha=alpha)

    def applied(self, center: Tensor, delta: Tensor, out: Tensor) -> None:
        """Writes ``center + delta`` into ``out``, in one pass."""
        torch.add(center, delta, out=out)

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return "Addition()"


class StalenessWeight(CenterRule):
    """``c <- c + delta / (s + 1)``, s the delta's staleness: DynSGD.

    Jiang, Cui, Zhang, Yu, "Heterogeneity-aware distributed parameter servers", SIGMOD 2017, in the form of Hermans'
    thesis (CERN, 2017), algorithm of DynSGD. His text divides by s and his algorithm by s + 1; this is the algorithm.
    The transport asks for the weight under the lock of the addition, so that s is exact. Over a synchronous center
    every delta has staleness 0, and this is ``Addition``.
    """

    def weight(self, staleness: int) -> float:
        """Returns 1 / (staleness + 1)."""
        return 1.0 / (staleness + 1)

    def apply_(self, center: Tensor, delta: Tensor, *memory: Tensor, alpha: float = 1.0) -> None:
        """Adds ``alpha * delta`` to ``center`` in place."""
        del memory
        center.add_(delta, alpha=alpha)

    def applied(self, center: Tensor, delta: Tensor, out: Tensor) -> None:
        """Writes ``center + delta`` into ``out``, in one pass."""
        torch.add(center, delta, out=out)

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return "StalenessWeight()"


class MomentumCenter(CenterRule):
    """SGD with momentum at the center, a delta being minus the gradient.

    ::

        v <- mu v + delta
        c <- c + lr (delta + mu v)      Nesterov, in look-ahead coordinates: c is where replicas differentiate
        c <- c + lr v                   heavy ball

    To the last bit what ``torch.optim.SGD(lr, momentum, nesterov)`` does with the gradient ``-delta``. It is the master
    of MDOWNPOUR (lr 1), BMUF (lr zeta, momentum eta of the paper), SlowMo and DiLoCo's outer step.
    """

    num_vectors = 1

    def __init__(self, momentum: float, lr: float = 1.0, *, nesterov: bool = True) -> None:
        """Creates the rule.

        Args:
            momentum: mu, in [0, 1).
            lr: factor of each step, > 0. Default 1.
            nesterov: which form. Default Nesterov's.

        Raises:
            ValueError: ``momentum`` or ``lr`` is out of range.
        """
        if not 0 <= momentum < 1:
            raise ValueError(f"MomentumCenter(momentum={momentum!r}): must be at least 0 and below 1")
        if not 0 < lr < float("inf"):
            raise ValueError(f"MomentumCenter(lr={lr!r}): must be a finite number above 0")
        self.momentum = momentum
        self.lr = lr
        self.nesterov = nesterov

    def weight(self, staleness: int) -> float:
        """Returns 1: every delta counts the same, however old."""
        del staleness
        return 1.0

    def apply_(self, center: Tensor, delta: Tensor, *memory: Tensor, alpha: float = 1.0) -> None:
        """Steps ``center`` and the velocity, ``memory[0]``, in place."""
        if alpha != 1:
            delta = alpha * delta
        velocity = memory[0].mul_(self.momentum).add_(delta)
        step = delta.add(velocity, alpha=self.momentum) if self.nesterov else velocity
        center.add_(step, alpha=self.lr)

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"MomentumCenter(momentum={self.momentum}, lr={self.lr}, nesterov={self.nesterov})"


class OuterOptimizer(CenterRule):
    """Any ``torch.optim.Optimizer`` steps the center, a delta being minus the gradient.

    For a synchronous center, which every replica steps alike; the optimizer's state is each replica's own and travels
    in checkpoints. ``MomentumCenter`` does what SGD does, over any center.
    """

    synchronous_only = True

    def __init__(self, factory: Callable[[list[Tensor]], Optimizer]) -> None:
        """Creates the rule; the optimizer is made with the first delta.

        Args:
            factory: called with a list of one tensor, (d,), that requires gradients; picklable, for instance
                ``functools.partial(torch.optim.AdamW, lr=0.1)``.
        """
        self.factory = factory
        self._optimizer: Optimizer | None = None
        self._parameter: Tensor | None = None
        self._state: dict[str, Any] | None = None  # loaded before there is an optimizer

    def weight(self, staleness: int) -> float:
        """Returns 1: every delta counts the same, however old."""
        del staleness
        return 1.0

    def apply_(self, center: Tensor, delta: Tensor, *memory: Tensor, alpha: float = 1.0) -> None:
        """Makes one step of the optimizer with the gradient ``-delta``."""
        del memory
        if self._parameter is None or self._parameter.data_ptr() != center.data_ptr():
            state = self.state_dict()["optimizer"]  # of a center that has moved to another tensor
            self._parameter = torch.nn.Parameter(center)  # shares its memory
            self._optimizer = self.factory([self._parameter])
            if state is not None:
                self._optimizer.load_state_dict(state)
            self._state = None
        assert self._optimizer is not None
        self._parameter.grad = -alpha * delta
        self._optimizer.step()
        self._parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's state, None before the first delta."""
        return {"optimizer": self._state if self._optimizer is None else self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._state = state["optimizer"]
        self._optimizer = self._parameter = None

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"OuterOptimizer({self.factory!r})"
