"""Which replica sees which data.

``DynamicSampler`` deals the batches of one epoch to the replicas as they ask for them, so that a fast replica does more
and all end together. It knows a store's counter, and no process group: drawing a batch waits for no other replica.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Sampler

from lightning_easgd.communication._c10d import PrefixStore, Store

__all__ = ["Draws", "DynamicSampler", "set_epoch"]


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader's samplers the number of the epoch, for those that shuffle by it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for sampler in {id(s): s for s in samplers}.values():
        tell = getattr(sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)


class Draws:
    """The numbers of the batches that one replica draws from an epoch which all replicas share.

    The first ``num_replicas`` numbers are reserved, one for each replica, so that none has an empty epoch; all others
    belong to whoever asks first. Numbers grow. Not collective; a draw is one addition in the store, and blocks for that
    round trip alone.

    Args:
        store: of this epoch alone, the same on all replicas.
        replica: this replica's index.
        num_replicas: number of replicas.
        num_batches: of the epoch; at least ``num_replicas`` from ``first`` on.
        first: the first number that is dealt. Default 0.
        executor: makes each draw as soon as the one before it is handed out, so that the round trip is hidden by the
            batch's computation; the replica then holds one batch more. None: a draw is made when it is needed.

    Attributes:
        handed_out: how many numbers ``take`` has returned.
        exhausted: whether this replica is known to get no other number.
    """

    def __init__(
        self,
        store: Store,
        *,
        replica: int,
        num_replicas: int,
        num_batches: int,
        first: int = 0,
        executor: Executor | None = None,
    ) -> None:
        self.handed_out = 0
        self.exhausted = False
        self._store, self._executor = store, executor
        self._num_replicas, self._num_batches = num_replicas, num_batches
        self._reserved = first + num_replicas
        self._drawn_by_all = self._reserved  # as this replica last saw it
        self._held: int | None = first + replica  # drawn and not handed out
        self._request: Future[int] | None = None

    def take(self) -> int | None:
        """Returns the next number, None at the end. Raises ``RuntimeError`` if the store does not answer in time."""
        number = self._look()
        if number is not None:
            self._held = None
            self.handed_out += 1
            if self._executor is not None:
                self._request = self._executor.submit(self._add)
        return number

    def is_last(self, used: int) -> bool:
        """Returns whether the ``used``-th batch that was handed out is this replica's last. May draw one ahead."""
        return used == self.handed_out and self._look() is None

    def even_share(self, used: int) -> int:
        """Returns how many batches each replica would have used by now if all were equally fast: 0 .. their share.

        The replicas' draws less what they hold in advance, of which all are taken to have as much as this one, that
        has used ``used``. With one replica it is ``used``.
        """
        in_advance = self.handed_out + (self._held is not None) - used
        return max(0, -(-self._drawn_by_all // self._num_replicas) - in_advance)

    def done_by_all(self, used: int) -> int:
        """Returns how many batches all replicas have used by now, as far as this one knows; see ``even_share``."""
        in_advance = self.handed_out + (self._held is not None) - used
        return max(used, self._drawn_by_all - self._num_replicas * in_advance)

    def _look(self) -> int | None:
        if self._held is None and not self.exhausted:
            number = self._reserved - 1 + (self._add() if self._request is None else self._request.result())
            self._drawn_by_all = min(number + 1, self._num_batches)
            self.exhausted = number >= self._num_batches
            self._held = None if self.exhausted else number
        return self._held

    def _add(self) -> int:
        return self._store.add("drawn", 1)


class DynamicSampler(Sampler[int]):
    """Draws a batch's number from a counter, yields that batch's indices, and draws the next.

    Over all replicas, an epoch yields the order of ``sampler`` once, each batch on one replica. For a ``DataLoader``
    with the same batch size: ``BatchSampler`` takes exactly one batch's indices and never reads ahead, so a batch is
    drawn when it is asked for. A loader with workers asks ``num_workers * prefetch_factor`` batches ahead.

    The order is computed by each replica. Where ``sampler`` has a ``generator``, that generator's seed decides with the
    epoch, else ``seed`` does with the epoch, through torch's default CPU generator, which is as before afterwards.

    Args:
        sampler: the order of one process's epoch, with a length. Its ``set_epoch`` is called if it has one.
        store: the same on all replicas, for this sampler alone.
        batch_size: indices a batch, >= 1; the epoch's last batch may have fewer.
        num_batches: batches of an epoch over all replicas, >= ``num_replicas``; what is beyond is left out.
        replica: this replica's index.
        num_replicas: number of replicas.
        seed: of the order, together with the epoch; the same on all replicas. Default 0.
        executor: as for ``Draws``.

    Attributes:
        draws: those of the latest iterator, None before the first.
        epoch: as last set; 0 at first.

    Raises:
        ValueError: there are fewer batches than replicas, or, while iterating, this replica has computed another order
            than others, or one of another length than the sampler's.
    """

    def __init__(
        self,
        sampler: Any,
        store: Store,
        *,
        batch_size: int,
        num_batches: int,
        replica: int,
        num_replicas: int,
        seed: int = 0,
        executor: Executor | None = None,
    ) -> None:
        if num_batches < num_replicas:
            raise ValueError(
                f"data='dynamic': an epoch of {num_batches} batches has not one for each of {num_replicas} replicas; "
                "use smaller batches, more data, a larger limit_train_batches or fewer replicas"
            )
        self.sampler, self.batch_size, self.num_batches = sampler, batch_size, num_batches
        self.draws: Draws | None = None
        self.epoch = 0
        self._store, self._executor, self._seed = store, executor, seed
        self._replica, self._num_replicas = replica, num_replicas
        self._is_apart = False
        self._done_before = (-1, 0)  # an epoch, and how many of its batches were done by a run that stopped
        self._generations: Counter[int] = Counter()

    def __len__(self) -> int:
        """Returns the number of samples in the whole epoch, over all replicas."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        """Returns the indices of this replica's batches. All replicas make as many iterators in every epoch."""
        order = self._order()
        if self._is_apart:
            numbers = iter(range(self._replica, self.num_batches, self._num_replicas))
        else:
            # An iterator that was given up has drawn batches too: each has a counter of its own.
            store = PrefixStore(f"{self.epoch}/{self._generations[self.epoch]}", self._store)
            self._generations[self.epoch] += 1
            self._check_agreement(store, order)
            epoch, done = self._done_before
            self.draws = Draws(
                store,
                replica=self._replica,
                num_replicas=self._num_replicas,
                num_batches=self.num_batches,
                first=min(done, self.num_batches - self._num_replicas) if epoch == self.epoch else 0,
                executor=self._executor,
            )
            numbers = iter(self.draws.take, None)
        size = self.batch_size
        return (index for number in numbers for index in order[number * size : (number + 1) * size])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the iterators that are made from now on."""
        self.epoch = epoch
        tell = getattr(self.sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)

    def resume(self, epoch: int, num_done: int) -> None:
        """Leaves out an epoch's first ``num_done`` batches, which a run that stopped has done. All replicas call it.

        One batch for each replica is left in any case.
        """
        self._done_before = (epoch, num_done)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, an iterator that begins draws nothing: it has every ``num_replicas``-th batch. Not collective."""
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False

    def _order(self) -> "array[int]":
        generator = getattr(self.sampler, "generator", None)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed + self.epoch)  # torch.manual_seed would seed GPUs, too
            if generator is not None:
                own = torch.Generator(generator.device)
                self.sampler.generator = own.manual_seed(generator.initial_seed() + self.epoch)
            try:
                order = array("q", self.sampler)
            finally:
                if generator is not None:
                    self.sampler.generator = generator
        if len(order) != len(self):
            raise ValueError(
                f"data='dynamic': {type(self.sampler).__name__} has a length of {len(self)} and yields {len(order)} "
                "indices; they must be as many as it says"
            )
        return order

    def _check_agreement(self, store: Store, order: "array[int]") -> None:
        own = hashlib.blake2b(order.tobytes(), digest_size=16).hexdigest()
        first, theirs = store.compare_set("order", "", f"{self._replica} {own}").decode().split()
        if theirs != own:
            raise ValueError(
                f"data='dynamic': in epoch {self.epoch} replica {self._replica} has another order of the data than "
                f"replica {first}; {type(self.sampler).__name__} must yield the same on all replicas: let its random "
                "numbers come from torch alone, or from a seed and its set_epoch, and do not split the data by rank"
            )
