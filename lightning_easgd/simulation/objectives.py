"""Objectives that the replicas of a simulation descend: functions of a vector, with noise.

A separable objective acts on each coordinate by itself, so that d coordinates are d runs of a one-dimensional problem.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DoubleWell", "Loss", "MultiplicativeNoise", "Objective", "Quadratic", "Separable"]


class Objective(Protocol):
    """An objective that the replicas descend."""

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a stochastic gradient at ``x``, a new tensor of its shape: (d,), or (p, d), one row per replica."""
        ...

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the loss of which ``gradient`` is the gradient, given as the generator is now: a number, or (p,).

        Called only for algorithms that need it.
        """
        ...


class Separable(ABC):
    """An objective that draws its noise first, by replica, and can then give many replicas' gradients at once.

    ``slope`` is elementwise, so that one row of many has the bits that it has alone.
    """

    @property
    @abstractmethod
    def is_noisy(self) -> bool:
        """Whether anything is drawn."""

    @abstractmethod
    def draw_(self, out: Tensor, generator: torch.Generator) -> None:
        """Fills ``out``, contiguous, with what a gradient needs; not called where nothing is drawn."""

    @abstractmethod
    def slope(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns the gradient at ``x``, a new tensor of its shape, given what was drawn."""

    @abstractmethod
    def height(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns the loss of each coordinate of ``x``, a new tensor of its shape, given what was drawn."""

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a stochastic gradient at ``x``. See ``Objective``."""
        return self.slope(x, self._drawn(x, generator))

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the sum over the coordinates. See ``Objective``."""
        return self.height(x, self._drawn(x, generator)).sum(-1)

    def _drawn(self, x: Tensor, generator: torch.Generator) -> Tensor | None:
        if not self.is_noisy:
            return None
        drawn = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.draw_(drawn, generator)
        return drawn


class _NormalNoise(Separable):
    """Gradients minus normal noise of standard deviation ``noise``."""

    noise: float

    @property
    def is_noisy(self) -> bool:
        return self.noise != 0

    def draw_(self, out: Tensor, generator: torch.Generator) -> None:
        out.normal_(generator=generator)

    def slope(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        exact = self.exact(x)
        return exact if drawn is None else exact.sub_(drawn, alpha=self.noise)

    def height(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        exact = self.exact_height(x)
        return exact if drawn is None else exact.sub_(drawn * x, alpha=self.noise)

    @abstractmethod
    def exact(self, x: Tensor) -> Tensor:
        """Returns the gradient without noise, a new tensor."""

    @abstractmethod
    def exact_height(self, x: Tensor) -> Tensor:
        """Returns the loss of each coordinate without noise, a new tensor."""


@dataclass(frozen=True)
class Quadratic(_NormalNoise):
    """``curvature x^2 / 2`` in each coordinate; its gradient with normal noise of standard deviation ``noise``.

    Attributes:
        curvature: h; a number, or (d,).
        noise: sigma, >= 0.
    """

    curvature: float | Tensor = 1.0
    noise: float = 0.0

    def exact(self, x: Tensor) -> Tensor:
        """Returns ``curvature x``."""
        return x * self.curvature

    def exact_height(self, x: Tensor) -> Tensor:
        """Returns ``curvature x^2 / 2``."""
        return x * x * self.curvature / 2


@dataclass(frozen=True)
class DoubleWell(_NormalNoise):
    """``(x^2 - 1)^2 / 4`` in each coordinate: minima at -1 and 1. Noise as in ``Quadratic``."""

    noise: float = 0.0

    def exact(self, x: Tensor) -> Tensor:
        """Returns ``x^3 - x``."""
        return x * x * x - x

    def exact_height(self, x: Tensor) -> Tensor:
        """Returns ``(x^2 - 1)^2 / 4``."""
        return (x * x - 1) ** 2 / 4


@dataclass(frozen=True)
class MultiplicativeNoise(Separable):
    """A quadratic whose curvature is drawn anew for each gradient and coordinate, Gamma-distributed.

    Attributes:
        mean: of the curvature, > 0.
        std: its standard deviation, > 0.
    """

    mean: float
    std: float

    @property
    def is_noisy(self) -> bool:
        """Returns that it is."""
        return True

    def draw_(self, out: Tensor, generator: torch.Generator) -> None:
        """Draws the curvatures."""
        shape, scale = (self.mean / self.std) ** 2, self.std**2 / self.mean
        torch.mul(torch._standard_gamma(out.fill_(shape), generator=generator), scale, out=out)

    def slope(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns ``h x``."""
        assert drawn is not None
        return drawn * x

    def height(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns ``h x^2 / 2``."""
        assert drawn is not None
        return drawn * x * x / 2


@dataclass(frozen=True)
class Loss:
    """A user's function, differentiated by autograd.

    Attributes:
        function: takes x, (d,) or (p, d), and returns a loss, or one a row; draws nothing at random but from the
            generator that it gets as second argument.
    """

    function: Callable[[Tensor, torch.Generator], Tensor]

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the gradient of the sum of what the function returns: each row's own."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.function(point, generator).sum(), point)
        return gradient

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns what the function does."""
        return self.function(x, generator)
