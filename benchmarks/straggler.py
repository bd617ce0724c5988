"""What a slow replica costs: an epoch of synchronous EASGD, of asynchronous EASGD, and of the latter on dynamic data.

    python -m benchmarks.straggler                 # two replicas, the second at a third of the first one's speed
    python -m benchmarks.straggler --slowdown 5 --json straggler.json

A step takes as long as it is told to (it sleeps, so that the replicas do not compete for the processor). The ideal is
all batches at both replicas' speeds at once; the speeds are those of the last of the three runs, where nobody waits.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easgd import EASGD, AllReduce, Asynchronous, EASGDStrategy


class Paced(LightningModule):
    """A small network whose training step takes ``seconds`` on replica 0 and ``slowdown`` times that on the last."""

    def __init__(self, seconds: float, slowdown: float) -> None:
        super().__init__()
        self.seconds, self.slowdown = seconds, slowdown
        self.net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        is_slow = self.global_rank == self.trainer.world_size - 1
        time.sleep(self.seconds * (self.slowdown if is_slow else 1))
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """Measures every epoch, from the moment that all begin it until all have ended it, and a batch of this replica."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.batches: list[int] = []
        self.batch_s: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        self._began = time.perf_counter()
        self._num = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._num += 1
        self._busy = time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self._began)
        self.batches.append(self._num)
        self.batch_s.append(self._busy / self._num)


def measure(args: argparse.Namespace, strategy: EASGDStrategy) -> dict[str, Any]:
    """Trains and returns medians over the epochs (the first one, which warms up, aside)."""
    torch.manual_seed(0)
    clock = Clock()
    inputs = torch.randn(args.batches * 8, 32)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=args.epochs + 1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    trainer.fit(Paced(args.seconds, args.slowdown), loader)
    # The strategy's groups are gone with the fit; Lightning's own stays until the process ends.
    gathered: list[Any] = [None] * 2
    torch.distributed.all_gather_object(gathered, (clock.epochs[1:], clock.batches[1:], clock.batch_s[1:]))
    epochs = gathered[0][0]
    return {
        "epoch_s": statistics.median(epochs),
        "epoch_s_range": (min(epochs), max(epochs)),
        "batches": [round(statistics.median(g[1])) for g in gathered],
        "batches_per_s": sum(1 / statistics.median(g[2]) for g in gathered),
    }


@rank_zero_only
def report(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    ideal = args.batches / list(results.values())[-1]["batches_per_s"]
    for r in results.values():
        r["over_ideal"] = r["epoch_s"] / ideal
    print(f"{args.batches} batches of {args.seconds * 1e3:.0f} ms, replica 1 {args.slowdown:g} times slower")
    print(f"{'':<24} {'over ideal':>10} {'epoch, s (min to max)':>26} {'batches':>12}")
    for name, r in results.items():
        low, high = r["epoch_s_range"]
        spread = f"{r['epoch_s']:.2f} ({low:.2f} to {high:.2f})"
        print(f"{name:<24} {r['over_ideal']:>10.3f} {spread:>26} {r['batches']!s:>12}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": {**vars(args), "json": None}, "results": results}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200, help="batches an epoch, of all replicas (default: 200)")
    parser.add_argument("--seconds", type=float, default=0.01, help="time of a step on the fast replica")
    parser.add_argument("--slowdown", type=float, default=3.0, help="of the other one (default: 3)")
    parser.add_argument("--epochs", type=int, default=3, help="measured, after one that warms up (default: 3)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
    results = {
        "easgd": measure(args, EASGDStrategy(EASGD(), AllReduce())),
        "easgd_async": measure(args, EASGDStrategy(EASGD(), Asynchronous())),
        "easgd_async, dynamic": measure(args, EASGDStrategy(EASGD(), Asynchronous(), data="dynamic")),
    }
    report(args, results)


if __name__ == "__main__":
    main()
