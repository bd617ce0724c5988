"""Optimizers with a mode for training and one for evaluation, which move the weights in place (Schedule-Free)."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch.optim import Optimizer

__all__ = ["OptimizerModes"]


class OptimizerModes:
    """Lets ``optimizer.eval()`` and ``optimizer.train()`` move the replica's weights only, never the center's.

    Such a mode mixes the weights with a state that each replica keeps to itself. A call that comes while the module
    holds the center is postponed until the replica's weights are back; of several calls only the last counts. The
    center belongs to the weights that training moves.

    Args:
        optimizers: torch's optimizers; those without the two methods stay unchanged.
        wrappers: Lightning's wrappers around them, which modules get from ``self.optimizers()``.
        holds_center: returns whether the module holds the center.
        rank: this process; rank 0 warns.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        wrappers: Sequence[Any],
        holds_center: Callable[[], bool],
        *,
        rank: int = 0,
    ) -> None:
        self._holds_center, self._rank = holds_center, rank
        self._asked: dict[int, Callable[[], None]] = {}
        self._undo = ExitStack()
        self._has_said = False
        for index, optimizer in enumerate(optimizers):
            if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
                for name in ("train", "eval"):
                    method = self._later(index, type(optimizer).__name__, getattr(optimizer, name))
                    for each in (optimizer, *(w for w in wrappers if getattr(w, "optimizer", None) is optimizer)):
                        own = vars(each)
                        if name in own:
                            self._undo.callback(setattr, each, name, own[name])
                        else:
                            self._undo.callback(own.pop, name, None)
                        setattr(each, name, method)

    def settle(self) -> None:
        """Makes each optimizer's last postponed call, now that the replica's weights are back."""
        asked, self._asked = self._asked, {}
        for act in asked.values():
            act()

    def close(self) -> None:
        """Gives the optimizers their own methods back. Idempotent."""
        self._undo.close()

    def _later(self, index: int, kind: str, method: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            if not self._holds_center():
                method(*args, **kwargs)
                return
            self._asked[index] = lambda: method(*args, **kwargs)
            if not self._has_said and self._rank == 0:
                self._has_said = True
                warnings.warn(
                    f"EASGDStrategy: {kind}.eval() and train() would mix the center, which the module holds now, with "
                    "each replica's own state: evaluations and checkpoints are of the center of the weights that are "
                    "trained, and the mode changes when the replica's are back",
                    stacklevel=2,
                )

        return call
