"""Small LightningModules and Trainers for the tests, importable in every process."""

import logging
import warnings
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_easgd  # noqa: F401  (registers the names)

# What Lightning itself warns of in small CPU runs; the tests of this package's own warnings look for their text.
warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

NAMESPACES = {"pytorch_lightning": pytorch_lightning, "lightning.pytorch": lightning.pytorch}


def linear_data(num_samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_samples, 4, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]]) + 0.3 * torch.randn(num_samples, 1, generator=generator)
    return TensorDataset(x, y)


def make_regression(base: type) -> type:
    class Regression(base):  # type: ignore[misc]
        """A two-layer regression with everything logged that a user logs."""

        def __init__(self, lr: float = 0.05, momentum: float = 0.9) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.lr, self.momentum = lr, momentum
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            return torch.nn.functional.mse_loss(self.net(x), y)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch), sync_dist=True)

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    Regression.__qualname__ = Regression.__name__ = f"Regression_{base.__module__.partition('.')[0]}"
    return Regression


Regression = make_regression(pytorch_lightning.LightningModule)
REGRESSIONS = {
    "pytorch_lightning": Regression,
    "lightning.pytorch": make_regression(lightning.pytorch.LightningModule),
}
for _regression in REGRESSIONS.values():
    globals()[_regression.__name__] = _regression


class BatchNormRegression(Regression):
    """With batch-norm statistics, their integer counter, and a constant with infinities."""

    def __init__(self) -> None:
        super().__init__(lr=0.002)  # with batches of four a larger one diverges within a hundred steps
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.register_buffer("mask", torch.tensor([0.1, float("-inf"), 3.0]))


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
            length = self.trainer.estimated_stepping_batches  # which sets up the data before anything else does
        else:
            optimizer, length = torch.optim.AdamW(self.parameters(), lr=0.01), 60
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Stream(IterableDataset):
    """Samples of ``linear_data`` in their order, over and over; a number of them for each rank, or one for all."""

    def __init__(self, *num_samples: int) -> None:
        self.num_samples = num_samples

    def __iter__(self) -> Any:
        rank = dist.get_rank() if dist.is_initialized() else 0
        data, number = linear_data(), self.num_samples[rank if len(self.num_samples) > 1 else 0]
        return (data[i % len(data)] for i in range(number))


def loader(num_samples: int = 64, batch_size: int = 4, shuffle: bool = True) -> DataLoader:
    return DataLoader(linear_data(num_samples), batch_size=batch_size, shuffle=shuffle)


def trainer(namespace: str = "pytorch_lightning", **kwargs: Any) -> Any:
    """Returns a quiet Trainer; any argument can be overridden."""
    defaults: dict[str, Any] = {
        "strategy": "easgd",
        "accelerator": "cpu",
        "devices": 2,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return NAMESPACES[namespace].Trainer(**{**defaults, **kwargs})


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()
