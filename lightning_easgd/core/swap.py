"""The parameters of one coupling and its center, which change places for evaluations and checkpoints."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_easgd.averages import CenterAverage
from lightning_easgd.communication import OpenCenter
from lightning_easgd.flatten import ParameterVector

__all__ = ["Swap"]


class Swap:
    """Whether parameters hold the replica or the center, and where the other one is meanwhile.

    Where the parameters have the center's dtype the two change places, so that no further memory is needed: the
    center's own vector is the replica's meanwhile. Else, and where an average stands for the center, the replica is
    set aside.
    """

    def __init__(self) -> None:
        self._holds_center = False
        self._aside: list[Tensor] | None = None

    @torch.no_grad()
    def __call__(self, vector: ParameterVector, center: OpenCenter, average: CenterAverage | None) -> None:
        """Puts the center (its average, where there is one) into the parameters, or the replica back, bit for bit.

        Args:
            vector: the parameters.
            center: theirs; nothing may be outstanding.
            average: of the center.
        """
        contents = _contents(vector)
        if self._holds_center and self._aside is not None:
            torch._foreach_copy_(contents, self._aside)
            self._aside = None
        elif self._holds_center or (average is None and all(p.dtype == vector.dtype for p in vector.parameters)):
            for p, c in zip(contents, vector.views(center.value), strict=True):
                kept = p.clone()
                p.copy_(c)
                c.copy_(kept)
        else:
            shown = center.value if average is None else average.value.to(vector.device)
            self._aside = [p.detach().clone() for p in vector.parameters]
            torch._foreach_copy_(contents, vector.views(shown))
        self._holds_center = not self._holds_center

    def apart(self, vector: ParameterVector, center: OpenCenter) -> tuple[Sequence[Tensor], Tensor]:
        """Returns the replica's parameters and the center's value (d,), wherever either is. Read them at once."""
        if not self._holds_center:
            return vector.parameters, center.value
        if self._aside is not None:
            return self._aside, center.value
        return vector.views(center.value), ParameterVector(vector.parameters, vector.dtype, vector.device).read()


def _contents(vector: ParameterVector) -> list[Tensor]:
    """Returns the parameters' memory: a backward pass that is yet to come does not mind that it changed meanwhile."""
    return [p.data for p in vector.parameters]
