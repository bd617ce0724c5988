"""Where a run goes on: one replica's part of a checkpoint, the random states, and the place in the data."""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_easgd.sampling import set_epoch
from lightning_easgd.trainer.checkpoint import rng_state, set_rng_state

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Resumption", "differences"]


class Resumption:
    """What is put back of a checkpoint while a run starts from it, and what its next checkpoint says of the data.

    Attributes:
        own: this replica's part of the checkpoint, until training goes on; None where there is none, or where the run
            starts from the center.
        shared_epoch: where in an epoch that all replicas share the checkpoint was taken, if in one.
        fresh_optimizers: whether the optimizers' states are left out.
        epoch_rng: the random state with which this epoch's data began; None before the first.
    """

    def __init__(self) -> None:
        self.own: dict[str, Any] | None = None
        self.shared_epoch: dict[str, Any] | None = None
        self.fresh_optimizers = False
        self.epoch_rng: dict[str, Any] | None = None
        self._rng_to_go_on_with: dict[str, Any] = {}

    def set_up_data(self, trainer: "Trainer", setup_data: Callable[[], None], *, leaves_out: bool) -> None:
        """Lightning's own, which creates the first epoch's iterator; resumed in mid-epoch, it goes on in the data.

        Args:
            trainer: whose data it is.
            setup_data: its fit loop's method.
            leaves_out: whether the data leaves out by itself what is done of an epoch.
        """
        if self.epoch_rng is not None:
            setup_data()
            return
        fit_loop: Any = trainer.fit_loop
        # A module that asks for estimated_stepping_batches has had the iterator made, before this method was in place.
        was_early = fit_loop._combined_loader is not None
        self.epoch_rng = rng_state()
        # Of loaders with a state of their own, which the first iterator after they were given it uses up.
        states = copy.deepcopy(fit_loop._combined_loader_states_to_load) if fit_loop.restarting else []
        setup_data()
        loader, fetcher = fit_loop._combined_loader, fit_loop._data_fetcher
        if self.own is None and was_early and fetcher is not None:
            loader._load_state_dicts(states)
            iter(fetcher)
        if self.own is None or loader is None or fetcher is None:
            return
        progress = fit_loop.epoch_loop.batch_progress
        done = progress.current.ready
        in_epoch = 0 < done < fit_loop.max_batches and not progress.is_last_batch
        # Lightning tells the samplers their epoch only now that it has made the iterator, from which workers may have
        # drawn already: it is made anew, with the random state that it had in the run that stopped.
        self.epoch_rng = (self.own["epoch_rng"] if in_epoch else None) or self.own["rng"]
        set_rng_state(self.epoch_rng)
        for each in loader.flattened:
            set_epoch(each, fit_loop.epoch_progress.current.processed)
        loader._load_state_dicts(states)
        iter(fetcher)
        if in_epoch and not states and not leaves_out:
            for _ in range(done):
                next(fetcher)
            fetcher.fetched -= done  # Lightning adds them
        self._rng_to_go_on_with = self.own["rng"] if in_epoch else rng_state()

    def start_epoch(self, trainer: "Trainer", on_run_start: Callable[[Any], None], data_fetcher: Any) -> None:
        """Lightning's own, which creates the iterator of all epochs but the first."""
        fit_loop = trainer.fit_loop
        if (
            trainer.current_epoch > 0
            and not getattr(fit_loop, "is_resuming", False)
            and not fit_loop.epoch_loop.restarting
        ):
            if self.own is not None:
                set_rng_state(self.own["rng"])
            self.epoch_rng = rng_state()
            on_run_start(data_fetcher)
        else:
            on_run_start(data_fetcher)
            if self.own is not None:
                set_rng_state(self._rng_to_go_on_with)


def differences(saved: Mapping[str, Any] | None, layout: Mapping[str, Any]) -> str:
    """Returns why replicas cannot go on as they were in a checkpoint; empty if they can.

    Args:
        saved: the checkpoint's own entry, None where another strategy wrote it.
        layout: what the entry of a checkpoint of this run would have beside the name of its save.
    """
    if saved is None or saved["save"] is None:
        return "it has no replicas' files"
    found = {"replica_size": 1, "layerwise": False, "fragments": 1, **saved}  # which older ones do not have
    if all(found.get(key) == value for key, value in layout.items()):
        return ""
    words = f"it has {found.get('num_replicas')} replicas"
    words += "" if found["replica_size"] == layout["replica_size"] else f" of {found['replica_size']} ranks"
    words += ", layer by layer" if found["layerwise"] else ""
    return words + (f", in {found['fragments']} fragments" if found["fragments"] > 1 else "")
