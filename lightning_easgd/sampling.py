"""Which replica sees which data.

``ReplicaSampler`` gives each replica the whole set, or a fixed part of it, in an order of the replica's own; no process
hears of another. ``DynamicSampler`` deals the batches of one epoch to the replicas as they ask for them, so that a fast
replica does more and all end together. It knows a store's counter, and no process group: drawing a batch waits for no
other replica.
"""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from lightning_easgd.communication._c10d import PrefixStore, Store

__all__ = ["Draws", "DynamicSampler", "ReplicaSampler", "set_epoch"]


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader's samplers the number of the epoch, for those that shuffle by it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for sampler in {id(s): s for s in samplers}.values():
        tell = getattr(sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)


class ReplicaSampler(Sampler[int]):
    """Yields one process's indices of an epoch that each replica has for itself.

    A replica's epoch is one pass through ``sampler``, in an order that is a function of ``seed``, ``replica`` and the
    epoch alone. With a ``fraction`` it is the indices of the replica's part alone: a fixed permutation of the set, by
    ``seed`` and the same on all replicas, is laid in a ring, and the part is the window of ``ceil(fraction * n)`` of
    ``n`` samples that begins at ``replica / num_replicas`` of it. Parts overlap evenly: with ``m`` samples each, every
    sample is in ``num_replicas * m / n`` of them, rounded up or down. Below 1, some are in none.

    The processes, or members, of a replica share its epoch out in turn, like ``DistributedSampler``: all have as many
    indices, the first ones again at the end where they would not. Not collective.

    The random numbers of ``sampler`` are torch's, from the default CPU generator, which is as before afterwards; or
    from its own ``generator``, whose initial seed then takes the place of ``seed``. A sampler with other random
    numbers has the order that it has, which its ``set_epoch``, if any, may change from epoch to epoch.

    Args:
        sampler: the order of one process's epoch, with a length.
        replica: this replica's index.
        num_replicas: number of replicas.
        member: this process's index in its replica. Default 0.
        replica_size: number of processes of a replica, >= 1. Default 1.
        fraction: of the set that a replica has, in (0, 1); ``sampler`` must then yield each sample once. None: all.
        seed: of permutation and orders; the same on all replicas. Default 0.

    Attributes:
        sampler: as given.
        epoch: as last set; 0 at first.

    Raises:
        ValueError: ``fraction`` is not in (0, 1), or ``sampler`` has no length, or, with a fraction, is neither a
            ``SequentialSampler`` nor a ``RandomSampler`` of each sample once; or, while iterating, it yields another
            number of indices than its length.
    """

    def __init__(
        self,
        sampler: Any,
        *,
        replica: int,
        num_replicas: int,
        member: int = 0,
        replica_size: int = 1,
        fraction: float | None = None,
        seed: int = 0,
    ) -> None:
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"data={fraction!r}: a fraction of the training set must be in (0, 1)")
        kind, data = type(sampler).__name__, "replicate" if fraction is None else fraction
        if not hasattr(sampler, "__len__"):
            raise ValueError(f"data={data!r}: the loader's {kind} has no length; give it a __len__")
        if fraction is not None and not _yields_each_once(sampler):
            raise ValueError(
                f"data={data!r}: the loader's {kind} chooses samples itself, so that a replica cannot have a fixed "
                "part of them; give the DataLoader shuffle=True in its place, over a torch.utils.data.Subset if need "
                "be, or use data='replicate'"
            )
        self.sampler = sampler
        self.epoch = 0
        self._replica, self._num_replicas = replica, num_replicas
        self._member, self._replica_size = member, replica_size
        self._fraction, self._seed = fraction, seed

    def __len__(self) -> int:
        """Returns the number of indices that this process has in an epoch."""
        return -(-self._num_samples() // self._replica_size)

    def __iter__(self) -> Iterator[int]:
        """Returns this process's indices."""
        order = _order(self.sampler, self._seed, lambda seed: _mixed(seed, self._replica, self.epoch))
        if self._fraction is not None:
            inside = self._part()
            order = array("q", (index for index in order if inside[index]))
        positions = range(self._member, len(self) * self._replica_size, self._replica_size)
        return (order[position % len(order)] for position in positions)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the iterators that are made from now on."""
        self.epoch = epoch
        tell = getattr(self.sampler, "set_epoch", None)
        if callable(tell):
            tell(epoch)

    def _num_samples(self) -> int:
        """Returns how many samples the replica has in an epoch."""
        total = len(self.sampler)
        if self._fraction is None:
            return total
        # Rounded first: 0.07 * 100 is a little more than 7.
        return min(total, max(1, math.ceil(round(self._fraction * total, 6))))

    def _part(self) -> bytearray:
        """Returns for each index whether it is in the replica's part."""
        total = len(self.sampler)
        ring = torch.randperm(total, generator=torch.Generator().manual_seed(self._seed)).tolist()
        begin = self._replica * total // self._num_replicas
        inside = bytearray(total)
        for position in range(begin, begin + self._num_samples()):
            inside[ring[position % total]] = True
        return inside


class Draws:
    """The numbers of the batches that one replica draws from an epoch which all replicas share.

    The first ``num_replicas`` numbers are reserved, one for each replica, so that no replica has an empty epoch. Each
    other number belongs to the replica that asks first. Numbers grow. Not collective; a draw is one addition in the
    store, and blocks for that round trip alone.

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
            # An abandoned iterator has drawn batches too: each iterator has its own counter.
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
        return _order(self.sampler, self._seed, lambda seed: seed + self.epoch)

    def _check_agreement(self, store: Store, order: "array[int]") -> None:
        own = hashlib.blake2b(order.tobytes(), digest_size=16).hexdigest()
        first, theirs = store.compare_set("order", "", f"{self._replica} {own}").decode().split()
        if theirs != own:
            raise ValueError(
                f"data='dynamic': in epoch {self.epoch} replica {self._replica} has another order of the data than "
                f"replica {first}; {type(self.sampler).__name__} must yield the same on all replicas: let its random "
                "numbers come from torch alone, or from a seed and its set_epoch, and do not split the data by rank"
            )


def _order(sampler: Any, seed: int, seed_of_epoch: Callable[[int], int]) -> "array[int]":
    """Returns the indices of a sampler's epoch.

    Its random numbers begin with ``seed_of_epoch`` of its generator's initial seed, or of ``seed`` where it has none.
    """
    generator = getattr(sampler, "generator", None)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of_epoch(seed))  # torch.manual_seed would seed GPUs, too
        if generator is not None:
            own = torch.Generator(generator.device)
            sampler.generator = own.manual_seed(seed_of_epoch(generator.initial_seed()))
        try:
            order = array("q", sampler)
        finally:
            if generator is not None:
                sampler.generator = generator
    if len(order) != len(sampler):
        raise ValueError(
            f"{type(sampler).__name__} has a length of {len(sampler)} and yields {len(order)} indices; they must be as "
            "many as it says"
        )
    return order


def _mixed(seed: int, replica: int, epoch: int) -> int:
    """Returns a seed of all three. With their sum, replica 1 would have the order of replica 0's next epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {replica} {epoch}".encode(), digest_size=8).digest(), "big")


def _yields_each_once(sampler: Any) -> bool:
    # By type: a subclass may yield whatever it likes.
    if type(sampler) is RandomSampler:
        return not sampler.replacement and len(sampler) == len(sampler.data_source)
    return type(sampler) is SequentialSampler
