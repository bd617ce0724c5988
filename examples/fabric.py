"""Elastic averaging with Lightning Fabric, which starts the processes and brings the data to the devices.

    python examples/fabric.py

Each process trains its replica on its part of scikit-learn's digits. Prints the test accuracy of the center.
"""

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easgd import EASGD
from lightning_easgd.core import Company, Elastic, Plan

DEVICES, EPOCHS, BATCH = 2, 10, 16


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns images and labels to train on, and those to test on."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=450, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y) for y in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=DEVICES, strategy="ddp")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    train_set, test_set = digits()
    loader = fabric.setup_dataloaders(DataLoader(train_set, BATCH, shuffle=True, drop_last=True))  # each rank's part
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).to(fabric.device)  # not fabric.setup, which would average the gradients of all ranks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    test_x, test_y = (tensor.to(fabric.device) for tensor in test_set.tensors)
    company = Company.from_environment(device=fabric.device)
    with Elastic(model, [optimizer], plan=Plan(EASGD(period=4)), company=company) as replica:
        for epoch in range(EPOCHS):
            loader.sampler.set_epoch(epoch)
            for images, labels in loader:
                optimizer.zero_grad()
                fabric.backward(nn.functional.cross_entropy(model(images), labels))
                replica.step(optimizer)
            with replica.center(), torch.no_grad():
                accuracy = 100 * (model(test_x).argmax(1) == test_y).double().mean().item()
            fabric.print(f"epoch {epoch + 1:2}: test accuracy of the center {accuracy:.2f} %")


if __name__ == "__main__":
    main()
