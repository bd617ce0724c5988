"""Lightning's training loaders with a sampler of this package's in them."""

import os
from typing import TYPE_CHECKING

from lightning_easgd.trainer.data.dynamic import DynamicData
from lightning_easgd.trainer.data.replicated import ReplicatedData

if TYPE_CHECKING:
    from lightning_easgd.trainer.run import Run

__all__ = ["set_up_sampling"]


def set_up_sampling(run: "Run") -> DynamicData | None:
    """Puts the samplers that ``data`` asks for in the place of Lightning's own; returns the shared epochs, if any."""
    options, company, patch = run.options, run.company, run.patches
    seed = int(os.getenv("PL_GLOBAL_SEED", "0"))  # as Lightning's own sampler
    if options.data == "dynamic":
        return DynamicData(
            run.trainer,
            company.store("data"),
            replica=company.replica,
            num_replicas=company.num_replicas,
            seed=seed,
            timeout=company.timeout,
            patch=patch,
            ahead=run.strategy.num_nodes > 1,
        )
    if options.data == "replicate" or options.fraction is not None:
        ReplicatedData(
            run.trainer,
            replica=company.replica,
            num_replicas=company.num_replicas,
            member=company.members.index,
            replica_size=company.members.size,
            fraction=options.fraction,
            seed=seed,
            patch=patch,
        )
    return None
