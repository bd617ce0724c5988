"""``data="dynamic"``: makes Lightning's training loop follow an epoch that all replicas share.

Lightning counts a loader's batches beforehand. Here nobody knows how many a replica will have: this puts a
``DynamicSampler`` into the training loader, tells the loop which batch is the replica's last, and keeps the schedules
of learning rates with the shared epoch instead of the replica's own count.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_easgd.communication._c10d import PrefixStore, Store
from lightning_easgd.communication._roll_call import gather
from lightning_easgd.sampling import Draws, DynamicSampler
from lightning_easgd.trainer.data.loaders import replace_sampler
from lightning_easgd.trainer.seams import is_a

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["DynamicData"]


class DynamicData:
    """The shared epochs of one ``fit``.

    Not collective. All replicas create it, before ``configure_optimizers``, which may ask for the training's length;
    they call ``start`` before the loop runs and ``close`` in the end.

    A step schedule takes the steps of an even share on every replica, fast or slow, spread over the shared epoch:
    ``trainer.estimated_stepping_batches``, read in ``configure_optimizers``, is right. ``max_steps`` counts the
    replica's own. ``limit_train_batches`` is a replica's even share, as an integer times ``num_replicas``; as a
    fraction it is that of the epoch.

    Args:
        trainer: in ``fit``.
        store: for this alone; the same on all replicas.
        replica: this replica's index.
        num_replicas: number of replicas.
        seed: of the orders, together with the epoch; the same on all replicas.
        timeout: the longest wait for the other replicas.
        patch: ``patch(owner, name, value)`` hides a method of one object until the strategy is torn down.
        ahead: whether a batch is drawn in a thread, while the one before it is computed: hides the round trip to the
            store where that is long, for one batch more that a replica holds.

    Raises:
        ValueError: the Trainer validates within the epoch; later, where data are set up: the loader cannot be served.
    """

    def __init__(
        self,
        trainer: "Trainer",
        store: Store,
        *,
        replica: int,
        num_replicas: int,
        seed: int,
        timeout: timedelta,
        patch: Callable[[Any, str, Callable[..., Any]], None],
        ahead: bool,
    ) -> None:
        private: Any = trainer
        in_seconds = private._val_check_time_interval
        interval = trainer.val_check_interval if in_seconds is None else f"{in_seconds:g} s"
        if not isinstance(interval, float) or interval != 1.0:
            raise _refusal(
                f"Trainer(val_check_interval={interval!r}) validates within an epoch, where the replicas are at "
                "different batches; use 1.0"
            )
        self._trainer, self._store, self._seed, self._timeout = trainer, store, seed, timeout
        self._replica, self._num_replicas = replica, num_replicas
        self._executor = ThreadPoolExecutor(1, "lightning_easgd-draws") if ahead else None
        self._sampler: DynamicSampler | None = None
        self._num_loaders = self._num_loaders_before = 0
        self._is_training = self._has_resumed = False
        self._done_by_all: int | None = None  # of the epoch that a checkpoint was taken in
        self._clock = (-1, 0)  # an epoch, and how many batches of an even share its schedulers have followed

        connector, fit_loop = trainer._data_connector, trainer.fit_loop
        epoch_loop = fit_loop.epoch_loop
        patch(connector, "_prepare_dataloader", partial(self._prepare, connector._prepare_dataloader))
        patch(fit_loop, "setup_data", partial(self._set_up, fit_loop.setup_data))
        patch(epoch_loop, "on_run_start", partial(self._start_epoch, epoch_loop.on_run_start))
        patch(epoch_loop, "update_lr_schedulers", partial(self._end_batch, epoch_loop.update_lr_schedulers))
        patch(epoch_loop, "_should_check_val_fx", self._should_validate)
        for optimization in (epoch_loop.automatic_optimization, epoch_loop.manual_optimization):
            patch(optimization, "run", partial(self._run_batch, optimization.run))

    def start(self) -> None:
        """From here on the loop's length is the whole epoch, of which a fast replica may take more than its share."""
        self._is_training = True
        self._set_lengths()

    def close(self) -> None:
        """Ends the thread that draws. Blocks for at most one round trip to the store, or the store's timeout."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, the training loader can be iterated for other ends: its batches are drawn from nobody."""
        if self._sampler is None:
            yield
        else:
            with self._sampler.apart():
                yield

    def state_dict(self) -> dict[str, Any]:
        """Returns where the schedules are in the shared epoch, and how many of its batches all replicas have done."""
        has_begun = self._sampler is not None and self._sampler.draws is not None
        return {"clock": self._clock, "done": self._draws.done_by_all(self._used) if has_begun else 0}

    def load_state_dict(self, state: dict[str, Any], *, of_all: bool = False) -> None:
        """Restores what ``state_dict`` returned.

        Args:
            state: of this replica, or of another one.
            of_all: whether every replica gets the same state, which then says where in the epoch all are; else each
                says how much it has done itself.
        """
        epoch, clock = state["clock"]
        self._clock = (epoch, clock)
        self._done_by_all = int(state["done"]) if of_all else None

    # --- the loader -------------------------------------------------------------------------------------------------

    def _prepare(self, prepare_dataloader: Callable[..., Any], loader: Any, shuffle: bool, mode: Any) -> Any:
        """Replaces the sampler of a training loader; all others are Lightning's own matter."""
        if mode != "train":
            return prepare_dataloader(loader, shuffle=shuffle, mode=mode)
        self._num_loaders += 1
        self._refuse(loader)
        num_samples, batch_size = len(loader.sampler), loader.batch_size or 1
        total = num_samples // batch_size if loader.drop_last else -(-num_samples // batch_size)
        self._sampler = DynamicSampler(
            loader.sampler,
            PrefixStore(f"loader/{self._num_loaders}", self._store),
            batch_size=batch_size,
            num_batches=self._limited(total),
            replica=self._replica,
            num_replicas=self._num_replicas,
            seed=self._seed,
            executor=self._executor,
        )
        return replace_sampler(self._trainer, loader, self._sampler)

    def _refuse(self, loader: Any) -> None:
        if self._num_loaders - self._num_loaders_before > 1:
            raise _refusal("there are several training loaders, which cannot share one counter; combine their Datasets")
        kind = type(loader).__name__
        if not isinstance(loader, DataLoader):
            raise _refusal(f"the training loader is a {kind}; a torch DataLoader is needed, whose sampler is replaced")
        if isinstance(loader.dataset, IterableDataset):
            raise _refusal(
                f"{type(loader.dataset).__name__} is an IterableDataset, which has no batches to draw by number; use a "
                "map-style Dataset, or data='shard' and split the stream by rank in the dataset"
            )
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise _refusal(
                f"{kind} has an __iter__ of its own, whose batches cannot be counted; use a plain DataLoader"
            )
        if type(loader.batch_sampler) not in (BatchSampler, type(None)) or (
            loader.batch_sampler is not None and loader.batch_size is None
        ):
            raise _refusal(
                f"the loader's batch_sampler is a {type(loader.batch_sampler).__name__} of its own, whose batches are "
                "not runs of one order of the data; give the DataLoader batch_size and sampler instead"
            )
        if isinstance(loader.sampler, DistributedSampler):
            raise _refusal(
                f"the loader's {type(loader.sampler).__name__} has already dealt the data to the ranks; leave it out"
            )
        if not hasattr(loader.sampler, "__len__"):
            raise _refusal(f"the loader's {type(loader.sampler).__name__} has no length; give it a __len__")

    def _limited(self, total: int) -> int:
        """Returns how many of an epoch's batches are used."""
        limit = self._trainer.limit_train_batches
        return min(total, limit * self._num_replicas) if isinstance(limit, int) else int(total * limit)

    def _set_up(self, setup_data: Callable[[], None]) -> None:
        self._num_loaders_before = self._num_loaders
        setup_data()
        if is_a(self._trainer.fit_loop._data_fetcher, "loops.fetchers._DataLoaderIterDataFetcher"):
            raise _refusal("training_step(dataloader_iter) takes its batches itself; let it take a batch instead")
        if self._sampler is not None and self._is_training and self._trainer.fit_loop.restarting:
            self._resume(self._sampler)
        self._set_lengths()

    def _resume(self, sampler: DynamicSampler) -> None:
        """Goes on after as many batches of the epoch as all replicas have done. Collective, once in ``fit``.

        Which ones they were is not known: those that a replica held in advance when it was saved are not done, and as
        many others are done again.
        """
        if self._has_resumed:
            return
        self._has_resumed = True
        fit_loop: Any = self._trainer.fit_loop
        progress = fit_loop.epoch_loop.batch_progress
        told = gather(
            self._store,
            "resumed",
            f"{progress.current.ready} {int(progress.is_last_batch)}",
            replica=self._replica,
            num_replicas=self._num_replicas,
            timeout=self._timeout,
            purpose="say how much of the epoch it has done",
        )
        replicas = [text.split() for text in told]
        if all(ended == "1" for _, ended in replicas):
            return
        sampler.set_epoch(fit_loop.epoch_progress.current.processed)
        own = sum(int(done) for done, _ in replicas)
        sampler.resume(sampler.epoch, own if self._done_by_all is None else self._done_by_all)
        iter(fit_loop._data_fetcher)

    def _set_lengths(self, done: int = 0) -> None:
        """Replaces what Lightning counted: each replica's share while the length is asked for, then the whole epoch.

        Args:
            done: batches of the epoch that this replica has done before it was resumed, with which Lightning counts.
        """
        fit_loop: Any = self._trainer.fit_loop
        combined = fit_loop._combined_loader
        if self._sampler is None or combined is None:
            return
        length = self._sampler.num_batches if self._is_training else self._share
        combined.limits = combined._iterator.limits = [length]
        fit_loop._data_fetcher.length = fit_loop.max_batches = length + done

    # --- the loop ---------------------------------------------------------------------------------------------------

    @property
    def _share(self) -> int:
        """Batches of a replica in an epoch if all were equally fast."""
        assert self._sampler is not None
        return -(-self._sampler.num_batches // self._num_replicas)

    @property
    def _draws(self) -> Draws:
        assert self._sampler is not None
        assert self._sampler.draws is not None
        return self._sampler.draws

    @property
    def _used(self) -> int:
        # Not the loop's count, which goes on from a checkpoint's.
        combined: Any = self._trainer.fit_loop._combined_loader
        return int(combined._iterator.iterators[0]._num_yielded)

    def _start_epoch(self, on_run_start: Callable[[Any], None], data_fetcher: Any) -> None:
        """Lightning's own, which creates the epoch's iterator."""
        on_run_start(data_fetcher)
        self._set_lengths(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _look_for_end(self) -> None:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        if not progress.is_last_batch:
            progress.is_last_batch = self._draws.is_last(self._used)

    def _run_batch(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wraps Lightning's method: says before the batch runs whether it is the replica's last.

        While gradients are being accumulated, the last batch closes the window, and the loop must know that in advance.
        So must a training_step with manual optimization, which may look at ``trainer.is_last_batch``.
        """
        epoch_loop = self._trainer.fit_loop.epoch_loop
        if epoch_loop._should_accumulate() or not self._trainer.lightning_module.automatic_optimization:
            self._look_for_end()
        return run(*args, **kwargs)

    def _end_batch(self, update: Callable[..., None], interval: str, update_plateau_schedulers: bool) -> None:
        """Lightning's own, first called when a batch is computed, before anything depends on its being the last."""
        if interval != "step" or update_plateau_schedulers:
            update(interval, update_plateau_schedulers=update_plateau_schedulers)
            return
        self._look_for_end()
        # The schedulers see the batches of an even share, as many as all have done by now, instead of this replica's.
        assert self._sampler is not None
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        ready, is_last = progress.current.ready, progress.is_last_batch
        epoch, followed = self._clock
        if epoch != self._sampler.epoch:
            followed = ready - 1  # 0, unless resumed without this object's state
        reached = max(followed, min(self._draws.even_share(self._used), self._share))
        try:
            for batch in range(followed + 1, reached + 1):
                progress.current.ready, progress.is_last_batch = batch, batch == self._share
                update(interval, update_plateau_schedulers=False)
        finally:
            progress.current.ready, progress.is_last_batch = ready, is_last
        self._clock = (self._sampler.epoch, reached)

    def _should_validate(self, _: Any) -> bool:
        """At the replica's last batch or where all stop; a limit on batches says nothing about one replica's."""
        trainer = self._trainer
        epoch_loop = trainer.fit_loop.epoch_loop
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        return epoch_loop._should_check_val_epoch() and (epoch_loop.batch_progress.is_last_batch or stops)


def _refusal(reason: str) -> ValueError:
    return ValueError(f"EASGDStrategy(data='dynamic'): {reason}")
