"""Which replica sees which data."""

from typing import Any

__all__ = ["set_epoch"]


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader's samplers the number of the epoch, for those that shuffle by it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for sampler in {id(s): s for s in samplers}.values():
        tell = getattr(sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)
