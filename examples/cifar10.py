"""Parle, Elastic-SGD, Entropy-SGD, EASGD and DDP on CIFAR-10, 93 images restored from JPEG.

    python examples/cifar10.py --data path/to/cifar10                    # the fast preset: minutes on 2 CPU cores
    python examples/cifar10.py --data path/to/cifar10 --seeds 0 1 2
    python examples/cifar10.py --data path/to/cifar10 --methods parle ddp --data-split 0.5
    python examples/cifar10.py --data path/to/cifar10 --preset paper --accelerator gpu --devices 6 --replica-size 2

All methods start from the same initial weights, with the same network, batches a process, learning rate and schedule.
They are compared at an equal number of samples, counted over all processes, and at an equal time of training, without
evaluation. Prints a table of the center's accuracy; writes it, every evaluation and a plot of them to ``--out``.

The setting is Parle's (arXiv:1707.00424): All-CNN (arXiv:1412.6806) with batch normalization, flips and crops, SGD with
Nesterov momentum, a learning rate that falls in steps, and each replica on the whole set. The fast preset scales it
down: a sixth of the channels, the first convolution with stride 2, 3 epochs in place of hundreds, no dropout, and a
period of 10 in place of 25, because Parle's center moves only once a period. What is particular to a method has the
algorithm's default, but for the outer learning rate, which is the learning rate; in so short a run the paper's scoping
hardly begins. Width and stride were chosen for plain SGD on one process, seed 0, by accuracy on the last 5000 training
images (``--score held-out``), which are never trained on; the epochs by the time they take. Nothing was chosen for any
other method, or on test images.

The folder holds ``data_batch_1.npz`` ... ``data_batch_5.npz`` and ``test_batch.npz``, each with labels ``y``, (10000,),
and pixels ``d``, (10000, 3, 32, 32), as a difference code that ``read_batch`` undoes; all uint8.
"""

import argparse
import csv
import logging
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_easgd import EASGD, Algorithm, EASGDStrategy, ElasticMonitor, ElasticSGD, EntropySGD, Parle

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DATA = "CIFAR-10, 93 images restored from JPEG"
FILES = [*(f"data_batch_{i}.npz" for i in range(1, 6)), "test_batch.npz"]
METHODS = ("parle", "elastic_sgd", "entropy_sgd", "easgd", "ddp")
PRESETS = {
    "fast": {"width": 16, "stem_stride": 2, "dropout": 0.0, "epochs": 3, "batch_size": 64, "period": 10},
    "paper": {"width": 96, "stem_stride": 1, "dropout": 0.5, "epochs": 200, "batch_size": 128, "period": 25},
}


class AllCNN(LightningModule):
    """All-CNN-C with batch normalization. It knows nothing of elastic averaging.

    Args:
        width: channels of the first three convolutions; the others have twice as many. The paper's is 96.
        stem_stride: of the first convolution; the paper's is 1, and 2 takes a quarter of the time.
        dropout: after each convolution with stride, in training.
        lr: the learning rate before the first of its steps, each of which divides it by 5.
    """

    def __init__(self, width: int = 96, stem_stride: int = 1, dropout: float = 0.5, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        wide = 2 * width
        self.net = nn.Sequential(
            *(*convolution(3, width, stem_stride), *convolution(width, width), *convolution(width, width, stride=2)),
            nn.Dropout(dropout),
            *(*convolution(width, wide), *convolution(wide, wide), *convolution(wide, wide, stride=2)),
            nn.Dropout(dropout),
            *(*convolution(wide, wide), *convolution(wide, wide, kernel=1)),
            *(nn.Conv2d(wide, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        # In (n, h, w, c) order, which is the faster one on a CPU too.
        images = images.float().contiguous(memory_format=torch.channels_last)
        return self.net((images / 255 - 0.4733) / 0.2516)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(augmented(images)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, 0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        milestones = [int(fraction * steps) for fraction in (0.5, 0.8)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def convolution(channels_in: int, channels: int, stride: int = 1, kernel: int = 3) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(channels), nn.ReLU()


def augmented(images: Tensor) -> Tensor:
    """Returns ``images``, (n, c, h, w), each moved by at most 4 pixels a side, and half of them mirrored."""
    n, _, height, width = images.shape
    top, left = torch.randint(9, (2, n, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, :, None]
    columns = left + torch.arange(width, device=images.device)
    mirrored = torch.rand(n, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)[:, None, :]
    image = torch.arange(n, device=images.device)[:, None, None]
    return F.pad(images, (4, 4, 4, 4))[image, :, rows, columns].permute(0, 3, 1, 2)


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Returns images, (10000, 3, 32, 32) uint8 in red, green, blue, and labels, (10000,) int64."""
    with np.load(path) as file:
        code, labels = file["d"], file["y"]
    if code.shape != (10000, 3, 32, 32) or labels.shape != (10000,) or not code.dtype == labels.dtype == np.uint8:
        raise ValueError(f"{path} has d {code.dtype} {code.shape} and y {labels.dtype} {labels.shape}: not such a file")
    pixels = code.cumsum(-1, dtype=np.uint8)  # differences along each row, of red - green, green, blue - green
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return torch.from_numpy(pixels), torch.from_numpy(labels).long()


def cifar10(folder: Path, score: str) -> tuple[TensorDataset, TensorDataset]:
    """Returns 45000 images to train on, and 10000 test images or 5000 held-out training images to score on."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"--data={folder} lacks {', '.join(missing)}: the module docstring says what they hold")
    *train, test = (read_batch(folder / name) for name in FILES)
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    held_out = images[45000:], labels[45000:]
    return TensorDataset(images[:45000], labels[:45000]), TensorDataset(*(test if score == "test" else held_out))


class Note(NamedTuple):
    seconds: float  # of training until this evaluation
    samples: int  # of all processes until then
    accuracy: float  # in percent


class Clock(Callback):
    """Takes a note at each evaluation. Evaluations are not in its time; waiting for the slowest process before is."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.notes: list[Note] = []
        self._seconds = self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        self._seconds += time.perf_counter() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        samples = trainer.global_step * trainer.world_size * self.batch_size
        self.notes.append(Note(self._seconds, samples, 100 * trainer.callback_metrics["accuracy"].item()))
        for logger in trainer.loggers:
            logger.log_metrics({"seconds": self._seconds, "samples": samples}, trainer.global_step)
        self._since = time.perf_counter()


def strategy_of(method: str, args: argparse.Namespace) -> str | EASGDStrategy:
    outer = {"period": args.period, "outer_lr": args.lr, "scope": args.scope, "scoping": args.scoping}
    match method:
        case "ddp":
            return "ddp"
        case "entropy_sgd":
            return EASGDStrategy(EntropySGD(**outer), replica_size=args.devices)  # one replica, on the whole set
        case "parle":
            algorithm: Algorithm = Parle(**outer, coupling=args.coupling)
        case "elastic_sgd":
            algorithm = ElasticSGD(coupling=args.coupling, scoping=args.scoping)
        case "easgd":
            algorithm = EASGD(period=args.period, center_rate=0.9)  # both rates as in the paper
    return EASGDStrategy(algorithm, replica_size=args.replica_size, data=args.data_split)


def train(method: str, seed: int, group: str, args: argparse.Namespace, data: tuple[TensorDataset, ...]) -> list[Note]:
    """Trains from the seed's initial weights; returns the notes of all evaluations."""
    seed_everything(seed, workers=True, verbose=False)
    module = AllCNN(args.width, args.stem_stride, args.dropout, args.lr)
    strategy, clock = strategy_of(method, args), Clock(args.batch_size)
    loggers, callbacks = [], [clock]
    if args.wandb != "off":
        config = {"method": method, "seed": seed, "data": DATA, "settings": vars(args)}
        to_wandb = {"project": "lightning_easgd", "group": group, "config": config, "settings": {"silent": True}}
        loggers.append(WandbLogger(f"{method}-{seed}", offline=args.wandb == "offline", **to_wandb))
        if method != "ddp":
            callbacks.append(ElasticMonitor(every_n_exchanges=max(1, 50 // strategy.algorithm.period)))
    # Evaluations stand at ends of periods, where Parle's center has all that its replicas did.
    periods = args.epochs * len(data[0]) // (args.devices * args.batch_size * args.evaluations * args.period)
    interval = max(1, periods) * args.period
    trainer = Trainer(
        strategy=strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        max_steps=args.evaluations * interval,
        val_check_interval=interval,
        check_val_every_n_epoch=None,
        logger=loggers,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    # Lightning, or the strategy, gives each process its share.
    trainer.fit(module, DataLoader(data[0], args.batch_size, shuffle=True, drop_last=True), DataLoader(data[1], 250))
    for logger in loggers:
        logger.experiment.finish()
    if trainer.is_global_zero:
        print(f"{method}, seed {seed}: {clock.notes[-1]}", flush=True)
    return clock.notes


Results = dict[str, list[list[Note]]]  # by method: the notes of each seed


def accuracy_within(seconds: float, notes: list[Note]) -> float:
    """Returns the accuracy of the last evaluation until then; nan before the first."""
    return next((note.accuracy for note in reversed(notes) if note.seconds <= seconds), math.nan)


def spread(values: list[float], digits: int, unit: str) -> str:
    mean = f"{np.mean(values):.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(results: Results) -> str:
    """Returns the comparison in Markdown: the mean over the seeds and, of several, the least and the greatest."""
    samples = next(iter(results.values()))[0][-1].samples
    # The time of each seed's comparison is when its first method is through.
    ends = [min(notes[-1].seconds for notes in runs) for runs in zip(*results.values(), strict=True)]
    at = f"after {spread(ends, 0, ' s')}"
    lines = [f"| method | accuracy after {samples} samples | accuracy {at} | samples/s |", "|---|---|---|---|"]
    for method, runs in results.items():
        final = spread([notes[-1].accuracy for notes in runs], 2, " %")
        in_time = spread([accuracy_within(end, notes) for end, notes in zip(ends, runs, strict=True)], 2, " %")
        speed = spread([notes[-1].samples / notes[-1].seconds for notes in runs], 0, "")
        lines.append(f"| `{method}` | {final} | {in_time} | {speed} |")
    return "\n".join(lines)


def plot(results: Results, title: str, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(10, 4.5), layout="constrained")
    for panel, key in zip(panels, ("samples", "seconds"), strict=True):
        for color, (method, runs) in enumerate(results.items()):
            for i, notes in enumerate(runs):
                x, y = [getattr(note, key) for note in notes], [note.accuracy for note in notes]
                panel.plot(x, y, f"C{color}.-", linewidth=1, label=None if i else method)
        panel.set(xlabel=f"{key} of training")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy of the center, %")
    panels[0].legend()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


@rank_zero_only
def report(results: Results, args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    title = f"{DATA}; scored on {args.score}; {args.devices} processes; seed {', '.join(map(str, args.seeds))}"
    text = table(results)
    (args.out / "table.md").write_text(f"{title}\n\n{text}\n")
    rows = [
        (m, seed, *n) for m, runs in results.items() for seed, run in zip(args.seeds, runs, strict=True) for n in run
    ]
    with (args.out / "evaluations.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("method", "seed", *Note._fields), *rows])
    plot(results, title, args.out / "cifar10.png")
    print(f"\n{title}\n\n{text}\n\nin {args.out}: table.md, evaluations.csv, cifar10.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the six npz files")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all five")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto (default: cpu)")
    parser.add_argument("--devices", type=int, default=2, help="how many processes (default: 2)")
    parser.add_argument("--replica-size", type=int, default=1, help="how many of them a replica has (default: 1)")
    parser.add_argument(
        "--data-split",
        type=lambda text: text if text in ("shard", "replicate") else float(text),
        default="replicate",
        help="what a replica trains on: shard, replicate or a fraction, as the strategy's data (default: replicate)",
    )
    parser.add_argument("--lr", type=float, default=0.1, help="of all optimizers (default: 0.1)")
    parser.add_argument("--scope", type=float, default=100.0, help="gamma of parle and entropy_sgd (default: 100)")
    parser.add_argument("--coupling", type=float, default=1.0, help="rho of parle and elastic_sgd (default: 1)")
    parser.add_argument("--scoping", type=float, help="factor of both at each outer step (default: the algorithms')")
    parser.add_argument("--score", choices=("test", "held-out"), default="test", help="on which images (default: test)")
    parser.add_argument("--evaluations", type=int, default=10, help="how many in a run (default: 10)")
    parser.add_argument("--wandb", choices=("online", "offline", "off"), default="offline")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder for what the command leaves")
    parser.add_argument("--preset", choices=PRESETS, default="fast", help="of what follows (default: fast)")
    for name, fast in PRESETS["fast"].items():
        paper = PRESETS["paper"][name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(fast), help=f"fast: {fast}, paper: {paper}")
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    args = parser.parse_args()

    logging.disable(logging.INFO)  # Lightning's
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # the data are in memory
    warnings.filterwarnings("ignore", "Loading `train_dataloader` to estimate")
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of a 1x1 kernel, where all are alike
    data = cifar10(args.data, args.score)
    group = time.strftime(f"cifar10-{args.preset}-%Y%m%d-%H%M%S")
    # Every process comes through here, and trains all of them in the same order.
    report({method: [train(method, seed, group, args, data) for seed in args.seeds] for method in args.methods}, args)


if __name__ == "__main__":
    main()
