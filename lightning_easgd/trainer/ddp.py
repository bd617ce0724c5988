"""What is DistributedDataParallel's: the ranks of one replica, and scripts that were written for ``ddp``."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_easgd.trainer.arguments import for_ddp

if TYPE_CHECKING:
    from lightning_easgd.trainer.run import Run

__all__ = ["wrap", "wrap_anew"]


def wrap(run: "Run", configure_ddp: Callable[[], None]) -> None:
    """Wraps the module of a replica of several ranks, with a group of its own; that of one rank stays as it is.

    Args:
        run: whose module it is; its company is open.
        configure_ddp: DDPStrategy's own.

    Raises:
        ValueError: a communication hook would average over all replicas.
    """
    strategy = run.strategy
    if strategy.layout.replica_size == 1:
        _stand_for_ddp(run)
        return
    group: Any = run.company.members.ddp_group
    strategy._ddp_kwargs["process_group"] = group
    run.cleanup.callback(strategy._ddp_kwargs.pop, "process_group", None)
    if strategy._ddp_comm_hook is not None and strategy._ddp_comm_state is None:  # torch's hooks would take all ranks'
        strategy._ddp_comm_state = group
        run.cleanup.callback(setattr, strategy, "_ddp_comm_state", None)
    elif getattr(strategy._ddp_comm_state, "process_group", group) is None:
        raise ValueError(
            f"EASGDStrategy(ddp_comm_state=<{type(strategy._ddp_comm_state).__name__} without process_group>): it "
            "would average gradients over all replicas; a hook without state gets the replica's own group"
        )
    configure_ddp()


def wrap_anew(run: "Run") -> None:
    """Wraps the module once more: a wrapper averages the gradients of what was trainable when it was made."""
    strategy = run.strategy
    if isinstance(strategy.model, nn.parallel.DistributedDataParallel):
        strategy.model.reducer._remove_autograd_hooks()
        with torch.enable_grad():
            strategy.model = strategy._setup_model(run.module)
        strategy._register_ddp_hooks()


def _stand_for_ddp(run: "Run") -> None:
    """Lets scripts that were written for ``ddp`` find at ``trainer.model`` what its wrapper has for them.

    Here the module is not wrapped: ``trainer.model.module`` is the module, and ``no_sync()`` has nothing to do.
    """
    if asked := for_ddp(run.strategy._ddp_kwargs):
        rank_zero_warn(
            f"EASGDStrategy({', '.join(f'{name}=...' for name in asked)}) has no effect with one process a "
            "replica: these are arguments of DistributedDataParallel, which wraps a replica of several ranks"
        )
    module = run.module
    own: Any = vars(module)  # not setattr, which would make the module a part of itself
    for name, value in (("module", module), ("no_sync", nullcontext)):
        if not hasattr(module, name):
            own[name] = value
            run.cleanup.callback(own.pop, name, None)
