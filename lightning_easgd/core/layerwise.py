"""Layerwise training: every layer has its own center and clock, and exchanges in the middle of a pass.

Layerwise stale synchronous parallel descent (arXiv:1512.02728). In the backward pass the replica updates a layer, and
adds the layer's delta to its center, as soon as the layer's gradient is there. The gradients of the layers below are
still being computed then. In the forward pass the replica waits for a layer's newest value, and reads it, when the
layer is about to be used. The values of the layers above may still be on their way then. A *layer* is a module that
owns parameters directly; a parameter that several modules own belongs to the first.

Let c be the reading replica's clock: the number of steps that it has completed with this layer. With slack s, a read
contains every replica's additions from steps before ``c - s``, all of the reader's own additions, and no addition from
step ``c + s`` or later. The last bound makes slack 0 synchronous descent on summed updates: no replica adds to a layer
before all replicas have read it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.core.coupling import Coupling

__all__ = ["Layerwise", "by_layer", "narrowed", "parts_of", "refuse_algorithm"]

T = TypeVar("T")


def by_layer(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """Returns, for each layer of the module, which of ``parameters`` it owns, by name, in the module's order.

    A layer that owns none of them (frozen by now, say) has an empty one, so that its place among the layers stays.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    taken: set[int] = set()
    layers = []
    for layer in module.modules():
        own = {id(p): p for p in layer.parameters(recurse=False) if id(p) not in taken}
        taken |= own.keys()
        if own:
            layers.append({names[i]: p for i, p in own.items() if names[i] in parameters})
    return layers


def parts_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """Returns which of ``parameters`` stand in which of the optimizer's groups, by the group's index."""
    own = {id(p) for p in parameters}
    parts = {i: [p for p in group["params"] if id(p) in own] for i, group in enumerate(optimizer.param_groups)}
    return {i: part for i, part in parts.items() if part}


@contextmanager
def narrowed(optimizer: Optimizer, parts: Mapping[int, list[Tensor]]) -> Iterator[None]:
    """Leaves the optimizer with some of its parameters alone, and then puts the others back.

    A step meanwhile is the whole step's part for these where an optimizer treats parameters separately and keeps what
    it remembers, step counts included, with each: all of ``torch.optim`` but LBFGS do. Their state stays where it is.

    Args:
        optimizer: torch's own, not a wrapper.
        parts: what stays of each group, see ``parts_of``; a group that is not in it is gone meanwhile.
    """
    groups = optimizer.param_groups
    kept = [(groups[i], groups[i]["params"], part) for i, part in parts.items()]
    for group, _, part in kept:
        group["params"] = part
    optimizer.param_groups = [group for group, _, _ in kept]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, params, _ in kept:
            group["params"] = params


class _Layer:
    """One layer in the course of a training step.

    Attributes:
        parts: its parameters in the optimizer's groups.
        missing: ids of the parameters whose gradients have not come in this step.
        has_begun: whether it has been read in this step.
        has_stepped: whether it has been updated in this step.
        was_called: whether its module has been called in this step.
        is_early: whether a step begins with reading it, since the one before did not show when it is used: its
            parameters are used by another module (as those of an attention's projection are), or it was left out.
    """

    def __init__(self, coupling: Coupling, optimizer: Optimizer) -> None:
        self.coupling = coupling
        self.parts = parts_of(optimizer, coupling.vector.parameters)
        self.is_early = True
        self.forget()

    def forget(self) -> None:
        """Makes it ready for the next step."""
        self.missing = {id(p) for p in self.coupling.vector.parameters}
        self.has_begun = self.has_stepped = self.was_called = False

    def begin(self) -> None:
        """Waits for its newest value and reads it, unless this step has done so."""
        if self.has_begun:
            return
        self.has_begun = True
        self.coupling.begin()


class Layerwise:
    """The layers of a module and their hooks. Belongs to one optimizer; used from one thread at a time.

    All replicas have the same layers, but each may use others of them in a step.

    Args:
        module: the module that the layers belong to. The parameters that it owns directly are read at the beginning of
            every step, because a training step does not call the module.
        optimizer: the module's only one; treats parameters separately.
        couplings: of the layers; one without parameters takes no part.

    Raises:
        ValueError: the optimizer is known to treat its parameters as one.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, couplings: Sequence[Coupling]) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "EASGDStrategy(layerwise=True) with LBFGS: a layer is updated without the others, and LBFGS steps all "
                "parameters as one; use an optimizer that treats parameters separately, such as SGD or AdamW"
            )
        self._module, self._optimizer, self._couplings = module, optimizer, couplings
        self._layers: list[_Layer] = []
        self._handles: list[Any] = []
        self._has_read_all = False  # in this step
        self._update: Callable[[_Layer], None] | None = None  # what a complete layer gets; None outside of a step
        self.attach()

    def attach(self) -> None:
        """Puts the hooks where the couplings' parameters are now. Not within a step."""
        self.close()
        self._layers = [_Layer(coupling, self._optimizer) for coupling in self._couplings if coupling.names]
        owners = {id(p): layer for layer in self._layers for p in layer.coupling.vector.parameters}
        for module in self._module.modules():
            if module is self._module:
                continue
            for layer in dict.fromkeys(owners[id(p)] for p in module.parameters(recurse=False) if id(p) in owners):
                hook = partial(self._on_call, layer)
                # Before those that compute a weight from parameters.
                self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
        for layer in self._layers:
            for parameter in layer.coupling.vector.parameters:
                hook = partial(self._on_gradient, layer)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def close(self) -> None:
        """Takes the hooks away. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def step(self, closure: Callable[[], T], *, recover: Callable[[Sequence[Tensor]], None] | None, at: int = 0) -> T:
        """Performs one iteration of every layer, and returns what ``closure`` returns. Blocks at the layers' gates.

        Args:
            closure: forward and backward pass.
            recover: called with a layer's parameters when its delta is not finite; see ``Coupling.step``.
            at: what the layers' reports are marked with.

        Raises:
            RuntimeError: in the backward pass, a gradient came a second time after the layer had been updated.
        """

        def update(layer: _Layer) -> None:
            reset = None if recover is None else partial(recover, layer.coupling.vector.parameters)
            with narrowed(self._optimizer, layer.parts):
                layer.coupling.step(self._optimizer.step, recover=reset, at=at)
            layer.has_stepped = True

        self._update, self._has_read_all = update, False
        try:
            for layer in self._layers:
                if layer.is_early:
                    layer.begin()
            result = closure()
            # A layer that this step did not use still ticks, so that no replica waits for it for ever.
            self._begin_all()
            for layer in self._layers:
                if not layer.has_stepped:
                    update(layer)
        finally:
            self._update = None
        for layer in self._layers:
            layer.is_early = not layer.was_called
            layer.forget()
        return result

    def _begin_all(self) -> None:
        """Reads what the forward pass left out.

        No replica adds before it has read all: two might wait for each other's reading of what they do not use.
        """
        if not self._has_read_all:
            self._has_read_all = True
            for layer in self._layers:
                layer.begin()

    def _on_call(self, layer: _Layer, *_: Any) -> None:
        if self._update is not None:
            layer.was_called = True
            layer.begin()

    def _on_gradient(self, layer: _Layer, parameter: Tensor) -> None:
        if self._update is None:
            return
        if layer.has_stepped:
            raise RuntimeError(
                f"EASGDStrategy(layerwise=True): a gradient of {layer.coupling.names} came in two parts, and the layer "
                "was updated with the first; training_step must call backward nowhere, and checkpoint layers that are "
                "used twice with torch.utils.checkpoint(use_reentrant=False)"
            )
        layer.missing.discard(id(parameter))
        if not layer.missing:
            self._begin_all()
            self._update(layer)


def refuse_algorithm(algorithm: Algorithm, *, synchronous: bool, replica_size: int | None) -> None:
    """Raises ``ValueError`` where layers cannot exchange one by one. Local and cheap."""
    asked = f"EASGDStrategy({algorithm!r}, layerwise=True"
    if synchronous:
        raise ValueError(
            f"{asked}): all replicas exchange all layers at once; it needs an asynchronous transport, such as "
            "Asynchronous()"
        )
    if type(algorithm).begin is Algorithm.begin:
        raise ValueError(
            f"{asked}): a layer's newest value is read before its forward pass, and this algorithm's step does not "
            "begin with the center; use Downpour(), MDownpour() or DynSGD(period=1)"
        )
    if algorithm.period != 1:
        raise ValueError(f"{asked}): a layer is added with every backward pass; use period=1")
    if replica_size not in (None, 1):
        raise ValueError(
            f"{asked}, replica_size={replica_size}): DistributedDataParallel averages gradients only after the layers "
            "would have used them; use replica_size=1"
        )
