"""Resume: a synchronous run goes on to the last bit as if it had never stopped, on every replica."""

from typing import Any

import pytest
import torch

from lightning_easgd import EASGD, EASGDStrategy
from tests import modules
from tests.helpers import run_replicas
from tests.modules import Regression, linear_data, trainer


class Hard(Regression):
    """Dropout, batch norm, a scheduler a step, and a choice of optimizers."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
        )

    def configure_optimizers(self) -> Any:
        if self.optimizer == "momentum":
            optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _State(modules.pytorch_lightning.Callback):
    """Keeps every tensor of this process at the end of training, and the data it saw."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())

    def on_train_end(self, trainer, pl_module):
        strategy = trainer.strategy
        self.center = {k: v.clone() for k, v in pl_module.state_dict().items()}
        with strategy.weights_of("replica"):
            self.replica = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.optimizer = [o.state_dict() for o in trainer.optimizers]
        self.schedulers = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        self.clock = strategy.couplings[0].algorithm.clock
        self.exchanges = strategy.couplings[0].center.traffic.exchanges
        self.rng = torch.get_rng_state()
        self.step = trainer.global_step


def _fit(folder: str, optimizer: str, accumulate: int, resume: str | None, num_replicas: int = 2, **options: Any):
    from pytorch_lightning.callbacks import ModelCheckpoint

    modules.pytorch_lightning.seed_everything(3)
    state = _State()
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    # The second one saves at the end of each epoch, after validation.
    epochs = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    t = trainer(
        strategy=EASGDStrategy(EASGD(period=4), **options),
        callbacks=[state, checkpoints, epochs],
        devices=num_replicas,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        max_epochs=3,
        gradient_clip_val=1.0,
    )
    loader = torch.utils.data.DataLoader(linear_data(80), batch_size=4, shuffle=True, num_workers=2)
    validation = torch.utils.data.DataLoader(linear_data(16), batch_size=4)
    t.fit(Hard(optimizer), loader, validation, ckpt_path=resume)
    return {key: value for key, value in vars(state).items() if key not in ("log", "log_dict")}


def _resume(replica: int, folder: str, optimizer: str, accumulate: int, stops: list[str]) -> Any:
    whole = _fit(folder, optimizer, accumulate, None)
    found = []
    for stop in stops:
        again = _fit(f"{folder}/resumed {stop}", optimizer, accumulate, f"{folder}/{stop}.ckpt")
        found.append(again)
    return whole, found


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a for d in _differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list):
        assert len(a) == len(b), path
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "stops"),
    [
        # 10 batches an epoch: in the middle of the second, at its end, in the middle of the last.
        ("momentum", 1, ["step=12", "epoch=1", "step=24"]),
        # 5 steps of 2 batches, or 4 of 3 with a last short window.
        ("adam", 2, ["step=6", "epoch=0", "step=12"]),
        ("adam", 3, ["step=3", "step=9"]),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped_to_the_last_bit(tmp_path, optimizer, accumulate, stops):
    for replica, (whole, found) in enumerate(run_replicas(_resume, 2, str(tmp_path), optimizer, accumulate, stops)):
        for stop, again in zip(stops, found, strict=True):
            expected = whole | {"batches": whole["batches"][-len(again["batches"]) :]}
            assert len(again["batches"]) < len(whole["batches"])
            assert _differences(expected, again, f"replica {replica} from {stop}: ") == []
