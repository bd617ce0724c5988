"""``data="replicate"`` and ``data=<fraction>``: puts a ``ReplicaSampler`` into Lightning's training loaders.

Lightning counts the batches of a loader that it was given; the loader with that sampler has the right number, so that
nothing else of the training loop has to know.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_easgd.sampling import ReplicaSampler
from lightning_easgd.trainer.data.loaders import replace_sampler

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["ReplicatedData"]


class ReplicatedData:
    """The training data of one process in one ``fit``, where each replica has the set, or a part of it, for itself.

    Not collective. Every process creates it before data are set up, hence before ``configure_optimizers``, which may
    ask for the training's length. Loaders of validation, test and predict data remain Lightning's, which deals them out
    over all processes.

    As under Lightning's own sampler, training data are shuffled whatever the loader says, unless
    ``Trainer(overfit_batches=...)`` asks for the same batches again and again. What Lightning's own sampler would not
    be put into is left unchanged, with a warning: an iterable dataset, anything but a DataLoader, a user's
    DistributedSampler, and every loader with ``Trainer(use_distributed_sampler=False)``. Each warning is given once, on
    global rank 0.

    Args:
        trainer: in ``fit``.
        replica: this replica's index.
        num_replicas: number of replicas.
        member: this process's index in its replica.
        replica_size: number of processes of a replica, >= 1.
        fraction: of the training set that each replica has, in (0, 1); None: all of it.
        seed: of parts and orders; the same in all processes.
        patch: ``patch(owner, name, value)`` hides a method of one object until the strategy is torn down.

    Raises:
        ValueError: later, where data are set up: a loader cannot be served.
    """

    def __init__(
        self,
        trainer: "Trainer",
        *,
        replica: int,
        num_replicas: int,
        member: int,
        replica_size: int,
        fraction: float | None,
        seed: int,
        patch: Callable[[Any, str, Callable[..., Any]], None],
    ) -> None:
        self._trainer, self._fraction = trainer, fraction
        self._num_replicas, self._replica_size = num_replicas, replica_size
        self._call = f"EASGDStrategy(data={'replicate' if fraction is None else fraction!r})"
        self._warned: set[str] = set()
        self._make_sampler = partial(
            ReplicaSampler,
            replica=replica,
            num_replicas=num_replicas,
            member=member,
            replica_size=replica_size,
            fraction=fraction,
            seed=seed,
        )
        connector = trainer._data_connector
        patch(connector, "_prepare_dataloader", partial(self._prepare, connector._prepare_dataloader))

    def _prepare(self, prepare_dataloader: Callable[..., Any], loader: Any, shuffle: bool, mode: Any) -> Any:
        """Replaces the sampler of a training loader; all others are Lightning's own matter."""
        if mode != "train":
            return prepare_dataloader(loader, shuffle=shuffle, mode=mode)
        # A batch sampler of the user's has the sampler that counts; the loader's own is then a default, not in use.
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
        reason = self._reason_to_leave(loader, sampler)
        if reason:
            self._leave(reason)
            return loader
        if loader.batch_size is None and type(loader.batch_sampler) is BatchSampler:
            raise ValueError(  # Lightning would make batches of one sample
                f"{self._call}: the loader has a BatchSampler as its batch_sampler, in which the sampler cannot be "
                "replaced; give the DataLoader batch_size and sampler instead"
            )
        if isinstance(sampler, ReplicaSampler):  # of another fit with the same CombinedLoader
            sampler = sampler.sampler
        overfits = vars(self._trainer)["overfit_batches"] > 0
        if isinstance(sampler, SequentialSampler) and not overfits:  # Lightning's own sampler shuffles here, too
            sampler = RandomSampler(sampler.data_source)
        return replace_sampler(self._trainer, loader, self._make_sampler(sampler))

    def _reason_to_leave(self, loader: Any, sampler: Any) -> str:
        """Returns why Lightning's own sampler would not be put into this loader either; empty if it would."""
        if not isinstance(loader, DataLoader):
            return f"{type(loader).__name__} is not a torch DataLoader, whose sampler could be replaced"
        if isinstance(loader.dataset, IterableDataset):
            return f"{type(loader.dataset).__name__} is an IterableDataset, which has an order of its own"
        if isinstance(sampler, DistributedSampler):
            return f"the loader's {type(sampler).__name__} deals the data out to the processes itself"
        if not self._trainer._accelerator_connector.use_distributed_sampler:
            return "Trainer(use_distributed_sampler=False) says that no sampler be replaced"
        return ""

    def _leave(self, reason: str) -> None:
        if self._fraction is not None:
            raise ValueError(
                f"{self._call}: {reason}; a fixed part for each replica needs a DataLoader over a map-style Dataset, "
                "without a DistributedSampler, and Trainer(use_distributed_sampler=True)"
            )
        if self._num_replicas * self._replica_size > 1:
            members = f" and share it out among its {self._replica_size} processes" if self._replica_size > 1 else ""
            self._warn(
                f"{self._call}: {reason}. The training loader is left as it is: each process trains on all that it "
                f"yields there. Let it give each replica an order of its own{members}"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)
