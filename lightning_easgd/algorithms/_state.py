"""How an algorithm's vectors go into a state dict and come back, where some may not be there yet."""

from torch import Tensor

__all__ = ["restored", "saved"]


def saved(vector: Tensor | None) -> Tensor | None:
    """Returns a copy on the CPU, which later steps do not change; None for None."""
    return None if vector is None else vector.to("cpu", copy=True)


def restored(vector: Tensor | None) -> Tensor | None:
    """Returns a copy where the vector is, so that the state dict may be loaded again; None for None."""
    return None if vector is None else vector.clone()
