"""A batch-norm network on real data: the center, with statistics of its own, is as good as its replicas."""

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easgd import EASGD, EASGDStrategy
from tests import modules
from tests.callbacks import Ends
from tests.helpers import run_replicas
from tests.modules import flat, trainer


def digits() -> tuple[TensorDataset, TensorDataset]:
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:400], order[400:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


class BatchNormNet(modules.pytorch_lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@torch.no_grad()
def accuracy(module: nn.Module, data: TensorDataset) -> float:
    module.eval()
    found = float((module(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean())
    module.train()
    return found


def _fit(replica: int, center_buffers: Any) -> Any:
    modules.pytorch_lightning.seed_everything(1)
    train, test = digits()
    ends = Ends(lambda module: (accuracy(module, test), module.net[1].running_mean.clone(), flat(module)))
    strategy = EASGDStrategy(EASGD(period=10), center_buffers=center_buffers)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    trainer(strategy=strategy, callbacks=[ends], max_epochs=6).fit(BatchNormNet(), loader, DataLoader(test, 64))
    (center, statistics, _), (replica_alone, _, weights) = ends.center, ends.replica
    return center, replica_alone, statistics, weights


def _fit_both(replica: int) -> Any:
    return _fit(replica, "mean"), _fit(replica, 10)


def test_the_center_is_within_a_point_of_the_best_replica():
    first, second = run_replicas(_fit_both, 2)
    for (center0, replica0, statistics0, _), (center1, replica1, statistics1, _) in zip(first, second, strict=True):
        assert center0 == center1
        assert torch.equal(statistics0, statistics1)
        assert min(replica0, replica1) > 0.9
        assert center0 >= max(replica0, replica1) - 0.01, (center0, replica0, replica1)
    for mean, estimated in (first, second):
        assert not torch.equal(mean[2], estimated[2])
        assert torch.equal(mean[3], estimated[3])  # estimating leaves training as it is, random numbers included


@pytest.mark.parametrize("value", [0, -1, True, "median"])
def test_a_number_of_batches_is_asked_for(value):
    with pytest.raises(ValueError, match=r"center_buffers=.*must be 'mean' or a number of training batches >= 1"):
        EASGDStrategy(center_buffers=value)
