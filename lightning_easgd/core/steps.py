"""Every step of a module's optimizers, whether Lightning makes it or the module itself.

Lightning tells a strategy only of the steps that go through its own wrapper. In manual optimization a module may step
torch's optimizer itself (``self.optimizers(use_pl_optimizer=False)``), or one that another wraps (the base optimizer of
SAM). Such a step must exchange like any other: if nobody counted it, the center would keep its initial value.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["Steps"]


class Steps:
    """Takes every step of the optimizers to where it is counted, and refuses what cannot be counted.

    From ``open`` to ``close`` the optimizers' own ``step`` is replaced, and that of the optimizers that they wrap.

    Args:
        module: the module that is trained.
        optimizers: what ``configure_optimizers`` returned.
        is_automatic: whether Lightning makes the steps, after the module's ``training_step``.
        take: ``take(optimizer, update)`` makes one counted step of one of ``optimizers``, in which ``update()`` is the
            optimizer's own.
        add_force: ``add_force(optimizer)`` adds to the gradients what the algorithm adds, before the optimizer's own
            step.
        is_training: whether a training batch is going on; elsewhere the module may do what it likes.

    Attributes:
        count: steps counted so far.
        num_batches: training batches begun so far.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        is_automatic: bool,
        take: Callable[[Optimizer, Callable[[], Any]], None],
        add_force: Callable[[Optimizer], None],
        is_training: Callable[[], bool],
    ) -> None:
        self._module, self._optimizers, self._is_automatic = module, optimizers, is_automatic
        self._take, self._add_force, self._is_training = take, add_force, is_training
        self.count = self.num_batches = 0
        self._is_inside = False
        self._undo: list[Callable[[], object]] = []
        self._known: set[int] = set()
        self._stepped: set[int] = set()
        self._before: dict[int, Tensor] = {}  # of parameters that no step has moved

    def open(self) -> None:
        """Begins to see the steps."""
        for optimizer in self._optimizers:
            for each in _with_wrapped(optimizer):
                if id(each) not in self._known:
                    self._known.add(id(each))
                    self._replace(each, optimizer)
        self._undo.append(register_optimizer_step_pre_hook(self._refuse_unknown).remove)

    def close(self) -> None:
        """Gives the optimizers their own ``step`` back, where nobody has replaced it since. Idempotent."""
        while self._undo:
            self._undo.pop()()
        self._known.clear()

    @contextmanager
    def counted(self, optimizer: Optimizer) -> Iterator[None]:
        """Counts one step of an optimizer, within which the optimizers' own steps are parts of it."""
        before, self._is_inside = self._is_inside, True
        if not before:
            self.count += 1
            self._stepped.add(id(optimizer))
        try:
            yield
        finally:
            self._is_inside = before

    @contextmanager
    def batch(self, accumulated: int = 1) -> Iterator[None]:
        """Surrounds the module's ``training_step``; looks at what no step of an optimizer has moved so far.

        Args:
            accumulated: of how many batches Lightning makes one step.

        Raises:
            RuntimeError: parameters have changed, though their optimizer has made no counted step.
        """
        self.num_batches += 1
        if self._is_automatic:  # Lightning steps by itself; only a module that overrides it comes here without a step
            if self.num_batches > accumulated:
                self._look("optimizer_step or a hook")
            self._keep()
            yield
        else:
            self._before.clear()
            self._keep()
            yield
            self._look("training_step")

    def _keep(self) -> None:
        # Not versions, which ``p.data.sub_(...)`` leaves as they are.
        for p in self._unmoved():
            if id(p) not in self._before:
                self._before[id(p)] = p.detach().clone()

    def _look(self, where: str) -> None:
        kept = [(p, self._before[id(p)]) for p in self._unmoved() if id(p) in self._before]
        self._before = {id(p): value for p, value in kept}
        if not all(torch.equal(p, value) for p, value in kept):
            raise RuntimeError(
                f"EASGDStrategy: {type(self._module).__name__}.{where} changed parameters without a step of an "
                "optimizer that configure_optimizers returned. Exchanges are counted in such steps, so the center, "
                "which is evaluated and saved, would stay as training began: make the update with an optimizer (one "
                "of your own class will do) and return it from configure_optimizers"
            )

    def _unmoved(self) -> list[Tensor]:
        """Returns the trained parameters that only optimizers without a step so far hold."""
        groups = [(id(o) in self._stepped, group["params"]) for o in self._optimizers for group in o.param_groups]
        moved = {id(p) for has_stepped, parameters in groups if has_stepped for p in parameters}
        held = [p for _, parameters in groups for p in parameters if p.requires_grad]
        # With no optimizer at all, whatever the module could train.
        return [p for p in held or self._free() if id(p) not in moved]

    def _free(self) -> list[Tensor]:
        return [p for p in self._module.parameters() if p.requires_grad]

    def _replace(self, optimizer: Optimizer, of: Optimizer) -> None:
        own: Any = optimizer.step
        before = vars(optimizer).get("step")

        @wraps(getattr(own, "__func__", own))
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._is_inside or not self._known or not self._is_training():
                return own(*args, **kwargs)
            closure, others = kwargs.pop("closure", None), args
            if closure is None and args:
                closure, others = args[0], args[1:]
            output = None

            def with_force() -> Any:
                loss = closure()
                self._add_force(of)
                return loss

            def update() -> None:
                nonlocal output
                if closure is None:
                    self._add_force(of)
                    output = own(*others, **kwargs)
                else:
                    output = own(with_force, *others, **kwargs)

            self._take(of, update)
            return output

        ours = MethodType(step, optimizer)  # a method, as schedulers that come later expect
        vars(optimizer)["step"] = ours

        def undo() -> None:
            if vars(optimizer).get("step") is not ours:
                return  # somebody else's wrapper, for which ours is transparent from here on
            if before is None:
                del vars(optimizer)["step"]
            else:
                vars(optimizer)["step"] = before

        self._undo.append(undo)

    def _refuse_unknown(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_inside or not self._is_training():
            return
        if id(optimizer) in self._known:
            raise RuntimeError(
                f"EASGDStrategy: a step of {type(optimizer).__name__} went round optimizer.step, as "
                f"{type(optimizer).__name__}.step(optimizer) does, and did not exchange: call optimizer.step()"
            )
        names = {id(p): name for name, p in self._module.named_parameters()}
        held = [names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names]
        if held:
            raise RuntimeError(
                f"EASGDStrategy: {type(self._module).__name__} steps a {type(optimizer).__name__} that "
                f"configure_optimizers did not return, and that holds {len(held)} of the module's parameters "
                f"({held[0]!r}, ...): the center would not learn of it. Return it from configure_optimizers, or make "
                "it an attribute of the optimizer there that wraps it"
            )


def _with_wrapped(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yields an optimizer and those that it holds as attributes, as SAM and Lookahead hold their base optimizers."""
    seen: set[int] = set()
    waiting: list[Any] = [optimizer]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list | tuple | dict):
            items = each.values() if isinstance(each, dict) else each
            waiting += [item for item in items if isinstance(item, Optimizer)]
        elif isinstance(each, Optimizer) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += vars(each).values()
