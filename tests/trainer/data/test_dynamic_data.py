"""Replicas that draw batches from one shared epoch: the sampler in threads, and the Trainer in processes."""

import itertools
import os
import random
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_easgd import EASGD, EASGDStrategy
from lightning_easgd.communication import SharedMemory
from lightning_easgd.core import lock_step
from lightning_easgd.sampling import Draws, DynamicSampler
from tests import modules
from tests.helpers import TIMEOUT, run_replicas, run_threads
from tests.modules import Regression, Stream, linear_data, trainer

# --- draws ---


def _draws(store: dist.Store, replica: int, **kwargs: Any) -> Draws:
    return Draws(store, replica=replica, **{"num_replicas": 2, "num_batches": 6, **kwargs})


def test_each_replica_has_a_first_batch_whoever_asks_first():
    store = dist.HashStore()
    fast, slow = _draws(store, 0), _draws(store, 1)
    assert list(iter(fast.take, None)) == [0, 2, 3, 4, 5]
    assert list(iter(slow.take, None)) == [1]
    assert fast.take() is None  # and stays at its end


def test_the_last_batch_is_known_when_it_is_used():
    store = dist.HashStore()
    first, second = _draws(store, 0, num_batches=4), _draws(store, 1, num_batches=4)
    assert first.take() == 0
    assert not first.is_last(1)  # draws 2 ahead
    assert second.take() == 1
    assert not second.is_last(1)  # draws 3 ahead
    assert first.take() == 2
    assert not first.is_last(1)  # one of the two that a loader has asked for is not used yet
    assert first.is_last(2)
    assert not second.exhausted
    assert second.take() == 3
    assert second.is_last(2)
    assert first.take() is second.take() is None


def test_the_even_share_follows_what_all_have_done():
    store = dist.HashStore()
    fast, slow = _draws(store, 0), _draws(store, 1)
    seen = []
    slow.take()
    for used in range(1, 5):
        fast.take()
        assert not fast.is_last(used)
        seen.append(fast.even_share(used))
    assert seen == [1, 1, 2, 2]  # 3, 4, 5 and 6 are drawn by then, and each has one in advance
    fast.take()
    assert fast.is_last(5)
    assert fast.even_share(5) == 3
    assert slow.is_last(1)
    assert slow.even_share(1) == 3  # the share of 6 batches, though it did only one


def test_a_resumed_epoch_goes_on_where_it_was():
    store = dist.HashStore()
    pair = [_draws(store, r, num_batches=9, first=4) for r in range(2)]
    assert [each.take() for each in pair] == [4, 5]
    assert [each.even_share(1) for each in pair] == [3, 3]
    assert list(iter(pair[1].take, None)) == [6, 7, 8]
    assert pair[0].is_last(1)
    assert pair[0].even_share(1) == 5


def test_one_replicas_even_share_is_what_it_has_used():
    draws = _draws(dist.HashStore(), 0, num_replicas=1)
    for used in range(1, 7):
        assert draws.take() == used - 1
        assert draws.is_last(used) == (used == 6)
        assert draws.even_share(used) == used


def test_draws_ahead_are_made_while_the_batch_is_computed():
    class Counting:
        def __init__(self):
            self.store, self.adds = dist.HashStore(), 0

        def add(self, key, amount):
            self.adds += 1
            return self.store.add(key, amount)

    store = Counting()
    with ThreadPoolExecutor(1) as executor:
        draws = _draws(store, 0, num_replicas=1, executor=executor)
        assert draws.take() == 0
        executor.submit(lambda: None).result(timeout=60)  # the thread has done what it was given before
        assert store.adds == 1
        assert [*iter(draws.take, None)] == [1, 2, 3, 4, 5]
    assert store.adds == 6


# --- sampler ---


def _sampler(store: dist.Store, replica: int, sampler: Any, batch_size: int = 3, **kwargs: Any) -> DynamicSampler:
    defaults = {"num_batches": -(-len(sampler) // batch_size), "num_replicas": 2}
    return DynamicSampler(sampler, store, batch_size=batch_size, replica=replica, **{**defaults, **kwargs})


def _epoch_in_turn(samplers: list[Any], turns: list[int], drop_last: bool = False, **kwargs: Any) -> Any:
    """Returns each replica's batches: they draw in the order of ``turns``, again and again, to their ends."""
    store = dist.HashStore()
    dynamic = [_sampler(store, r, s, num_replicas=len(samplers), **kwargs) for r, s in enumerate(samplers)]
    batches = [iter(BatchSampler(each, each.batch_size, drop_last)) for each in dynamic]
    had: list[list[list[int]]] = [[] for _ in samplers]
    for replica in turns * 20:
        had[replica] += itertools.islice(batches[replica], 1)
    return had


def _in_order(had: list[list[list[int]]]) -> list[list[int]]:
    return sorted(itertools.chain.from_iterable(had))


@pytest.mark.parametrize(
    ("turns", "counts"), [([0, 1], [4, 3]), ([1, 0], [3, 4]), ([0, 0, 0, 1], [6, 1]), ([1, 1, 1, 0], [1, 6])]
)
def test_every_index_once_and_the_short_batch_at_the_end(turns, counts):
    had = _epoch_in_turn([SequentialSampler(range(20))] * 2, turns)
    assert _in_order(had) == [[*range(i, min(i + 3, 20))] for i in range(0, 20, 3)]
    assert had[0][0] == [0, 1, 2]
    assert had[1][0] == [3, 4, 5]
    assert [len(h) for h in had] == counts


def test_the_short_batch_is_dropped():
    had = _epoch_in_turn([SequentialSampler(range(20))] * 2, [0, 0, 1], drop_last=True, num_batches=6)
    assert sorted(itertools.chain(*_in_order(had))) == [*range(18)]


@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("ahead", [False, True])
def test_every_index_once_over_racing_threads(num_replicas, ahead):
    def draw(replica: int, store: dist.Store) -> list[int]:
        with ThreadPoolExecutor(1) as executor:
            sampler = _sampler(
                store,
                replica,
                SequentialSampler(range(500)),
                num_replicas=num_replicas,
                executor=executor if ahead else None,
            )
            return list(sampler)

    had = run_threads(draw, num_replicas)
    assert sorted(itertools.chain(*had)) == [*range(500)]
    assert all(had)


def _orders(make: Any, epochs: list[int], seed: int = 0) -> list[list[int]]:
    sampler = _sampler(dist.HashStore(), 0, make(), num_replicas=1, seed=seed)
    orders = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    return orders


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomSampler(range(20)),
        lambda: RandomSampler(range(20), generator=torch.Generator().manual_seed(5)),
        lambda: WeightedRandomSampler([1.0, 2.0] * 10, 20),
    ],
    ids=["random", "generator", "weighted"],
)
def test_epoch_and_seed_reproduce_the_order(make):
    before = torch.random.get_rng_state()
    first, second, again = _orders(make, [0, 1, 0])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == again != second
    assert _orders(make, [1]) == [second]


def test_the_seed_is_the_arguments_or_the_generators():
    def with_generator(seed: int) -> Any:
        return lambda: RandomSampler(range(20), generator=torch.Generator().manual_seed(seed))

    assert _orders(lambda: RandomSampler(range(20)), [0], seed=1) != _orders(lambda: RandomSampler(range(20)), [0])
    assert _orders(with_generator(5), [0]) != _orders(with_generator(6), [0])


def test_a_generator_is_the_samplers_own_afterwards():
    generator = torch.Generator().manual_seed(5)
    sampler = RandomSampler(range(20), generator=generator)
    before = generator.get_state()
    list(_sampler(dist.HashStore(), 0, sampler, num_replicas=1))
    assert sampler.generator is generator
    assert torch.equal(generator.get_state(), before)


def test_the_samplers_own_epoch_is_set():
    class ByEpoch(Sampler):
        epoch = 0

        def __len__(self):
            return 6

        def __iter__(self):
            return iter([(i + self.epoch) % 6 for i in range(6)])

        def set_epoch(self, epoch):
            self.epoch = epoch

    assert _orders(ByEpoch, [2]) == [[2, 3, 4, 5, 0, 1]]


def test_an_iterator_that_was_given_up_takes_nothing_from_the_next():
    store = dist.HashStore()
    pair = [_sampler(store, r, SequentialSampler(range(20))) for r in range(2)]
    for each in pair:
        next(iter(each))
    assert sorted(itertools.chain(*map(list, pair))) == [*range(20)]


@pytest.mark.parametrize(("num_done", "left"), [(2, range(6, 20)), (6, range(15, 20)), (7, range(15, 20))])
def test_a_resumed_epoch_leaves_out_what_is_done(num_done, left):
    store = dist.HashStore()
    pair = [_sampler(store, r, SequentialSampler(range(20))) for r in range(2)]
    for each in pair:
        each.resume(0, num_done)
    assert sorted(itertools.chain(*pair)) == [*left]  # one batch for each replica in any case
    for each in pair:
        each.set_epoch(1)
    assert sorted(itertools.chain(*pair)) == [*range(20)]


def test_apart_nothing_is_drawn():
    store = dist.HashStore()
    pair = [_sampler(store, r, SequentialSampler(range(20))) for r in range(2)]
    under_way = [iter(each) for each in pair]
    firsts = [next(each) for each in under_way]
    with pair[0].apart():
        assert list(pair[0]) == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19]
    assert sorted([*firsts, *itertools.chain(*under_way)]) == [*range(20)]


def test_replicas_with_another_order_are_named():
    class ByPythonsNumbers(Sampler):
        def __init__(self, seed):
            self.random = random.Random(seed)

        def __len__(self):
            return 20

        def __iter__(self):
            return iter(self.random.sample(range(20), 20))

    store = dist.HashStore()
    pair = [_sampler(store, r, ByPythonsNumbers(r)) for r in range(2)]
    iter(pair[1])
    with pytest.raises(
        ValueError, match="in epoch 0 replica 0 has another order of the data than replica 1; ByPythons"
    ):
        iter(pair[0])


def test_a_sampler_that_is_shorter_than_it_says_is_refused():
    class Short(SequentialSampler):
        def __iter__(self):
            return iter(range(10))

    with pytest.raises(ValueError, match="Short has a length of 20 and yields 10 indices"):
        iter(_sampler(dist.HashStore(), 0, Short(range(20))))


def test_fewer_batches_than_replicas_are_refused():
    with pytest.raises(ValueError, match="an epoch of 2 batches has not one for each of 3 replicas; use smaller"):
        _sampler(dist.HashStore(), 0, SequentialSampler(range(6)), num_replicas=3)


# --- the Trainer ---


class _Numbered(Dataset):
    """Samples that know their number."""

    def __init__(self, num_samples: int) -> None:
        self.data = linear_data(num_samples)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return (*self.data[index], index)


class _Module(Regression):
    """Keeps the numbers of its samples, and a schedule that fails beyond its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: defaultdict[int, list[list[int]]] = defaultdict(list)  # by epoch
        self.validated: list[int] = []
        self.estimated: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, numbers = batch
        self.seen[self.current_epoch].append(numbers.tolist())
        return self.loss((x, y))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[:2]), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.validated.append(len(self.seen[self.current_epoch]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        self.estimated = self.trainer.estimated_stepping_batches
        # The step after the last would be beyond the cycle's end, and an error.
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=self.estimated + 1)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}, {"scheduler": decay, "interval": "epoch"}]


FASTER, MOST = 2, 30  # how much faster replica 0 is; batches of an epoch, at most


class _Pace(modules.pytorch_lightning.Callback):
    """Replica 0 is twice as fast as the others: they begin a batch when it has done more than twice as many as they.

    When it is through with its epoch nobody waits any more.

    Attributes:
        late: how many batches this replica began, in each epoch, after replica 0 was through.
    """

    def __init__(self) -> None:
        self.late: Counter[int] = Counter()
        self.done: Counter[int] = Counter()

    def on_train_start(self, trainer, pl_module):
        self.store = dist.PrefixStore("tests/pace", dist.distributed_c10d._get_default_store())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        epoch = trainer.current_epoch
        if trainer.global_rank != 0:
            self.late[epoch] += self.store.check([f"{epoch}/through"])
            self.store.wait([f"{epoch}/{FASTER * self.done[epoch] + 1}"], TIMEOUT)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        epoch = trainer.current_epoch
        self.done[epoch] += 1
        if trainer.global_rank == 0:
            self.store.set(f"{epoch}/{self.done[epoch]}", "")
            if trainer.is_last_batch:
                for number in range(self.done[epoch] + 1, FASTER * MOST + 2):
                    self.store.set(f"{epoch}/{number}", "")
                self.store.set(f"{epoch}/through", "")


def _fit(
    replica: int,
    num_samples: int = 118,
    loader: Any = None,
    module: Any = None,
    devices: int = 2,
    transport: Any = None,
    callbacks: Any = (),
    ckpt_path: Any = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Fits with replica 0 fast and the others slow; the replicas exchange nothing after their first step."""
    model, pace = (module or _Module)(), _Pace()
    strategy = EASGDStrategy(EASGD(period=10_000, moving_rate=0.0), transport, data="dynamic")
    t = trainer(strategy=strategy, devices=devices, callbacks=[pace, *callbacks], **kwargs)
    data = _Numbered(num_samples)
    train = DataLoader(data, **{"batch_size": 4, "shuffle": True, **(loader or {})})
    t.fit(model, train, DataLoader(data, 32), ckpt_path=ckpt_path)
    schedulers = [config.scheduler for config in t.lr_scheduler_configs]
    return {
        "seen": list(model.seen.values()),
        "steps": t.global_step,
        "estimated": model.estimated,
        "scheduled": [scheduler.last_epoch for scheduler in schedulers],
        "validated": model.validated,
        "late": pace.late,
        "epoch": t.current_epoch,
    }


def _epochs(results: list[dict[str, Any]]) -> list[list[int]]:
    """Returns all samples of each epoch, sorted."""
    return [sorted(itertools.chain(*itertools.chain(*had))) for had in zip(*(r["seen"] for r in results), strict=True)]


def _counts(results: list[dict[str, Any]], epoch: int = 0) -> list[int]:
    return [len(r["seen"][epoch]) for r in results]


def _batches(results: list[dict[str, Any]], epoch: int = 0) -> set[tuple[int, ...]]:
    return {tuple(batch) for r in results for batch in r["seen"][epoch]}


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_each_sample_once_an_epoch_and_the_fast_replica_does_more(num_replicas):
    results = run_replicas(partial(_fit, max_epochs=2, devices=num_replicas), num_replicas)
    assert _epochs(results) == [[*range(118)]] * 2
    for epoch in range(2):
        counts = _counts(results, epoch)
        assert sum(counts) == 30
        assert counts[0] > max(counts[1:])
        assert Counter(map(len, _batches(results, epoch))) == {4: 29, 2: 1}
    for r in results:
        assert r["epoch"] == 2
        assert r["estimated"] == 2 * 30 // num_replicas
        assert r["scheduled"] == [r["estimated"], 2]  # each replica's schedules end where they should
        assert r["steps"] == sum(map(len, r["seen"]))
        assert r["validated"] == [len(had) for had in r["seen"]]  # once an epoch, after the replica's last batch
        # They end together: when replica 0 is through there is left what each held, of which it had begun one. An even
        # split would leave a slow one half of its batches.
        assert max(r["late"].values(), default=0) <= 1
    assert _batches(results, 0).isdisjoint(_batches(results, 1))  # shuffled anew


def test_an_asynchronous_transport_trains_on_one_epoch_too():
    results = run_replicas(partial(_fit, transport=SharedMemory(), max_epochs=2), 2)
    assert _epochs(results) == [[*range(118)]] * 2
    for r in results:
        assert r["scheduled"] == [r["estimated"], 2]
        assert r["validated"] == [len(had) for had in r["seen"]]
    assert _counts(results)[0] > _counts(results)[1]


def _fit_on_a_host_of_its_own(replica: int) -> dict[str, Any]:
    os.environ.update(NODE_RANK=str(replica), LOCAL_RANK="0")
    return _fit(replica, devices=1, num_nodes=2, max_epochs=2)


def test_on_several_hosts_batches_are_drawn_ahead():
    results = run_replicas(_fit_on_a_host_of_its_own, 2)
    assert _epochs(results) == [[*range(118)]] * 2
    for r in results:
        assert r["scheduled"] == [r["estimated"], 2]
    assert _counts(results)[0] > _counts(results)[1]


class _Decaying(_Module):
    """With a schedule that has no end."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": decay, "interval": "step", "frequency": 2}]


def test_the_frequency_of_a_schedule_counts_the_even_shares_batches():
    for r in run_replicas(partial(_fit, module=_Decaying, max_epochs=2), 2):
        assert r["scheduled"] == [2 * (15 // 2)]


class _StopsAfterTwoEpochs(modules.pytorch_lightning.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1


def test_a_run_that_is_resumed_goes_on_with_the_next_epochs_order(tmp_path):
    def checkpoint(name: str) -> Any:
        return modules.pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, name, save_top_k=-1)

    run = partial(_fit, max_epochs=3, module=_Decaying, enable_checkpointing=True)
    whole = run_replicas(partial(run, callbacks=[checkpoint("whole{epoch}")]), 2)
    part = run_replicas(partial(run, callbacks=[checkpoint("part"), _StopsAfterTwoEpochs()]), 2)
    assert len(part[0]["seen"]) == 2
    rest = run_replicas(partial(run, callbacks=[checkpoint("rest")], ckpt_path=tmp_path / "part.ckpt"), 2)
    assert _epochs(rest) == [[*range(118)]]
    assert _batches(rest) == _batches(whole, 2)
    for r in rest:
        assert r["scheduled"] == [3 * (15 // 2)]


class _StopsWithin(modules.pytorch_lightning.Callback):
    """Saves and stops in epoch 1, the fast replica after more batches than the slow one."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_fit_start(self, trainer, pl_module):
        lock_step.PATIENCE_S = 0.0  # no exchange will tell the other

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == (8 if trainer.global_rank == 0 else 2):
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_run_that_is_resumed_within_an_epoch_does_the_rest_of_it(tmp_path):
    path = tmp_path / "within.ckpt"
    run = partial(_fit, max_epochs=3, module=_Decaying)
    part = run_replicas(partial(run, callbacks=[_StopsWithin(path)]), 2)
    assert _counts(part, 1) == [9, 3]
    rest = run_replicas(partial(run, ckpt_path=path), 2)
    assert sum(_counts(rest)) == 30 - 12
    done = _batches(part, 1) | _batches(rest, 0)
    assert len(done) >= 30 - 2  # each replica had drawn one batch more when it was saved
    assert _epochs(rest)[1] == [*range(118)]
    for r in rest:
        assert r["scheduled"] == [3 * (15 // 2)]
        assert r["epoch"] == 3


class _SavesAtLastBatch(modules.pytorch_lightning.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and trainer.is_last_batch:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_of_the_last_batch_is_followed_by_the_next_epoch(tmp_path):
    path = tmp_path / "last.ckpt"
    run = partial(_fit, max_epochs=3, module=_Decaying)
    whole = run_replicas(partial(run, callbacks=[_SavesAtLastBatch(path)]), 2)
    rest = run_replicas(partial(run, ckpt_path=path), 2)
    assert _epochs(rest) == [[*range(118)]]
    assert _batches(rest) == _batches(whole, 2)
    for r in rest:
        assert r["epoch"] == 3


def test_the_batches_do_not_depend_on_who_draws_them():
    two, three = (run_replicas(partial(_fit, devices=n), n) for n in (2, 3))
    assert _batches(two) == _batches(three)


def test_without_shuffling_the_order_is_the_datas():
    results = run_replicas(
        partial(_fit, loader={"shuffle": False, "drop_last": True}, use_distributed_sampler=False), 2
    )
    assert _batches(results) == {tuple(range(i, i + 4)) for i in range(0, 116, 4)}


@pytest.mark.parametrize(
    ("limits", "num_batches", "share"),
    [
        ({"limit_train_batches": 8}, 16, 8),
        ({"limit_train_batches": 100}, 30, 15),
        ({"limit_train_batches": 0.5}, 15, 8),
        ({"fast_dev_run": True}, 2, 1),
        ({"overfit_batches": 3, "limit_val_batches": 0}, 6, 3),
    ],
)
def test_a_limit_is_shared(limits, num_batches, share):
    results = run_replicas(partial(_fit, **limits), 2)
    assert sum(_counts(results)) == num_batches
    assert len(set(itertools.chain(*_epochs(results)))) == 4 * num_batches - 2 * (num_batches == 30)
    for r in results:
        assert r["estimated"] == share
        assert r["scheduled"][0] == share


def test_a_limit_validates_at_the_end_alone():
    results = run_replicas(partial(_fit, limit_train_batches=4, max_epochs=2), 2)
    for r in results:
        assert r["validated"] == [len(had) for had in r["seen"]]
        assert r["epoch"] == 2


def test_a_last_window_of_accumulation_that_is_short_steps():
    results = run_replicas(partial(_fit, accumulate_grad_batches=4, max_epochs=2), 2)
    assert _epochs(results) == [[*range(118)]] * 2
    for r in results:
        assert r["steps"] == sum(-(-len(had) // 4) for had in r["seen"])
        assert r["estimated"] == r["scheduled"][0] == 2 * 4  # of 15 batches each


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_ask_ahead(persistent):
    loader = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    results = run_replicas(partial(_fit, loader=loader, max_epochs=2), 2)
    assert _epochs(results) == [[*range(118)]] * 2
    for r in results:
        assert r["scheduled"] == [r["estimated"], 2]
        assert r["validated"] == [len(had) for had in r["seen"]]
    assert _counts(results)[0] > _counts(results)[1] >= 4


def test_loaders_that_are_made_anew_each_epoch():
    results = run_replicas(partial(_fit, reload_dataloaders_every_n_epochs=1, max_epochs=3), 2)
    assert _epochs(results) == [[*range(118)]] * 3
    assert _batches(results, 1).isdisjoint(_batches(results, 2))


def test_samples_without_batches():
    results = run_replicas(partial(_fit, num_samples=12, module=_OneSample, loader={"batch_size": None}), 2)
    assert _epochs(results) == [[*range(12)]]


class _OneSample(_Module):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, number = batch
        return super().training_step((x, y, torch.tensor([number])), batch_idx)


class _Manual(_Module):
    """Steps every 4 batches and at the end, as Lightning's documentation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % 4 == 0 or self.trainer.is_last_batch:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_knows_its_last_batch():
    results = run_replicas(partial(_fit, module=_Manual), 2)
    assert _epochs(results) == [[*range(118)]]
    for r in results:
        assert r["steps"] == -(-len(r["seen"][0]) // 4)


class _Skipping(_Module):
    """Never calls the optimizer in the hook, so that the strategy sees no step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer_closure()


def test_batches_without_a_step_count():
    results = run_replicas(partial(_fit, module=_Skipping), 2)
    assert _epochs(results) == [[*range(118)]]
    for r in results:
        assert r["validated"] == [len(had) for had in r["seen"]]


# --- refusals ---


class _OwnBatches(BatchSampler):
    pass


class _OwnIteration(DataLoader):
    def __iter__(self):
        return super().__iter__()


class _NoLength(Sampler):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(range(len(self.data)))


class _NoLoader:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield self.data[:4]


class _TakesIterator(Regression):
    def training_step(self, dataloader_iter):
        return None


def _refused(replica: int, make: Any, module: Any = Regression, **kwargs: Any) -> str:
    t = trainer(strategy=EASGDStrategy(data="dynamic"), devices=1, **kwargs)
    try:
        t.fit(module(), make(linear_data(8)))
    except ValueError as error:
        return str(error)
    return "trained"


def _sampled(kind: Any, data: Any) -> Any:
    return DataLoader(data, 4, sampler=DistributedSampler(data, 1, 0) if kind is DistributedSampler else kind(data))


def _own_batches(data: Any) -> Any:
    return DataLoader(data, batch_sampler=_OwnBatches(SequentialSampler(data), 4, False))


def _plain_batches(data: Any) -> Any:
    return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, False))


def _combined(mode: str, data: Any) -> Any:
    return CombinedLoader([DataLoader(data, 4), DataLoader(data, 4)], mode)


def _stream(data: Any) -> Any:
    return DataLoader(Stream(8), 4)


def _plain(data: Any) -> Any:
    return DataLoader(data, 4)


def _own_iteration(data: Any) -> Any:
    return _OwnIteration(data, 4)


@pytest.mark.parametrize(
    ("make", "kwargs", "text"),
    [
        (_stream, {}, "Stream is an IterableDataset, which has no batches to draw by number; use a map-style Dataset"),
        (_own_batches, {}, "the loader's batch_sampler is a _OwnBatches of its own"),
        (_plain_batches, {}, "give the DataLoader batch_size and sampler instead"),
        (_own_iteration, {}, "_OwnIteration has an __iter__ of its own"),
        (partial(_combined, "min_size"), {}, "there are several training loaders, which cannot share one counter"),
        (partial(_combined, "sequential"), {}, "there are several training loaders"),
        (_NoLoader, {}, "the training loader is a _NoLoader; a torch DataLoader is needed"),
        (partial(_sampled, DistributedSampler), {}, "the loader's DistributedSampler has already dealt the data"),
        (partial(_sampled, _NoLength), {}, "the loader's _NoLength has no length; give it a __len__"),
        (_plain, {"val_check_interval": 0.5}, "Trainer(val_check_interval=0.5) validates within an epoch"),
        (_plain, {"val_check_interval": 1}, "Trainer(val_check_interval=1) validates within an epoch"),
        (_plain, {"val_check_interval": "00:00:00:05"}, "Trainer(val_check_interval='5 s') validates within an epoch"),
        (_plain, {"module": _TakesIterator}, "training_step(dataloader_iter) takes its batches itself"),
    ],
)
def test_what_cannot_be_served_is_refused(make, kwargs, text):
    [message] = run_replicas(partial(_refused, make=make, **kwargs), 1)
    assert message.startswith("EASGDStrategy(data='dynamic'): ")
    assert text in message
