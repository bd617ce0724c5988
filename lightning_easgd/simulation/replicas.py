"""A simulated replica: a vector, and its local update on an objective."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.simulation.objectives import Objective

__all__ = ["OptimizerFactory", "Vector", "descent"]

OptimizerFactory = Callable[[list[Tensor]], Optimizer]


class Vector:
    """A replica that is one tensor, ``value``; what is written may be broadcast to its shape."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def read(self, out: Tensor | None = None) -> Tensor:
        """Copies the vector into ``out`` (allocated when None) and returns it."""
        return self.value.clone() if out is None else out.copy_(self.value)

    def add_(self, update: Tensor, *, alpha: float = 1.0) -> None:
        """Adds ``alpha * update`` in place."""
        self.value.add_(update, alpha=alpha)

    def write_(self, value: Tensor) -> None:
        """Replaces the vector by ``value``."""
        self.value.copy_(value)


def descent(
    algorithm: Algorithm,
    objective: Objective,
    x: Tensor,
    lr: float | None,
    optimizer: OptimizerFactory | None,
    generator: torch.Generator,
) -> Callable[[], None]:
    """Returns one local update that moves ``x``: plain SGD with rate ``lr``, or the optimizer's.

    The algorithm's proximal term joins the gradient, and the algorithm is bound to the optimizer. Where it needs the
    loss it hears of that which is differentiated.
    """
    proximal_term = algorithm.proximal_term
    twin = torch.Generator()

    def gradient() -> Tensor:
        if algorithm.needs_loss:
            twin.set_state(generator.get_state())  # the gradient is to draw the same
            algorithm.observe_loss(objective.loss(x, twin))
        slope, term = objective.gradient(x, generator), proximal_term()
        return slope if term is None else slope.add(x - term.anchor, alpha=term.stiffness)

    if lr is not None and optimizer is None:
        rate = -lr

        def descend() -> None:
            x.add_(gradient(), alpha=rate)

        return descend
    if optimizer is not None and lr is None:
        parameter = torch.nn.Parameter(x)  # shares its memory
        stepper = optimizer([parameter])
        algorithm.bind(stepper, [parameter])

        def step() -> None:
            parameter.grad = gradient()
            stepper.step()

        return step
    raise ValueError(f"lr={lr!r}, optimizer={optimizer!r}: give the one or the other")
