"""The buffers that belong to the center: batch-norm statistics and whatever else a module keeps beside its parameters.

Each replica's buffers follow its own data and weights. For the center, floating buffers are the mean over replicas and
all others are replica 0's; or batch-norm statistics are estimated anew, with the center's weights, on training data.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.optim.swa_utils
from torch import Tensor, nn

from lightning_easgd.communication._c10d import Group, broadcast_bytes

__all__ = ["CenterBuffers"]


class CenterBuffers:
    """Puts the center's buffers into a module and the replica's back.

    Args:
        module: whose buffers are meant, shared ones once.
        group: a process group over all ranks; None for one.
        num_ranks: its size.
        members: one over the ranks of this replica, whose buffers are those of the first; None for one.
    """

    def __init__(self, module: nn.Module, group: Group | None, num_ranks: int, members: Group | None = None) -> None:
        self._module, self._group, self._num_ranks, self._members = module, group, num_ranks, members
        self._own: list[Tensor] | None = None
        self._center: list[Tensor] | None = None

    @torch.no_grad()
    def gather(self) -> None:
        """Computes the center's buffers from the replicas'. Collective and blocking, two messages of their size."""
        buffers = list(self._module.buffers())
        if self._members is not None and buffers:  # what DDP does at the next forward
            of_first = [b.detach().clone(memory_format=torch.contiguous_format) for b in buffers]
            broadcast_bytes(self._members, of_first)
            for buffer, value in zip(buffers, of_first, strict=True):
                buffer.copy_(value)
        self._average()

    def _average(self) -> None:
        buffers = list(self._module.buffers())
        center = [b.detach().clone(memory_format=torch.contiguous_format) for b in buffers]
        if self._group is None or not buffers:
            self._center = center
            return
        broadcast_bytes(self._group, center)
        floating = [i for i, b in enumerate(buffers) if b.is_floating_point() and b.numel()]
        if floating:
            # As a difference to replica 0, so that constants (masks with infinities too) stay to the last bit.
            parts = [
                torch.where(buffers[i] == center[i], 0.0, buffers[i].double() - center[i].double()).flatten()
                for i in floating
            ]
            difference = torch.cat(parts)
            self._group.allreduce([difference]).wait()
            for i, part in zip(floating, difference.split_with_sizes([p.numel() for p in parts]), strict=True):
                moved = center[i].double() + part.view_as(center[i]) / self._num_ranks
                center[i] = torch.where(part.view_as(center[i]) == 0, center[i], moved.to(center[i].dtype))
        self._center = center

    def forget(self) -> None:
        """Makes the replica's own buffers serve as the center's until the next ``gather``."""
        self._center = None

    @torch.no_grad()
    def swap_in(self) -> None:
        """Puts the buffers that ``gather`` found into the module; without them it stays as it is."""
        if self._center is None or self._own is not None:
            return
        buffers = list(self._module.buffers())
        self._own = [b.detach().clone() for b in buffers]
        for buffer, value in zip(buffers, self._center, strict=True):
            buffer.copy_(value)

    def reestimate(self, inputs: Iterable[Any]) -> None:
        """Estimates batch-norm statistics anew with the weights that the module holds. Collective and blocking.

        Args:
            inputs: this replica's share of training inputs; the replicas' estimates are averaged.
        """
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._module.modules()):
            torch.optim.swa_utils.update_bn(inputs, self._module)
            with torch.no_grad():
                self._average()
            for buffer, value in zip(self._module.buffers(), self._center or (), strict=False):
                buffer.copy_(value)

    @property
    def own(self) -> list[Tensor]:
        """The replica's buffers, wherever they are at present. Not copies."""
        return list(self._module.buffers()) if self._own is None else self._own

    @torch.no_grad()
    def swap_out(self) -> None:
        """Puts the replica's own buffers back."""
        own, self._own = self._own, None
        if own is not None:
            for buffer, value in zip(self._module.buffers(), own, strict=True):
                buffer.copy_(value)
