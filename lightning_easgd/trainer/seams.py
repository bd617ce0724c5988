"""Where this package reaches into Lightning beyond its public interface: the names, and whether they are there.

A Strategy has hooks for most of what it does. For the rest this package reads or replaces private parts of the Trainer.
A version of Lightning that has renamed one of them is refused when a run is set up, instead of running without it.
"""

import sys
from contextlib import ExitStack
from typing import Any

__all__ = ["PRIVATE", "Patches", "callbacks_of", "is_a", "verify"]

# Object -> what is read or replaced of it. Several are public by name, but no part of the documented interface.
PRIVATE: dict[str, tuple[str, ...]] = {
    "trainer": (
        "_accelerator_connector",
        "_checkpoint_connector",
        "_data_connector",
        "_signal_connector",
        "_val_check_time_interval",
        "callbacks",
        "fit_loop",
    ),
    "trainer._checkpoint_connector": ("dump_checkpoint",),
    "trainer._data_connector": ("_prepare_dataloader",),
    "trainer._signal_connector": ("_sigterm_notifier_fn", "received_sigterm"),
    "trainer.fit_loop": (
        "_can_stop_early",
        "_combined_loader",
        "_combined_loader_states_to_load",
        "_data_fetcher",
        "epoch_loop",
        "epoch_progress",
        "is_resuming",
        "max_batches",
        "min_epochs",
        "on_advance_end",
        "setup_data",
    ),
    "trainer.fit_loop.epoch_loop": (
        "_batches_that_stepped",
        "_broadcast_sigterm_tensor",
        "_should_accumulate",
        "_should_check_val_epoch",
        "_should_check_val_fx",
        "automatic_optimization",
        "batch_progress",
        "manual_optimization",
        "min_steps",
        "on_advance_end",
        "on_run_start",
        "update_lr_schedulers",
        "val_loop",
    ),
    "trainer.precision_plugin": ("_wrap_closure",),
    "trainer.strategy": (
        "_ddp_comm_hook",
        "_ddp_comm_state",
        "_ddp_kwargs",
        "_launcher",
        "_layer_sync",
        "_lightning_optimizers",
        "_process_group_backend",
        "_register_ddp_hooks",
        "_setup_model",
        "_start_method",
        "_timeout",
    ),
}


def verify(trainer: Any, version: str) -> None:
    """Looks for every name of ``PRIVATE``. Local and cheap.

    Args:
        trainer: a Lightning Trainer with its strategy.
        version: of Lightning, in words.

    Raises:
        RuntimeError: names what is not there.
    """
    absent = []
    for owner, names in PRIVATE.items():
        thing = trainer
        for part in owner.split(".")[1:]:
            thing = getattr(thing, part)
        # Not ``hasattr``, which computes properties.
        absent += [f"{owner}.{name}" for name in names if name not in vars(thing) and not hasattr(type(thing), name)]
    if absent:
        raise _missing(", ".join(absent), version)


class Patches:
    """What this package puts into the place of Lightning's methods, object by object, until it is taken away.

    Args:
        version: of Lightning, in words.
    """

    def __init__(self, version: str) -> None:
        self._version = version
        self._undo = ExitStack()

    def __call__(self, owner: object, name: str, value: Any) -> None:
        """Hides an attribute of one object by ``value`` until ``close``, which puts back what the object itself had.

        Raises:
            RuntimeError: the object has no such attribute, in this version of Lightning.
        """
        if not hasattr(owner, name):
            raise _missing(f"{type(owner).__name__}.{name}", self._version)
        own = vars(owner)
        has_own, before = name in own, own.get(name)
        if has_own:
            self._undo.callback(setattr, owner, name, before)
        else:
            self._undo.callback(own.pop, name, None)
        setattr(owner, name, value)

    def close(self) -> None:
        """Puts everything back, the last first. Idempotent."""
        self._undo.close()


def _missing(what: str, version: str) -> RuntimeError:
    """Returns the error for a part of Lightning that is not there."""
    return RuntimeError(
        f"EASGDStrategy needs {what}, which {version} does not have: install a version of Lightning that "
        "docs/versions.md lists, or a newer lightning_easgd"
    )


def is_a(thing: object, name: str) -> bool:
    """Returns whether an object is of a class of Lightning's, in whichever of its namespaces.

    Args:
        thing: a callback, a plugin.
        name: module and class below the namespace, such as ``"callbacks.Timer"``.
    """
    module, _, kind = name.rpartition(".")
    homes = [sys.modules.get(f"{namespace}.{module}") for namespace in ("pytorch_lightning", "lightning.pytorch")]
    return any(isinstance(thing, getattr(home, kind)) for home in homes if home is not None)


def callbacks_of(trainer: Any) -> list[Any]:
    """Returns a Trainer's callbacks, the list itself, which its annotations do not show."""
    callbacks: list[Any] = trainer.callbacks
    return callbacks
