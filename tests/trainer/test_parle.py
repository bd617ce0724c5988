"""Parle and its relatives under a real Trainer: the force's place, the schedules, replicas and center, resume."""

from typing import Any

import pytest
import torch

from lightning_easgd import EASGD, EASGDStrategy, ElasticSGD, EntropySGD, MovingAverage, Parle
from tests import modules
from tests.callbacks import Everything, differences
from tests.helpers import run_replicas
from tests.modules import Hard, Regression, flat, linear_data, trainer


class _Outer(modules.pytorch_lightning.Callback):
    """After each round: the replica's outer point and the center; in every step: gradients before clipping."""

    def __init__(self) -> None:
        self.rounds: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.forces: list[torch.Tensor] = []

    def on_after_backward(self, trainer, pl_module):
        self.plain = [p.grad.clone() for p in pl_module.parameters()]
        self.at = flat(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        force = torch.cat([(p.grad - g).flatten() for p, g in zip(pl_module.parameters(), self.plain, strict=True)])
        self.forces.append((force, self.at))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        coupling = trainer.strategy.couplings[0]
        algorithm = coupling.algorithm
        if algorithm.clock % algorithm.period == 0:
            coupling.drain()  # what every replica does at the same step
            self.rounds.append((flat(pl_module), coupling.center.value.clone()))
        self.batches = algorithm.batches_per_epoch


def _parle(replica: int, algorithm: Any, **options: Any) -> Any:
    outer = _Outer()
    t = trainer(strategy=EASGDStrategy(algorithm), callbacks=[outer], max_epochs=2, gradient_clip_val=0.05, **options)
    data = torch.utils.data.DataLoader(linear_data(80), batch_size=4, shuffle=True)
    module = Regression()
    start = flat(module)
    t.fit(module, data)
    return {
        "rounds": outer.rounds,
        "forces": outer.forces,
        "batches": outer.batches,
        "start": start,
        "after": flat(module),
    }


@pytest.mark.parametrize("target", ["replicas", "averages"])
def test_after_every_round_the_center_is_the_mean_of_the_replicas(target):
    one, two = run_replicas(_parle, 2, Parle(period=5, elastic_target=target))
    assert len(one["rounds"]) == 4
    if target == "replicas":
        for (x, center), (y, same) in zip(one["rounds"], two["rounds"], strict=True):
            assert torch.equal(center, same)
            torch.testing.assert_close((x + y) / 2, center, rtol=0, atol=1e-6)
            assert not torch.equal(x, y)
    assert torch.equal(one["after"], two["after"])
    torch.testing.assert_close(one["after"], one["rounds"][-1][1], rtol=0, atol=0)
    assert (one["batches"], two["batches"]) == (10, 10)


def test_the_force_is_in_the_gradient_before_it_is_clipped():
    [result] = run_replicas(_one_parle, 1)
    anchor, scope = result["start"], 3.0
    for force, at in result["forces"][:5]:  # of the first round, around the weights that training began with
        torch.testing.assert_close(force, (at - anchor) / scope, rtol=1e-4, atol=1e-6)
    assert result["forces"][4][0].abs().max() > 1e-4


def _one_parle(replica: int) -> Any:
    return _parle(replica, Parle(period=5, scope=3.0, scoping=1.0), devices=1)


def _entropy(replica: int, algorithm: Any) -> Any:
    return _parle(replica, algorithm, devices=1)["after"]


def test_one_replica_without_coupling_is_entropy_sgd_to_the_last_bit():
    [parle] = run_replicas(_entropy, 1, Parle(period=5, coupling=float("inf")))
    [entropy] = run_replicas(_entropy, 1, EntropySGD(period=5))
    assert torch.equal(parle, entropy)


def _names(replica: int, name: str) -> Any:
    t = trainer(strategy=name, max_epochs=1)
    module = Regression()
    t.fit(module, torch.utils.data.DataLoader(linear_data(80), batch_size=4, shuffle=True))
    return t.strategy.layout.replica_size, flat(module), type(t.strategy.couplings).__name__


def test_entropy_sgd_is_one_replica_of_all_ranks():
    (size, first, _), (_, second, _) = run_replicas(_names, 2, "entropy_sgd")
    assert size == 2
    assert torch.equal(first, second)


def _fit(folder: str, strategy: Any, devices: int, resume: str | None) -> dict[str, Any]:
    from pytorch_lightning.callbacks import ModelCheckpoint

    modules.pytorch_lightning.seed_everything(3)
    state = Everything()
    t = trainer(
        strategy=strategy,
        callbacks=[state, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)],
        devices=devices,
        enable_checkpointing=True,
        max_epochs=3,
        gradient_clip_val=1.0,
    )
    data = torch.utils.data.DataLoader(linear_data(80), batch_size=4, shuffle=True)
    t.fit(Hard("momentum"), data, torch.utils.data.DataLoader(linear_data(16), batch_size=4), ckpt_path=resume)
    return state.kept()


def _resume(rank: int, folder: str, devices: int, strategies: list[Any]) -> Any:
    found = []
    for i, strategy in enumerate(strategies):
        whole = _fit(f"{folder}/{i}", strategy(), devices, None)
        # In an epoch's middle, and in its last step, before the evaluation that the resumed run leaves out.
        for step in (14, 10) if devices == 2 else (10,):
            again = _fit(f"{folder}/{i}/{step}", strategy(), devices, f"{folder}/{i}/step={step}.ckpt")
            found.append((strategy.__name__, whole, again))
    return found


def _parle_averages() -> Any:
    return EASGDStrategy(Parle(period=4, elastic_target="averages"), data="replicate")


def _parle_replicas() -> Any:
    return EASGDStrategy(Parle(period=4), data=0.7)


def _elastic() -> Any:
    return EASGDStrategy(ElasticSGD())


def _averaged() -> Any:
    return EASGDStrategy(EASGD(period=3), average=MovingAverage(0.1))


def _grouped() -> Any:
    return EASGDStrategy(Parle(period=4), replica_size=2)


@pytest.mark.parametrize(
    ("num_ranks", "strategies"), [(2, [_parle_replicas, _parle_averages, _elastic, _averaged]), (4, [_grouped])]
)
def test_a_resumed_run_equals_one_that_never_stopped_to_the_last_bit(tmp_path, num_ranks, strategies):
    for rank, found in enumerate(run_replicas(_resume, num_ranks, str(tmp_path), num_ranks, strategies)):
        for strategy, whole, again in found:
            expected = whole | {"batches": whole["batches"][-len(again["batches"]) :]}
            assert len(again["batches"]) < len(whole["batches"])
            assert differences(expected, again, f"rank {rank}, {strategy}: ") == []


class _Fused(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


def _with_scaler(replica: int, strategies: list[Any]) -> list[str]:
    from pytorch_lightning.plugins import MixedPrecision

    found = []
    for strategy in strategies:
        scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
        t = trainer(strategy=strategy, devices=1, max_steps=2, plugins=[scaled])
        try:
            t.fit(_Fused(), torch.utils.data.DataLoader(linear_data(16), batch_size=4))
        except ValueError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def test_a_force_on_gradients_that_the_optimizer_unscales_is_refused():
    """It would be divided by the scale, 65536 at first: gone without a word."""
    strategies = [EASGDStrategy(a) for a in (Parle(period=4), EntropySGD(period=4), ElasticSGD(), EASGD(period=2))]
    [found] = run_replicas(_with_scaler, 1, strategies)
    for message in found[:-1]:
        assert "SGD(fused=True): this algorithm's force joins the gradients before the optimizer's step" in message
        assert "use fused=False, or precision='bf16-mixed'" in message
    assert found[-1] == ""  # without a force it trains
