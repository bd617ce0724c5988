"""Exchanges in fragments: the schedule, the arithmetic of each, and what goes on as it does without."""

import warnings
from typing import Any

import pytest
import torch

from lightning_easgd import (
    ADMM,
    EAMSGD,
    EASGD,
    LSGD,
    AllReduce,
    Asynchronous,
    Downpour,
    EASGDStrategy,
    LocalSGD,
    Parle,
    PolyakAverage,
)
from lightning_easgd.core.fragments import by_fragment, first_clock
from tests import modules
from tests.callbacks import Recorder
from tests.helpers import run_replicas
from tests.modules import BatchNormRegression, Regression, flat, loader, trainer

PERIOD, RATE, STEPS = 5, 0.3, 32


# --- which parameters, and when ---


def test_fragments_are_about_equally_large():
    module = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(6)))
    fragments = by_fragment(module, dict(module.named_parameters()), 3)
    assert {sum(p.numel() for p in fragment.values()) for fragment in fragments} == {2 * (20 * 20 + 20)}
    assert sorted(name for fragment in fragments for name in fragment) == sorted(dict(module.named_parameters()))


def test_a_parameters_fragment_does_not_depend_on_the_others_that_are_trained():
    module = torch.nn.Sequential(*(torch.nn.Linear(3, size) for size in (9, 2, 30, 7)))
    every = by_fragment(module, dict(module.named_parameters()), 3)
    some = {n: p for n, p in module.named_parameters() if n.startswith(("0", "3"))}
    for all_of, some_of in zip(every, by_fragment(module, some, 3), strict=True):
        assert list(some_of) == [name for name in all_of if name in some]


def test_no_parameter_is_cut():
    module = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"fragments=3\): the module has 2 parameter tensors.*at most fragments=2"):
        by_fragment(module, dict(module.named_parameters()), 3)


@pytest.mark.parametrize(("number", "period"), [(1, 1), (1, 10), (3, 10), (10, 10), (4, 6), (7, 500)])
def test_exchanges_are_spread_evenly_over_the_period(number, period):
    for algorithm, first in ((LocalSGD(period), 0), (EASGD(period), period - 1)):
        clocks = [first_clock(k, number, algorithm) for k in range(number)]
        due_at = [next(t for t in range(period) if (clock + t) % period == 0) for clock in clocks]
        assert due_at == [(first + k * period // number) % period for k in range(number)]
        assert len(set(due_at)) == number


# --- under a Trainer ---


class _Recorder(Recorder):
    """Keeps how often each fragment had exchanged after every batch, too, and what it has sent."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanged: list[list[int]] = []

    def on_train_batch_end(self, trainer, *_):
        couplings = getattr(trainer.strategy, "couplings", [])
        self.exchanged.append([c.center.traffic.exchanges for c in couplings])

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        couplings = getattr(trainer.strategy, "couplings", [])
        self.bytes = [c.center.traffic.bytes_sent for c in couplings]


def _fit(replica: int, strategy: EASGDStrategy, module: type = Regression, **options: Any) -> dict[str, Any]:
    modules.pytorch_lightning.seed_everything(3)
    model, recorder = module(), _Recorder()
    callbacks = [recorder, *options.pop("callbacks", [])]
    ckpt_path = options.pop("ckpt_path", None)
    t = trainer(strategy=strategy, callbacks=callbacks, **{"max_epochs": 4, **options})
    t.fit(model, loader(), ckpt_path=ckpt_path)
    return {**recorder.kept(), "after": flat(model)}


def _fit_fragments(replica: int) -> Any:
    return _fit(replica, EASGDStrategy(EASGD(period=PERIOD, moving_rate=RATE), fragments=2))


def test_each_fragment_is_the_dense_recurrence_at_steps_of_its_own():
    results = run_replicas(_fit_fragments, 2)
    replicas = [Regression() for _ in results]
    optimizers = [torch.optim.SGD(r.parameters(), lr=r.lr, momentum=r.momentum) for r in replicas]
    center = [p.detach().clone() for p in replicas[0].parameters()]
    names = [name for name, _ in replicas[0].named_parameters()]
    fragment_of = {name: k for k, fragment in enumerate(results[0]["names"]) for name in fragment}
    assert results[0]["steps"] == results[1]["steps"] == STEPS
    counts, expected = [0, 0], []
    for step in range(STEPS):
        due = [k for k in range(2) if (step - (PERIOD - 1) - k * PERIOD // 2) % PERIOD == 0]
        forces = [[RATE * (p.detach() - c) for p, c in zip(r.parameters(), center, strict=True)] for r in replicas]
        for r, optimizer, result in zip(replicas, optimizers, results, strict=True):
            optimizer.zero_grad()
            r.loss(result["batches"][step]).backward()
            optimizer.step()
        for i, name in enumerate(names):
            if fragment_of[name] in due:
                for r, force in zip(replicas, forces, strict=True):
                    dict(r.named_parameters())[name].data.sub_(force[i])
                center[i] += forces[0][i] + forces[1][i]
        for k in due:
            counts[k] += 1
        expected.append(list(counts))
    for result, r in zip(results, replicas, strict=True):
        assert result["exchanged"] == expected
        torch.testing.assert_close(result["replica"], flat(r), atol=1e-5, rtol=0)
        torch.testing.assert_close(result["center"], torch.cat([c.flatten() for c in center]), atol=1e-5, rtol=0)
        assert torch.equal(result["center"], results[0]["center"])
        assert torch.equal(result["after"], result["center"])


def _fit_and_look(replica: int) -> Any:
    return [
        _fit(replica, EASGDStrategy(EASGD(PERIOD), fragments=3), **options)
        for options in ({}, {"val_check_interval": 3, "limit_val_batches": 1})
    ]


def test_an_evaluation_meets_in_all_fragments_and_changes_nothing():
    for plain, looked_at in run_replicas(_fit_and_look, 2):
        assert torch.equal(plain["replica"], looked_at["replica"])
        assert torch.equal(plain["center"], looked_at["center"])


def _fit_alone(replica: int) -> Any:
    return [_fit(replica, strategy, devices=1) for strategy in (EASGDStrategy(LocalSGD(PERIOD), fragments=3), "ddp")]


def test_one_replica_that_averages_itself_is_the_optimizer_alone():
    [(averaged, alone)] = run_replicas(_fit_alone, 1)
    torch.testing.assert_close(averaged["replica"], alone["after"], rtol=0, atol=1e-4)


class _Keep(modules.pytorch_lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 11 and "keep" in trainer.default_root_dir:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/kept.ckpt")


STRATEGIES = {
    "EASGD": lambda: EASGDStrategy(EASGD(PERIOD), fragments=2),
    "int8": lambda: EASGDStrategy(EASGD(PERIOD), AllReduce(wire="int8"), fragments=3, average=PolyakAverage()),
    "outer momentum": lambda: EASGDStrategy(LocalSGD(PERIOD, 0.5, 0.5), fragments=4),
}


def _fit_and_resume(replica: int, folder: str) -> Any:
    found = {}
    for name, make in STRATEGIES.items():
        root = f"{folder}/keep-{name}"
        whole = _fit(replica, make(), BatchNormRegression, callbacks=[_Keep()], default_root_dir=root)
        kept = f"{root}/kept.ckpt"
        resumed = _fit(replica, make(), BatchNormRegression, default_root_dir=folder, ckpt_path=kept)
        found[name] = whole, resumed
    return found


def test_a_run_is_resumed_to_the_last_bit(tmp_path):
    for found in run_replicas(_fit_and_resume, 2, str(tmp_path)):
        for name, (whole, resumed) in found.items():
            assert len(resumed["batches"]) == len(whole["batches"]) - 11, name
            for key in ("replica", "center"):
                assert torch.equal(resumed[key], whole[key]), (name, key)


def _resume_in_other_fragments(replica: int, folder: str) -> Any:
    root = f"{folder}/keep"
    whole = _fit(replica, EASGDStrategy(EASGD(PERIOD), fragments=2), callbacks=[_Keep()], default_root_dir=root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(
            replica, EASGDStrategy(EASGD(PERIOD)), default_root_dir=folder, ckpt_path=f"{root}/kept.ckpt", max_epochs=3
        )
    return len(whole["names"]), [str(w.message) for w in caught]


def test_a_run_in_other_fragments_goes_on_from_the_center(tmp_path):
    (number, said), _ = run_replicas(_resume_in_other_fragments, 2, str(tmp_path))
    assert number == 2
    assert any("resumes 2 replicas from the center" in text and "in 2 fragments" in text for text in said)


class _Poison(modules.pytorch_lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 6:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.fill_(float("nan"))


def _poisoned(replica: int, algorithm: Any) -> Any:
    strategy = EASGDStrategy(algorithm, fragments=3, on_nonfinite="reset")
    return _fit(replica, strategy, callbacks=[_Poison()])


@pytest.mark.parametrize("algorithm", [EASGD(PERIOD), LocalSGD(PERIOD)], ids=repr)
def test_a_replica_that_is_not_finite_starts_from_the_center_with_all_its_fragments(algorithm):
    results = run_replicas(_poisoned, 2, algorithm)
    for result in results:
        assert torch.isfinite(result["replica"]).all()
        assert torch.isfinite(result["center"]).all()
        assert torch.equal(result["center"], results[0]["center"])
        assert result["steps"] == STEPS


def _fit_apart(replica: int, algorithm: Any) -> Any:
    return _fit(replica, EASGDStrategy(algorithm, Asynchronous(), fragments=2))


@pytest.mark.parametrize("algorithm", [EASGD(4), Downpour(4)], ids=repr)
def test_fragments_over_an_asynchronous_center(algorithm):
    results = run_replicas(_fit_apart, 2, algorithm)
    for result in results:
        assert result["exchanged"][-1] == [STEPS // 4, STEPS // 4]
        assert torch.equal(result["center"], results[0]["center"])
    start = flat(Regression())
    assert float((results[0]["center"] - start).norm()) > 0.1


class Nesterov(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5, nesterov=True)


def _nesterov_in_fragments(replica: int) -> Any:
    return _fit(replica, EASGDStrategy(EAMSGD(PERIOD), fragments=2), Nesterov)


def test_the_velocity_is_that_of_the_fragment():
    results = run_replicas(_nesterov_in_fragments, 2)
    assert torch.equal(results[0]["center"], results[1]["center"])
    assert torch.isfinite(results[0]["center"]).all()


class _Thaw(modules.pytorch_lightning.Callback):
    """Freezes the first layer, and thaws it as the third epoch begins."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            pl_module.net[0].requires_grad_(True)


def _fit_thawing(replica: int) -> Any:
    return _fit(replica, EASGDStrategy(EASGD(PERIOD), fragments=3), callbacks=[_Thaw()])


def test_a_fragment_may_be_empty_until_its_parameters_are_thawed():
    results = run_replicas(_fit_thawing, 2)
    start = dict(Regression().named_parameters())
    for result in results:
        assert sorted(name for names in result["names"] for name in names) == sorted(start)
        assert torch.equal(result["center"], results[0]["center"])
    assert not torch.equal(results[0]["replica"], results[1]["replica"])
    assert not torch.equal(results[0]["center"][:32], start["net.0.weight"].detach().flatten())


def _fit_pairs(replica: int) -> Any:
    strategy = EASGDStrategy(EASGD(PERIOD), fragments=2, replica_size=2)
    return _fit(replica, strategy, devices=4)


def test_replicas_of_two_ranks_exchange_in_fragments():
    results = run_replicas(_fit_pairs, 4)
    for rank, result in enumerate(results):
        assert torch.equal(result["center"], results[0]["center"])
        assert torch.equal(result["replica"], results[rank // 2 * 2]["replica"])
    assert not torch.equal(results[0]["replica"], results[2]["replica"])


def _lopsided(replica: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(replica, EASGDStrategy(fragments=4), max_epochs=2, devices=1)
    return [str(w.message) for w in caught]


def test_a_fragment_much_larger_than_the_others_is_warned_of():
    [said] = run_replicas(_lopsided, 1)
    assert sum("fragments=4): the largest one has 32 of 49 parameters" in text for text in said) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EASGDStrategy(fragments=0), r"fragments=0\): must be a number of fragments >= 1"),
        (lambda: EASGDStrategy(fragments=True), r"fragments=True\): must be"),
        (lambda: EASGDStrategy(EASGD(3), fragments=4), r"at most fragments=3"),
        (lambda: EASGDStrategy(Parle(), fragments=2), r"Parle\(.*one of all parameters"),
        (lambda: EASGDStrategy(LSGD(), fragments=2), r"LSGD\(.*one of all parameters"),
        (lambda: EASGDStrategy(ADMM(), fragments=2), r"ADMM\(.*one of all parameters"),
        (lambda: EASGDStrategy(EASGD(early_exchange=True), fragments=2), r"early_exchange=True.*one of all parameters"),
        (lambda: EASGDStrategy(Downpour(4), Asynchronous(), slack=1, fragments=2), r"slack=1, fragments=2"),
        (
            lambda: EASGDStrategy(Downpour(1), Asynchronous(), layerwise=True, fragments=2),
            r"every layer has an exchange of its own",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
