"""Replicas that each have the training set, or a part of it, for themselves: the sampler, and Lightning's loaders."""

import math
import random
import re
from collections import Counter
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_easgd.sampling import ReplicaSampler
from lightning_easgd.trainer.data.replicated import ReplicatedData
from tests import modules
from tests.helpers import run_replicas
from tests.modules import Regression, linear_data

FRACTIONS = (1 / 3, 0.5, 0.75)

# --- the sampler ---


def _members(sampler: Any, replica: int, num_replicas: int, replica_size: int = 1, **kwargs: Any) -> list[Any]:
    make = partial(ReplicaSampler, replica=replica, num_replicas=num_replicas, replica_size=replica_size, **kwargs)
    return [make(sampler, member=m) for m in range(replica_size)]


def _epoch(sampler: Any, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return indices


def _one(sampler: Any, replica: int = 0, num_replicas: int = 2, **kwargs: Any) -> Any:
    return _members(sampler, replica, num_replicas, **kwargs)[0]


def _interleaved(members: list[Any], epoch: int = 0) -> list[int]:
    """Returns a replica's epoch in the order in which its members have it, the padding at its end included."""
    return list(chain.from_iterable(zip(*(_epoch(member, epoch) for member in members), strict=True)))


@pytest.mark.parametrize("num_samples", [10, 11, 64])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("replica_size", [1, 2, 4])
@pytest.mark.parametrize("fraction", [None, *FRACTIONS])
def test_members_have_their_replicas_samples_once_up_to_the_padding(num_samples, num_replicas, replica_size, fraction):
    expected = num_samples if fraction is None else math.ceil(fraction * num_samples)
    each = math.ceil(expected / replica_size)
    for replica in range(num_replicas):
        members = _members(RandomSampler(range(num_samples)), replica, num_replicas, replica_size, fraction=fraction)
        assert [len(member) for member in members] == [each] * replica_size
        order = _interleaved(members)
        assert len(set(order)) == expected
        assert order[expected:] == order[: each * replica_size - expected]
        assert order[:expected] == _epoch(_one(members[0].sampler, replica, num_replicas, fraction=fraction))


@pytest.mark.parametrize("num_samples", [1, 10, 11, 64])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 12])
@pytest.mark.parametrize("fraction", [*FRACTIONS, 0.07])
def test_parts_are_fixed_and_overlap_evenly(num_samples, num_replicas, fraction):
    samplers = [
        _one(RandomSampler(range(num_samples)), replica, num_replicas, fraction=fraction, seed=5)
        for replica in range(num_replicas)
    ]
    parts = [set(_epoch(sampler)) for sampler in samplers]
    assert [set(_epoch(sampler, 3)) for sampler in samplers] == parts
    size = math.ceil(fraction * num_samples)
    assert [len(part) for part in parts] == [size] * num_replicas
    count = Counter(chain.from_iterable(parts))
    mean = num_replicas * size / num_samples
    assert {count[index] for index in range(num_samples)} <= {math.floor(mean), math.ceil(mean)}


def test_a_part_is_a_window_of_a_permutation_by_the_seed():
    def parts(seed: int) -> list[set[int]]:
        return [set(_epoch(_one(SequentialSampler(range(40)), r, 4, fraction=0.5, seed=seed))) for r in range(4)]

    first, second, third, fourth = parts(1)
    assert first | third == second | fourth == set(range(40))  # opposite windows
    assert [len(first & each) for each in (second, third, fourth)] == [10, 0, 10]
    assert parts(1) == [first, second, third, fourth]
    assert parts(2)[0] != first
    assert first not in (set(range(20)), set(range(20, 40)))  # no run of a set that is sorted by class


@pytest.mark.parametrize(
    ("fraction", "num_samples", "expected"), [(0.07, 100, 7), (0.7, 10, 7), (0.1, 30, 3), (1e-9, 10, 1), (0.5, 0, 0)]
)
def test_a_parts_size_is_that_of_the_fraction_as_it_is_written(fraction, num_samples, expected):
    assert len(_epoch(_one(SequentialSampler(range(num_samples)), fraction=fraction))) == expected


OWN_CHOICE = {
    "replacement": lambda: RandomSampler(range(20), replacement=True),
    "number": lambda: RandomSampler(range(20), num_samples=30),
    "weighted": lambda: WeightedRandomSampler([1.0, 2.0] * 10, 20),
    "subset": lambda: SubsetRandomSampler(range(5, 20)),
}
EACH_ONCE = {
    "random": lambda: RandomSampler(range(20)),
    "generator": lambda: RandomSampler(range(20), generator=torch.Generator().manual_seed(7)),
}


@pytest.mark.parametrize(
    ("kind", "fraction"), [*((kind, None) for kind in EACH_ONCE | OWN_CHOICE), *((kind, 0.5) for kind in EACH_ONCE)]
)
def test_the_order_is_one_of_seed_replica_and_epoch(kind, fraction):
    make = (EACH_ONCE | OWN_CHOICE)[kind]

    def orders(seed: int = 0) -> list[tuple[int, ...]]:
        samplers = [_one(make(), replica, 3, fraction=fraction, seed=seed) for replica in range(3)]
        return [tuple(_epoch(sampler, epoch)) for sampler in samplers for epoch in range(3)]

    first = orders()
    assert len(set(first)) == 9  # replica 1 in one epoch is not replica 0 in the next
    torch.rand(7)  # whatever else is random changes nothing, nor is it changed
    state = torch.random.get_rng_state()
    assert orders() == first
    assert torch.equal(torch.random.get_rng_state(), state)
    if kind == "generator":
        # Of a part, the seed still says which it is; the generator's seed has its place in the order alone.
        assert fraction is not None or orders(seed=1) == first
    else:
        assert not set(orders(seed=1)) & set(first)


@pytest.mark.parametrize("kind", OWN_CHOICE)
def test_a_part_of_what_a_sampler_chooses_itself_is_refused(kind):
    sampler = OWN_CHOICE[kind]()
    with pytest.raises(ValueError, match=f"data=0.5: the loader's {type(sampler).__name__} chooses samples itself"):
        _one(sampler, fraction=0.5)


def test_a_resumed_epoch_has_the_same_order():
    once = _one(RandomSampler(range(20)), 1, 3)
    for epoch in range(3):
        _epoch(once, epoch)
    assert _epoch(_one(RandomSampler(range(20)), 1, 3), 2) == _epoch(once, 2)


def test_without_shuffling_the_order_is_that_of_the_set():
    for replica in range(2):
        assert _epoch(_one(SequentialSampler(range(9)), replica), 1) == [*range(9)]
        part = _epoch(_one(SequentialSampler(range(9)), replica, fraction=0.5), 1)
        assert part == sorted(part)


def test_members_of_a_replica_draw_the_same_sequence():
    # With its weights, any two draws of this sampler would hardly agree.
    for replica in range(2):
        sampler = WeightedRandomSampler([1.0] * 100, 51)
        members = _members(sampler, replica, 2, 2)
        assert _interleaved(members)[:51] == _epoch(_one(sampler, replica, 2))


def test_the_samplers_own_epoch_is_set():
    class ByEpoch(Sampler):
        epoch = 0

        def __len__(self):
            return 6

        def __iter__(self):
            return iter([(i + self.epoch) % 6 for i in range(6)])

        def set_epoch(self, epoch):
            self.epoch = epoch

    assert _epoch(_one(ByEpoch()), 2) == [2, 3, 4, 5, 0, 1]


def test_a_sampler_that_is_shorter_than_it_says_is_refused():
    class Short(SequentialSampler):
        def __iter__(self):
            return iter(range(10))

    with pytest.raises(ValueError, match="Short has a length of 20 and yields 10 indices"):
        iter(_one(Short(range(20))))


def test_a_sampler_without_a_length_is_refused():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield random.randrange(10)

    with pytest.raises(ValueError, match="data='replicate': the loader's Endless has no length; give it a __len__"):
        _one(Endless())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_a_fraction_beyond_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"data={fraction}: a fraction of the training set must be in \(0, 1\)"):
        _one(SequentialSampler(range(4)), fraction=fraction)


# --- Lightning's loaders ---


class _Numbered(Dataset):
    """Samples that are their number."""

    def __init__(self, num_samples: int = 22) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> int:
        return index


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(10))


class _EveryOther(BatchSampler):
    """Batches of one sampler's order, each second one left out."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::2])

    def __len__(self) -> int:
        return -(-super().__len__() // 2)


def _trainer(
    data: Any, replica: int = 0, num_replicas: int = 2, member: int = 0, replica_size: int = 1, **kwargs: Any
) -> Any:
    """Returns a Trainer of one process, whose data are those of a member of a replica, as if there were others."""
    trainer = modules.trainer(strategy="auto", devices=1, **kwargs)
    ReplicatedData(
        trainer,
        replica=replica,
        num_replicas=num_replicas,
        member=member,
        replica_size=replica_size,
        fraction=None if data == "replicate" else data,
        seed=3,
        patch=setattr,
    )
    return trainer


def _prepared(data: Any, loader: Any, mode: str = "train", **kwargs: Any) -> Any:
    trainer = _trainer(data, **kwargs)
    return trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=mode)


def _seen(loader: Any) -> list[int]:
    return [int(index) for batch in loader for index in batch]


@pytest.mark.parametrize("data", ["replicate", 0.5])
def test_each_replica_has_a_loader_of_its_own_order(data):
    loader = DataLoader(_Numbered(), batch_size=4, shuffle=True)
    found = [_prepared(data, loader, replica=r) for r in range(2)]
    size = 22 if data == "replicate" else 11
    for each in found:
        assert len(each) == math.ceil(size / 4)
        assert [len(batch) for batch in each] == [4] * (size // 4) + [size % 4]
    first, second = map(_seen, found)
    assert first != second
    assert set(first) | set(second) == set(range(22))
    assert len(set(first)) == len(first) == size


def test_members_share_a_loader_out():
    loader = DataLoader(_Numbered(21), batch_size=4, shuffle=True)
    first, second = (_seen(_prepared("replicate", loader, member=m, replica_size=2, num_replicas=1)) for m in range(2))
    assert len(first) == len(second) == 11
    assert set(first) | set(second) == set(range(21))


def test_evaluation_remains_lightnings():
    loader = DataLoader(_Numbered(), batch_size=4)
    for mode in ("validate", "test", "sanity_check"):
        assert _prepared("replicate", loader, mode=mode) is loader


def test_a_loader_that_is_prepared_while_training_begins_with_its_epoch():
    trainer = _trainer("replicate")
    loader = DataLoader(_Numbered(), batch_size=4, shuffle=True)
    trainer.fit_loop.epoch_progress.current.processed = 2
    prepared = trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode="train")
    assert _seen(prepared) == _epoch(_one(loader.sampler, seed=3), 2)


def test_a_batch_sampler_has_its_own_samplers_order():
    loader = DataLoader(_Numbered(12), batch_sampler=_EveryOther(RandomSampler(range(12)), 2, False))
    prepared = _prepared("replicate", loader)
    order = _epoch(_one(RandomSampler(range(12)), seed=3))
    assert [batch.tolist() for batch in prepared] == [order[i : i + 2] for i in (0, 4, 8)]
    assert len(prepared) == 3


def test_a_loader_without_batches_keeps_yielding_samples():
    prepared = _prepared("replicate", DataLoader(_Numbered(), batch_size=None, shuffle=True))
    assert [*prepared] == _epoch(_one(RandomSampler(range(22)), seed=3))


def test_a_loader_that_was_prepared_before_is_not_dealt_out_twice():
    loader = DataLoader(_Numbered(), batch_size=4, shuffle=True)
    for data in ("replicate", 0.5):
        once = _prepared(data, loader, replica_size=2)
        again = _prepared(data, _prepared("replicate", loader, replica_size=2), replica_size=2)
        assert _seen(again) == _seen(once)


def test_a_plain_batch_sampler_is_refused():
    loader = DataLoader(_Numbered(), batch_sampler=BatchSampler(RandomSampler(range(22)), 4, False))
    with pytest.raises(ValueError, match=r"EASGDStrategy\(data='replicate'\): .*give the DataLoader batch_size and sa"):
        _prepared("replicate", loader)


def _dealt(**kwargs: Any) -> Any:
    return DataLoader(_Numbered(), sampler=DistributedSampler(_Numbered(), 2, 0), **kwargs)


def _dealt_in_batches() -> Any:
    return DataLoader(_Numbered(), batch_sampler=_EveryOther(DistributedSampler(_Numbered(), 2, 0), 4, False))


LEFT_ALONE = pytest.mark.parametrize(
    ("make", "kwargs", "reason"),
    [
        (lambda: [1, 2, 3], {}, "list is not a torch DataLoader, whose sampler could be replaced"),
        (lambda: DataLoader(_Stream()), {}, "_Stream is an IterableDataset, which has an order of its own"),
        (_dealt, {}, "the loader's DistributedSampler deals the data out to the processes itself"),
        (_dealt_in_batches, {}, "the loader's DistributedSampler deals the data out to the processes itself"),
        (
            lambda: DataLoader(_Numbered(), shuffle=True),
            {"use_distributed_sampler": False},
            "Trainer(use_distributed_sampler=False) says that no sampler be replaced",
        ),
    ],
    ids=["iterable", "stream", "distributed", "distributed batches", "switched off"],
)


@LEFT_ALONE
@pytest.mark.parametrize("replica_size", [1, 2])
def test_what_lightning_leaves_alone_stays_as_it_is_with_one_warning(make, kwargs, reason, replica_size):
    trainer = _trainer("replicate", replica_size=replica_size, **kwargs)
    prepare = trainer._data_connector._prepare_dataloader
    loader = make()
    with pytest.warns(UserWarning, match=re.escape(f"EASGDStrategy(data='replicate'): {reason}. The train")) as caught:
        assert prepare(loader, shuffle=True, mode="train") is loader
    [warning] = caught
    assert str(warning.message).endswith(" its 2 processes" if replica_size == 2 else " an order of its own")
    assert prepare(loader, shuffle=True, mode="train") is loader  # and no other warning, which would be an error
    alone = _trainer("replicate", num_replicas=1, **kwargs)
    assert alone._data_connector._prepare_dataloader(loader, shuffle=True, mode="train") is loader


@LEFT_ALONE
def test_what_lightning_leaves_alone_is_refused_for_a_part(make, kwargs, reason):
    with pytest.raises(ValueError, match=re.escape(f"EASGDStrategy(data=0.5): {reason}; a fixed part for each")):
        _prepared(0.5, make(), **kwargs)


@pytest.mark.parametrize("data", ["replicate", 0.5])
def test_a_loader_without_shuffling_is_shuffled_as_under_lightnings_sampler(data):
    loader = DataLoader(_Numbered(), batch_size=4)
    first, second = (_seen(_prepared(data, loader, replica=r)) for r in range(2))
    assert first != sorted(first)
    assert first != second


def test_overfitting_sees_the_first_batches_in_their_order():
    seen = _seen(_prepared("replicate", DataLoader(_Numbered(), batch_size=4), overfit_batches=2))
    assert seen == sorted(seen)


class _Seeing(Regression):
    """Keeps its samples' numbers by epoch and batch, and what its Trainer says of the training's length."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[Any]] = {}

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()

    def on_train_epoch_start(self) -> None:
        self.shown = self.trainer.progress_bar_callback.train_progress_bar.total

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        batches = batch if isinstance(batch, list) else [batch]  # of a CombinedLoader, or of one loader
        self.seen.setdefault(self.current_epoch, []).append([each.tolist() for each in batches])
        return super().training_step(linear_data(4)[:], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def _loader(num_samples: int) -> Any:
    return DataLoader(_Numbered(num_samples), batch_size=4, shuffle=True)


def _fit(data: Any, combined: bool, kwargs: Any) -> dict[str, Any]:
    trainer = _trainer(data, replica=1, max_epochs=2, enable_progress_bar=True, **kwargs)
    module = _Seeing()
    loader = CombinedLoader([_loader(24), _loader(48)], "min_size") if combined else _loader(22)
    trainer.fit(module, loader, DataLoader(_Numbered(6), batch_size=4))
    return {
        "seen": module.seen,
        "shown": module.shown,
        "estimated": module.estimated,
        "steps": trainer.global_step,
        "training": trainer.num_training_batches,
        "validation": trainer.num_val_batches,
    }


def _fits(_: int, cases: list[Any]) -> list[dict[str, Any]]:
    return [_fit(*case) for case in cases]


def test_lightning_counts_what_a_process_trains_on():
    cases: list[Any] = [
        ("replicate", {}, 6),
        ("replicate", {"replica_size": 2}, 3),
        (0.5, {}, 3),
        (0.5, {"replica_size": 2}, 2),
        (0.75, {"limit_train_batches": 0.5}, 2),
        ("replicate", {"limit_train_batches": 4}, 4),
    ]
    [results] = run_replicas(_fits, 1, [(data, False, kwargs) for data, kwargs, _ in cases])
    for (data, kwargs, batches), found in zip(cases, results, strict=True):
        first, second = found.pop("seen").values()
        assert len(first) == len(second) == batches, (data, kwargs)
        assert first != second
        total = 2 * batches
        expected = {"shown": batches, "training": batches, "estimated": total, "steps": total, "validation": [2]}
        assert found == expected, (data, kwargs)


def test_each_of_several_loaders_is_replicated():
    [results] = run_replicas(_fits, 1, [("replicate", True, {}), (0.5, True, {})])
    for fraction, batches, found in zip((None, 0.5), (6, 3), results, strict=True):
        for epoch, seen in found["seen"].items():
            assert len(seen) == batches
            for loader, own in zip((_loader(24), _loader(48)), zip(*seen, strict=True), strict=True):
                order = _epoch(_one(loader.sampler, 1, fraction=fraction, seed=3), epoch)
                assert [*chain(*own)] == order[: 4 * batches]
