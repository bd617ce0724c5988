"""Elastic averaging on scikit-learn's handwritten digits: two replicas on the CPU, nothing to download.

    python examples/digits.py                      # EASGD, then the same budget under DDP
    python examples/digits.py --strategy easgd_async
    python examples/digits.py --strategy diloco    # any of the registered names, with METHODS' hyper-parameters
    python examples/digits.py --devices 1 --no-baseline --wandb off

Prints the test accuracy of the center, of each replica and of DDP; writes the figures of the run, a plot of them and
a checkpoint, whose weights are the center's, to ``--out``.
"""

import argparse
import csv
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.utilities import rank_zero_only
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_easgd import (
    ADAG,
    ADMM,
    AGN,
    EASGD,
    LSGD,
    Asynchronous,
    Downpour,
    DynSGD,
    EASGDStrategy,
    EntropySGD,
    LocalSGD,
    MDownpour,
    Parle,
    StreamingDiLoCo,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


class Method(NamedTuple):
    """What a strategy's name is run with.

    Attributes:
        lr: the largest learning rate of the schedule. Methods whose center receives the replicas' *sum* take less.
        momentum: of the module's optimizer.
        nesterov: whether that is Nesterov's.
        strategy: in place of the name's preset, where the paper's period is too long for these few hundred steps.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    strategy: Callable[[], EASGDStrategy] | None = None


METHODS = {
    "eamsgd": Method(nesterov=True),
    "eamsgd_async": Method(nesterov=True),
    "downpour": Method(lr=0.05, strategy=lambda: EASGDStrategy(Downpour(period=4), Asynchronous())),
    "mdownpour": Method(lr=0.02, momentum=0.0, strategy=lambda: EASGDStrategy(MDownpour(momentum=0.9), Asynchronous())),
    "agn": Method(strategy=lambda: EASGDStrategy(AGN(period=4), Asynchronous())),
    "adag": Method(lr=0.05, strategy=lambda: EASGDStrategy(ADAG(period=4, scale=0.05), Asynchronous())),
    "dynsgd": Method(lr=0.05, strategy=lambda: EASGDStrategy(DynSGD(period=4), Asynchronous())),
    "ssp": Method(lr=0.05, strategy=lambda: EASGDStrategy(Downpour(period=4), Asynchronous(), slack=3)),
    "ssp_layerwise": Method(lr=0.05),
    "local_sgd": Method(strategy=lambda: EASGDStrategy(LocalSGD(period=10))),
    "bmuf": Method(strategy=lambda: EASGDStrategy(LocalSGD.bmuf(period=10))),
    "slowmo": Method(momentum=0.0, strategy=lambda: EASGDStrategy(LocalSGD.slowmo(period=5))),
    "diloco": Method(momentum=0.0, strategy=lambda: EASGDStrategy(LocalSGD.diloco(period=5))),
    "streaming_diloco": Method(momentum=0.5, strategy=lambda: EASGDStrategy(StreamingDiLoCo(period=8), fragments=4)),
    "lsgd": Method(strategy=lambda: EASGDStrategy(LSGD(period=4))),
    "admm": Method(strategy=lambda: EASGDStrategy(ADMM())),
    "parle": Method(strategy=lambda: EASGDStrategy(Parle(period=5))),
    "entropy_sgd": Method(strategy=lambda: EASGDStrategy(EntropySGD(period=5))),
}


class DigitClassifier(LightningModule):
    """A small convolutional network. It knows nothing of elastic averaging."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, nesterov: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU()),
            nn.Linear(64, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(shifted(images)), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        lr, momentum, nesterov = self.hparams.lr, self.hparams.momentum, self.hparams.nesterov
        optimizer = torch.optim.SGD(self.parameters(), lr, momentum, weight_decay=5e-4, nesterov=nesterov)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = {"total_steps": steps, "cycle_momentum": momentum > 0}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, **cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def shifted(images: Tensor) -> Tensor:
    """Returns ``images``, (n, 1, h, w), each moved by at most one pixel up or down and left or right."""
    n, _, height, width = images.shape
    top, left = torch.randint(3, (2, n, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, :, None]
    columns = (left + torch.arange(width, device=images.device))[:, None, :]
    image = torch.arange(n, device=images.device)[:, None, None]
    return F.pad(images, (1, 1, 1, 1))[image, 0, rows, columns].unsqueeze(1)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns 1347 images to train on and 450 to test on, always the same; pixels from 0 to 1."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=450, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y) for y in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


@torch.no_grad()
def accuracy_of(module: LightningModule, data: TensorDataset) -> float:
    """Returns the accuracy on the whole of ``data`` with the weights that the module holds now, in percent."""
    images, labels = (tensor.to(module.device) for tensor in data.tensors)
    was_training = module.training
    module.eval()
    hits = (module(images).argmax(1) == labels).double().mean()
    module.train(was_training)
    return 100 * hits.item()


class ReplicaAccuracies(Callback):
    """Notes the test accuracy of each replica when training has ended, as ``test/replica_<i>``."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with trainer.strategy.weights_of("replica"):
            own = torch.tensor(accuracy_of(pl_module, self.data), device=pl_module.device)
        for replica, accuracy in enumerate(trainer.strategy.all_gather(own).flatten()):
            trainer.callback_metrics[f"test/replica_{replica}"] = accuracy.cpu()


def train(
    args: argparse.Namespace,
    strategy: str | EASGDStrategy,
    data: tuple[TensorDataset, TensorDataset],
    loggers: list[Logger],
    callbacks: list[Callback],
) -> tuple[Trainer, DigitClassifier]:
    """Trains from the seed's initial weights; returns the Trainer and the module."""
    seed_everything(args.seed, workers=True, verbose=False)
    train_set, test_set = data
    method = METHODS.get(args.strategy, Method())
    module = DigitClassifier(method.lr, method.momentum, method.nesterov)
    trainer = Trainer(
        strategy=strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        max_epochs=args.epochs,
        logger=loggers,
        callbacks=callbacks,
        log_every_n_steps=5,
        check_val_every_n_epoch=5,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    # Lightning gives each process its share of both sets.
    trainer.fit(module, DataLoader(train_set, 32, shuffle=True, drop_last=True), DataLoader(test_set, 225))
    return trainer, module


def read_csv(path: Path, key: str) -> tuple[list[int], list[float]]:
    """Returns the steps and the values of one column of a CSVLogger's file."""
    with path.open() as file:
        rows = [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]
    return [step for step, _ in rows], [value for _, value in rows]


def plot(csv_path: Path, title: str, path: Path) -> None:
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    above.semilogy(*read_csv(csv_path, "train/loss"), linewidth=1)
    above.set(ylabel="train loss of replica 0", title=title)
    below.plot(*read_csv(csv_path, "easgd/consensus_distance"), label="mean distance of the replicas to the center")
    below.plot(*read_csv(csv_path, "easgd/force_norm"), label="norm of the elastic force")
    below.set(xlabel="optimizer steps")
    below.margins(y=0.3)  # room for the legend
    below.set_ylim(bottom=0)
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="easgd", help="any strategy of the Trainer (default: easgd)")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto (default: cpu)")
    parser.add_argument("--devices", type=int, default=2, help="how many replicas a host (default: 2)")
    parser.add_argument("--num-nodes", type=int, default=1, help="how many hosts, each of which runs this (default: 1)")
    parser.add_argument("--period", type=int, help="optimizer steps from one exchange to the next (default: EASGD's)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training set (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wandb", choices=("online", "offline", "off"), default="offline")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder for what the run leaves")
    parser.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train once more under ddp: same initial weights, epochs, batches, learning rate",
    )
    args = parser.parse_args()
    elastic = args.strategy in StrategyRegistry and issubclass(
        StrategyRegistry[args.strategy]["strategy"], EASGDStrategy
    )
    if args.period is not None and args.strategy != "easgd":
        parser.error("--period goes with --strategy easgd")
    strategy = args.strategy if args.period is None else EASGDStrategy(EASGD(period=args.period))
    make = METHODS.get(args.strategy, Method()).strategy
    if make is not None:
        strategy = make()

    logging.disable(logging.INFO)  # Lightning's
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # the data are in memory
    warnings.filterwarnings("ignore", "Loading `train_dataloader` to estimate")
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # a run replaces the one before
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "pytorch_lightning|lightning_fabric")
    data = digits()
    args.out.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = [CSVLogger(args.out, name="", version="")]
    if args.wandb != "off":
        loggers.append(WandbLogger(project="lightning_easgd", name="digits", offline=args.wandb == "offline"))
    callbacks: list[Callback] = [ReplicaAccuracies(data[1])] if elastic else []

    trainer, module = train(args, strategy, data, loggers, callbacks)
    accuracies = {"center" if elastic else args.strategy: accuracy_of(module, data[1])}
    for key, value in trainer.callback_metrics.items():
        if key.startswith("test/replica_"):
            accuracies[key.removeprefix("test/")] = value.item()
    trainer.save_checkpoint(args.out / "digits.ckpt")
    if elastic and args.baseline:
        *_, how = args.strategy.rpartition("_")
        ddp = f"ddp_{how}" if how in ("spawn", "fork", "notebook") else "ddp"
        _, module = train(args, ddp, data, [], [])
        accuracies[ddp] = accuracy_of(module, data[1])
    report(args, trainer, accuracies, elastic)


@rank_zero_only
def report(args: argparse.Namespace, trainer: Trainer, accuracies: dict[str, float], elastic: bool) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{name}": value for name, value in accuracies.items()}, step=trainer.global_step)
        logger.save()
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
    if elastic:
        title = f"{args.strategy}, {args.devices * args.num_nodes} replicas, seed {args.seed}"
        plot(args.out / "metrics.csv", title, args.out / "digits.png")
    print(f"\ntest accuracy after {args.epochs} epochs, seed {args.seed}")
    for name, value in accuracies.items():
        print(f"  {name:<10} {value:6.2f} %")
    print(f"in {args.out}: {', '.join(sorted(file.name for file in args.out.iterdir()))}")


if __name__ == "__main__":
    main()
