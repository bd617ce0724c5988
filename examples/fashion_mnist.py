"""Elastic averaging on Fashion-MNIST, with a LightningCLI.

    DATA=--data.folder=path/to/fashion-mnist
    python examples/fashion_mnist.py fit --trainer.strategy=easgd --trainer.accelerator=cpu --trainer.devices=2 $DATA

and with the strategy's and the algorithm's own arguments:

    python examples/fashion_mnist.py fit --trainer.accelerator=cpu --trainer.devices=2 $DATA \\
        --trainer.strategy.class_path=lightning_easgd.EASGDStrategy \\
        --trainer.strategy.init_args.algorithm.class_path=lightning_easgd.EASGD \\
        --trainer.strategy.init_args.algorithm.init_args.period=4

For Weights & Biases add ``--trainer.logger=WandbLogger --trainer.logger.offline=true``. At the end of ``fit`` the test
accuracy of the center is shown, and before it that of each replica. The folder holds the four idx files of
https://github.com/zalandoresearch/fashion-mnist (``data/fashion`` there).
"""

import gzip
import math
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_easgd import EASGDStrategy

SOURCE = "https://github.com/zalandoresearch/fashion-mnist"
FILES = {split: (f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz") for split in ("train", "t10k")}


def read_idx(path: Path) -> Tensor:
    """Returns the content of a gzipped idx file of unsigned bytes: uint8, in the shape that its header gives."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    ndim = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    if len(content) != 4 + 4 * ndim + math.prod(shape):
        raise ValueError(f"{path} is cut off: its header says {shape}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * ndim).view(shape)


class FashionMNIST(LightningDataModule):
    """60000 images to train on and 10000 to test on, 28 x 28 pixels, ten classes.

    Args:
        folder: holds the four idx files.
        batch_size: of each replica.
    """

    def __init__(self, folder: Path, batch_size: int = 64) -> None:
        super().__init__()
        self.folder, self.batch_size = Path(folder), batch_size
        missing = [name for names in FILES.values() for name in names if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"--data.folder={self.folder} lacks {', '.join(missing)}: get the four files from {SOURCE}, folder "
                "data/fashion"
            )

    def setup(self, stage: str) -> None:
        self.train_set, self.test_set = self._read("train"), self._read("t10k")

    def _read(self, split: str) -> TensorDataset:
        images, labels = (read_idx(self.folder / name) for name in FILES[split])
        return TensorDataset(images.unsqueeze(1), labels.long())

    # In an epoch Lightning gives each process its share of these.

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, 500)

    test_dataloader = val_dataloader


class Classifier(LightningModule):
    """A small convolutional network. It knows nothing of elastic averaging.

    Args:
        lr: the largest learning rate of the one-cycle schedule.
        width: channels of the first convolution; the second has twice as many.
    """

    def __init__(self, lr: float = 0.05, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * 7 * 7, 64), nn.ReLU()),
            nn.Linear(64, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images / 255 - 0.2860) / 0.3530)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test/accuracy", self.accuracy, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ReplicaAccuracies(Callback):
    """Prints the test accuracy of each replica when training has ended; does nothing with another strategy."""

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.strategy, EASGDStrategy):
            return
        pl_module.eval()
        with trainer.strategy.weights_of("replica"):
            test_set = trainer.datamodule.test_set  # the whole of it on each replica
            hits = [
                pl_module(images.to(pl_module.device)).argmax(1).cpu() == labels
                for images, labels in DataLoader(test_set, 500)
            ]
        pl_module.train()
        own = torch.cat(hits).float().mean().to(pl_module.device)
        self._print(trainer.strategy.all_gather(own).flatten().tolist())

    @staticmethod
    @rank_zero_only
    def _print(accuracies: list[float]) -> None:
        for replica, accuracy in enumerate(accuracies):
            print(f"\ntest accuracy of replica {replica}: {100 * accuracy:.2f} %", end="")
        print()


class CLI(LightningCLI):
    def after_fit(self) -> None:
        self.trainer.test(self.model, datamodule=self.datamodule)  # the module holds the center


if __name__ == "__main__":
    CLI(
        Classifier,
        FashionMNIST,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": ReplicaAccuracies(), "max_epochs": 3},
    )
