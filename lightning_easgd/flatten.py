"""Parameters seen as one flat vector: the one boundary between a module's tensors and the center's coordinates.

The parameters' own storage is never rebound (compiled graphs, tied weights and optimizers keep their references); the
vector is a way to read and write them, with one ``torch._foreach_*`` call for all tensors.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["ParameterVector", "accumulation_dtype", "coupled_parameters"]


def accumulation_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Returns float64 if any parameter is float64, else float32: alpha (x - c) underflows in half precision."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


def coupled_parameters(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], left_out: Collection[str] = ()
) -> list[dict[str, nn.Parameter]]:
    """Returns, for each optimizer, the parameters that its clock moves, by name, in the module's order.

    These are the optimizer's parameters with ``requires_grad``; never a choice by ``grad``, which differs between
    replicas. A parameter in two optimizers belongs to the first. A parameter that no optimizer holds, or whose name is
    in ``left_out``, is in none of the results.

    Raises:
        ValueError: an optimizer holds a parameter that is not the module's.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    taken: set[int] = set()
    couplings = []
    for index, optimizer in enumerate(optimizers):
        own = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        if foreign := own - names.keys():
            raise ValueError(
                f"optimizer {index} ({type(optimizer).__name__}) holds {len(foreign)} parameters that are not the "
                "module's; register them as attributes of the module, or leave them out of the optimizer"
            )
        couplings.append({n: p for n, p in module.named_parameters() if id(p) in own - taken and n not in left_out})
        taken |= own
    return couplings


class ParameterVector:
    """A list of tensors as one flat vector of d numbers.

    Where the tensors are narrower than the vector (bfloat16 parameters, float32 vector), the vector keeps the part of a
    move that rounding removes. Moves far below a parameter's resolution therefore add up instead of vanishing, and an
    exchange conserves what it moves. This costs one number of the vector's dtype for each such parameter.

    Args:
        parameters: the tensors, in a fixed order; any shapes (0-dim and empty too), strides and floating dtypes, on
            one device.
        dtype: the vector's dtype. Default: ``accumulation_dtype``.
        device: the vector's device where there are no tensors, as when all are frozen. Default: the CPU.

    Raises:
        ValueError: a tensor is complex or not floating.

    Attributes:
        remainder: (n,) what rounding took from the n narrower parameters, or None before the first move.
    """

    def __init__(
        self, parameters: Iterable[Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        self.parameters = list(parameters)
        if not all(p.is_floating_point() for p in self.parameters):
            kinds = sorted({str(p.dtype) for p in self.parameters if not p.is_floating_point()})
            raise ValueError(
                f"ParameterVector(parameters=<with {', '.join(kinds)}>): only real floating tensors average"
            )
        self.dtype = accumulation_dtype(self.parameters) if dtype is None else dtype
        self._sizes = [p.numel() for p in self.parameters]
        self.numel = sum(self._sizes)
        self.device = self.parameters[0].device if self.parameters else device or torch.device("cpu")
        self._narrow = [i for i, p in enumerate(self.parameters) if p.dtype != self.dtype]
        self.remainder: Tensor | None = None

    def views(self, vector: Tensor) -> list[Tensor]:
        """Returns ``vector`` (d,) cut into views with the parameters' shapes."""
        parts = vector.split_with_sizes(self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def read(self, out: Tensor | None = None) -> Tensor:
        """Copies the parameters into ``out`` ((d,) of the vector's dtype, allocated when None) and returns it."""
        if out is None:
            out = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        if self.parameters:
            views = self.views(out)
            torch._foreach_copy_(views, self.parameters)
            if self.remainder is not None:
                torch._foreach_add_([views[i] for i in self._narrow], self._remainders())
        return out

    @torch.no_grad()
    def add_(self, update: Tensor, *, alpha: float = 1.0) -> None:
        """Adds ``alpha * update``, ``update`` (d,), to the parameters in place."""
        if not self._narrow:
            if self.parameters:
                torch._foreach_add_(self.parameters, self.views(update), alpha=alpha)
            return
        self.write_(self.read().add_(update, alpha=alpha))

    @torch.no_grad()
    def write_(self, value: Tensor) -> None:
        """Replaces the parameters by ``value`` (d,), rounded to their own dtype; keeps what rounding takes."""
        if not self.parameters:
            return
        views = self.views(value)
        torch._foreach_copy_(self.parameters, views)
        if self._narrow:
            if self.remainder is None:
                size = sum(self._sizes[i] for i in self._narrow)
                self.remainder = torch.empty(size, dtype=self.dtype, device=self.device)
            remainders = self._remainders()
            torch._foreach_copy_(remainders, [views[i] for i in self._narrow])
            for remainder, i in zip(remainders, self._narrow, strict=True):
                # One by one, since their copies in the vector's dtype would be a vector more all together.
                remainder.sub_(self.parameters[i])

    @torch.no_grad()
    def add_proximal_gradient(self, stiffness: float, anchor: Tensor) -> None:
        """Adds ``stiffness (x - anchor)``, ``anchor`` (d,), to the gradients; a parameter without one is left out.

        Costs two ``torch._foreach_add_`` over the gradients and no memory.

        Raises:
            ValueError: a gradient is sparse, while this force is on every number.
        """
        narrow, wide = set(self._narrow), []
        remainders = dict(zip(self._narrow, self._remainders(), strict=True)) if self.remainder is not None else {}
        for i, (p, a) in enumerate(zip(self.parameters, self.views(anchor), strict=True)):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise ValueError(
                    f"parameter {i}, of shape {tuple(p.shape)}, has a sparse gradient, and a proximal term pulls on "
                    "all of it: make the gradient dense (torch.nn.Embedding(sparse=False))"
                )
            if i in narrow:  # the difference, before anything is rounded to the parameter's dtype
                difference = p.to(self.dtype).sub_(a)
                p.grad.add_(difference.add_(remainders[i]) if i in remainders else difference, alpha=stiffness)
            else:
                wide.append((p.grad, p, a))
        if wide:
            gradients, parameters, anchors = zip(*wide, strict=True)
            torch._foreach_add_(gradients, parameters, alpha=stiffness)
            torch._foreach_add_(gradients, anchors, alpha=-stiffness)

    @torch.no_grad()
    def distance(self, value: Tensor) -> float:
        """Returns the Euclidean norm of the vector minus ``value`` (d,); never a second vector in memory."""
        return float(self.distance_on_device(value))

    @torch.no_grad()
    def distance_on_device(self, value: Tensor) -> Tensor:
        """Returns what ``distance`` does as a tensor, (), on the vector's device, for which the host does not wait."""
        remainders = dict(zip(self._narrow, self._remainders(), strict=True)) if self.remainder is not None else {}
        norms = []
        for i, (p, v) in enumerate(zip(self.parameters, self.views(value), strict=True)):
            difference = p.to(self.dtype) - v
            norms.append(torch.linalg.vector_norm(difference + remainders[i] if i in remainders else difference))
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)

    def _remainders(self) -> list[Tensor]:
        assert self.remainder is not None
        parts = self.remainder.split_with_sizes([self._sizes[i] for i in self._narrow])
        return [part.view(self.parameters[i].shape) for part, i in zip(parts, self._narrow, strict=True)]
