"""A training loader of Lightning's with another sampler."""

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["replace_sampler"]


def replace_sampler(trainer: "Trainer", loader: Any, sampler: Any) -> Any:
    """Returns a training loader like ``loader``, made by Lightning, with another sampler, which it tells the epoch.

    Lightning tells it only after it has made the iterator, from which workers may have drawn already.
    """
    progress: Any = trainer.fit_loop.epoch_progress.current
    sampler.set_epoch(progress.processed)
    update_dataloader = vars(inspect.getmodule(type(trainer._data_connector)))["_update_dataloader"]
    return update_dataloader(loader, sampler, mode="train")
