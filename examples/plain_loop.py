"""Elastic averaging in a training loop of one's own: PyTorch alone, no Trainer.

    torchrun --nproc-per-node 2 examples/plain_loop.py     # two replicas; --nnodes and so on as ever
    python examples/plain_loop.py                          # one

Each process trains its replica on its part of scikit-learn's digits. Prints the test accuracy of the center.
"""

import os

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lightning_easgd import EASGD
from lightning_easgd.core import Elastic, Plan

EPOCHS, BATCH = 10, 16


def digits(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns images and labels to train on, this rank's part alone, and those to test on."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=450, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y) for y in split[2:])
    own = slice(rank, len(train_x) // world_size * world_size, world_size)
    return train_x[own], train_y[own], test_x, test_y


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(rank)  # of the order of the data; all replicas begin with rank 0's weights
    train_x, train_y, test_x, test_y = digits(rank, world_size)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    with Elastic(model, [optimizer], plan=Plan(EASGD(period=4))) as replica:
        for epoch in range(EPOCHS):
            for batch in torch.randperm(len(train_x)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
                replica.step(optimizer)  # the optimizer's step, and an exchange with the center where one is due
            with replica.center(), torch.no_grad():  # all ranks meet: the model holds the center in here
                accuracy = 100 * (model(test_x).argmax(1) == test_y).double().mean().item()
            if rank == 0:
                print(f"epoch {epoch + 1:2}: test accuracy of the center {accuracy:.2f} %")


if __name__ == "__main__":
    main()
