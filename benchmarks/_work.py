"""What the replicas train: models of known size, on real data where a folder has it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import IterableDataset

from examples.fashion_mnist import FILES, read_idx

WORKS = ("cnn", "transformer", "mlp")
NUM_IMAGES = 32  # of a replica's step
NUM_TEXTS, CONTEXT = 8, 64  # of a replica's step, and their characters
NUM_VALIDATION = 2000
TEXT = "input.txt"

Data = dict[str, Tensor]  # "train", and for images "train_labels" and the same of "validation" and "test"


class Work(LightningModule):
    """A model, its loss and its optimizer; they know nothing of replicas. Without a Trainer it works as well.

    Args:
        name: one of ``WORKS``: a CNN of 0.82 M parameters and an MLP of 50.3 M on 32 images a step, or a transformer of
            4.9 M on 8 x 64 characters.
        seed: of the parameters.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.name = name
        if name == "cnn":
            self.net: nn.Module = nn.Sequential(
                *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
                *(nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)),
            )
        elif name == "mlp":
            self.net = nn.Sequential(
                *(nn.Flatten(), nn.Linear(784, 4820), nn.ReLU()),
                *(nn.Linear(4820, 4820), nn.ReLU(), nn.Linear(4820, 4820), nn.ReLU(), nn.Linear(4820, 10)),
            )
        else:
            self.net = CharacterTransformer()

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs if self.name == "transformer" else (inputs / 255 - 0.2860) / 0.3530)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.name == "transformer":
            return torch.optim.AdamW(self.parameters(), lr=3e-4)
        # The MLP's vectors fill the memory as it is.
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.0 if self.name == "mlp" else 0.9)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        hits = [self(i).argmax(1) == target for i, target in zip(images.split(500), labels.split(500), strict=True)]
        return float(torch.cat(hits).float().mean())


class CharacterTransformer(nn.Module):
    def __init__(self, vocabulary: int = 256, width: int = 256, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.position
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


class Batches(IterableDataset):
    """One replica's batches, without end: of its own share of the images, or of random places in its part of the text.

    Args:
        data: of ``load``.
        replica: this one.
        num_replicas: who share the data.
        seed: of the order; each replica has another.
    """

    def __init__(self, data: Data, replica: int, num_replicas: int, seed: int) -> None:
        self._data, self._replica, self._num_replicas = data, replica, num_replicas
        self._generator = torch.Generator().manual_seed(1000 * seed + replica)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        train, labels = self._data["train"], self._data.get("train_labels")
        if labels is None:
            length = len(train) // self._num_replicas
            part = train[self._replica * length : (self._replica + 1) * length]
            window = torch.arange(CONTEXT + 1)
            while True:
                begin = torch.randint(length - CONTEXT, (NUM_TEXTS, 1), generator=self._generator)
                text = part[begin + window].long()
                yield text[:, :-1], text[:, 1:]
        share = torch.arange(self._replica, len(train), self._num_replicas)
        while True:
            order = share[torch.randperm(len(share), generator=self._generator)]
            for indices in order[: len(order) // NUM_IMAGES * NUM_IMAGES].split(NUM_IMAGES):
                yield train[indices], labels[indices]


def files(work: str) -> list[str]:
    """Returns the names of the files that a work's data is in."""
    return [TEXT] if work == "transformer" else [name for names in FILES.values() for name in names]


def load(work: str, folder: Path | None) -> tuple[Data, str]:
    """Returns the data in memory that processes share, and what it is.

    Args:
        work: one of ``WORKS``.
        folder: holds ``files(work)``; None for what is at hand:
            the digits of scikit-learn, enlarged, or random characters.
    """
    if work == "transformer":
        data, what = _random_text() if folder is None else _text(folder)
    else:
        data, what = _digits() if folder is None else _fashion_mnist(folder)
    return {name: tensor.share_memory_() for name, tensor in data.items()}, what


def _text(folder: Path) -> tuple[Data, str]:
    characters = torch.frombuffer(bytearray((folder / TEXT).read_bytes()), dtype=torch.uint8)
    return {"train": characters}, f"{len(characters)} characters of {folder / TEXT}"


def _random_text() -> tuple[Data, str]:
    characters = torch.randint(65, (1_000_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {"train": characters}, "random characters, since there is no --data"


def _fashion_mnist(folder: Path) -> tuple[Data, str]:
    (train, train_labels), (test, test_labels) = ([read_idx(folder / name) for name in FILES[s]] for s in FILES)
    return _split(train, train_labels, test, test_labels), f"Fashion-MNIST, of {folder}"


def _digits() -> tuple[Data, str]:
    from sklearn.datasets import load_digits  # an extra

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().mul_(255 / 16).unsqueeze(1)
    images = F.interpolate(images, (28, 28)).squeeze(1).to(torch.uint8)
    # Three images in four to train on, the last quarter to test with.
    first = len(images) * 3 // 4
    labels = torch.from_numpy(digits.target)
    data = _split(images[:first], labels[:first], images[first:], labels[first:])
    return data, "scikit-learn's digits, enlarged, since there is no --data"


def _split(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Data:
    first = len(train) - min(NUM_VALIDATION, len(train) // 5)
    images, labels = train.unsqueeze(1), train_labels.long()
    return {
        "train": images[:first].clone(),
        "train_labels": labels[:first].clone(),
        "validation": images[first:].clone(),
        "validation_labels": labels[first:].clone(),
        "test": test.unsqueeze(1).clone(),
        "test_labels": test_labels.long(),
    }
