"""Every registered name under a real Trainer, and what the methods have in common there."""

from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import StrategyRegistry

from lightning_easgd import EAMSGD, Asynchronous, Downpour, EASGDStrategy, LocalSGD
from tests import modules
from tests.callbacks import Ends
from tests.helpers import run_replicas
from tests.modules import Regression, flat, loader, trainer

START_METHODS = ("_spawn", "_fork", "_notebook")
NAMES = sorted(
    name
    for name in StrategyRegistry
    if getattr(StrategyRegistry[name]["strategy"], "__module__", "") == "lightning_easgd"
    and not name.endswith(START_METHODS)
)


class Nesterov(Regression):
    """With the one optimizer that all methods take."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5, nesterov=True)


class _Family(Ends):
    """Keeps the weights at the start, and at the start of epoch 2, too."""

    def on_train_start(self, trainer, pl_module):
        with trainer.strategy.weights_of("center"):
            self.first_center = flat(pl_module)
        trainer.strategy.barrier()  # or another replica of an asynchronous center trains before this one has looked
        self.first = flat(pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.third_epoch = flat(pl_module)


@torch.no_grad()
def _loss(module: Regression) -> float:
    return float(torch.stack([module.loss(batch) for batch in loader(shuffle=False)]).mean())


def _fit(replica: int, strategy: Any, folder: str | None = None, resume: str | None = None) -> Any:
    from pytorch_lightning.callbacks import ModelCheckpoint

    modules.pytorch_lightning.seed_everything(2)
    # A momentum of 0.99 at the center makes each step a hundred.
    module, ends = Nesterov(1e-4 if strategy == "mdownpour" else 5e-3), _Family()
    callbacks: list[Any] = [ends]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1))
    t = trainer(strategy=strategy, callbacks=callbacks, max_epochs=4, enable_checkpointing=folder is not None)
    before = _loss(module)
    t.fit(module, loader(), ckpt_path=resume)
    return {**ends.kept(), "before": before, "after": _loss(module), "center": flat(module)}


def _fit_and_resume(replica: int, name: str, folder: str) -> Any:
    whole, path = _fit(replica, name, folder), f"{folder}/epoch=1.ckpt"
    saved = Nesterov(0.0)
    saved.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return whole, _fit(replica, name, f"{folder}/resumed", path), flat(saved)


def test_all_names_of_the_family_are_registered():
    family = (
        "adag admm agn bmuf diloco downpour dynsgd eamsgd eamsgd_async easgd easgd_async elastic_sgd entropy_sgd "
        "local_sgd lsgd mdownpour overlap_local_sgd parle slowmo ssp ssp_layerwise streaming_diloco"
    )
    assert family.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_trains_any_module_and_resumes(name, tmp_path):
    one, two = run_replicas(_fit_and_resume, 2, name, str(tmp_path))
    # 32 steps of each replica: what exchanges too rarely for that has its center where it began.
    period = {"diloco": 500, "bmuf": 50, "local_sgd": 50}.get(name, 1)  # of four fragments one is sent in time
    for mine, others in zip(one[:2], two[:2], strict=True):
        assert torch.equal(mine["center"], others["center"])
        before, after = mine["before"], mine["after"]
        assert after < before if period < 32 else after == before
    synchronous = getattr(StrategyRegistry[name]["init_params"]["transport"], "synchronous", True)
    for whole, resumed, saved in (one, two):
        # It goes on from the center that was saved, and each replica from where it was itself.
        assert torch.equal(resumed["first_center"], saved)
        assert torch.equal(resumed["first"], whole["third_epoch"])
        assert resumed["exchanges"] == whole["exchanges"]
        if synchronous:  # elsewhere the order of the exchanges is not repeated
            assert torch.equal(resumed["center"], whole["center"])
            assert torch.equal(resumed["replica"], whole["replica"])


def test_after_a_whole_period_of_local_sgd_the_center_is_the_mean():
    one, two = run_replicas(_fit, 2, EASGDStrategy(LocalSGD(period=4)))
    torch.testing.assert_close(one["center"], (one["replica"] + two["replica"]) / 2, rtol=1e-5, atol=1e-6)
    assert one["exchanges"] == [32 // 4]


def test_downpour_over_an_all_reduce_has_no_reason_to_be_refused():
    one, two = run_replicas(_fit, 2, EASGDStrategy(Downpour()))
    assert one["after"] < one["before"]
    assert torch.equal(one["center"], two["center"])


def test_a_method_that_steps_the_center_with_all_at_once_is_refused_over_an_asynchronous_one():
    with pytest.raises(ValueError, match=r"LocalSGD\(.*needs a synchronous transport, such as AllReduce\(\)"):
        EASGDStrategy(LocalSGD(), Asynchronous())


def _fit_plain_sgd(replica: int) -> None:
    trainer(strategy=EASGDStrategy(EAMSGD())).fit(Regression(), loader())


def test_eamsgd_refuses_another_optimizer_with_advice():
    with pytest.raises(AssertionError, match="ValueError: EAMSGD.*easgd"):
        run_replicas(_fit_plain_sgd, 2)
