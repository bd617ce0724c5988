"""What Parle's proximal term and averages cost a step, over plain local training.

    python -m benchmarks.parle [--rounds 20] [--json]

One process, one replica, no communication: what is measured is the passes over the parameters that a method makes in
every step (the force in the gradient, the running average) and in every exchange. In each round every method makes a
whole number of its periods, one method after the other, and a round's ratios compare what was measured in that round;
printed are the median, the least and the greatest. ``force`` is the force alone, out of the steps of ``parle``.

The work of a step is a CNN of 0.8 M parameters on 32 images of 28 x 28, and an MLP of 5 M parameters on 32 vectors,
whose step does little more than read its weights: what a pass over the parameters costs shows most there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_easgd import EASGD, AllReduce, ElasticSGD, EntropySGD, Parle
from lightning_easgd.algorithms import Algorithm
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.slots import num_slots
from lightning_easgd.flatten import ParameterVector

STEPS = 100  # of each method in a round; a multiple of every period
METHODS: dict[str, Callable[[], Algorithm]] = {
    "easgd": EASGD,
    "elastic_sgd": lambda: ElasticSGD(scoping=0.999),
    "entropy_sgd": lambda: EntropySGD(scoping=0.999),
    "parle": lambda: Parle(scoping=0.999),
}


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1800), nn.ReLU(), nn.Linear(1800, 1800), nn.ReLU(), nn.Linear(1800, 10))


class Training:
    """A model and the steps of one method; without one, plain local training."""

    def __init__(self, make: Callable[[], nn.Module], shape: tuple[int, ...], algorithm: Algorithm | None) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.batch = torch.randn(32, *shape), torch.randint(10, (32,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        self.force_s = 0.0
        self.coupling: Coupling | None = None
        if algorithm is not None:
            vector = ParameterVector(self.model.parameters())
            center = AllReduce().open(
                vector.read(),
                replica=0,
                num_replicas=1,
                rule=algorithm.rule(1),
                store=dist.HashStore(),
                timeout=timedelta(seconds=60),
                num_slots=num_slots(1),
            )
            algorithm.bind(self.optimizer, vector.parameters)
            self.coupling = Coupling([name for name, _ in self.model.named_parameters()], vector, algorithm, center)

    def loss(self) -> Tensor:
        images, labels = self.batch
        return F.cross_entropy(self.model(images), labels)

    def local_update(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.coupling is not None:
            began = time.perf_counter()
            self.coupling.add_force()
            self.force_s += time.perf_counter() - began
        self.optimizer.step()

    def measure(self) -> float:
        """Returns the seconds of a step."""
        self.force_s = 0.0
        began = time.perf_counter()
        for _ in range(STEPS):
            if self.coupling is None:
                self.local_update()
            else:
                self.coupling.step(self.local_update, recover=None)
        return (time.perf_counter() - began) / STEPS


def run(rounds: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for work, make, shape in (("cnn", cnn, (1, 28, 28)), ("mlp", mlp, (784,))):
        trainings = {name: Training(make, shape, algorithm()) for name, algorithm in METHODS.items()}
        trainings = {"local": Training(make, shape, None), **trainings}
        numel = sum(p.numel() for p in trainings["local"].model.parameters())
        found: dict[str, dict[str, list[float]]] = {name: {"ms": [], "ratio": [], "force": []} for name in trainings}
        for number in range(rounds + 1):
            seconds = {name: training.measure() for name, training in trainings.items()}
            if number == 0:  # allocations
                continue
            for name, each in seconds.items():
                found[name]["ms"].append(1000 * each)
                found[name]["ratio"].append(each / seconds["local"])
                found[name]["force"].append(trainings[name].force_s / STEPS / seconds["local"])
        results[f"{work}, {numel / 1e6:.2f} M parameters"] = found
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print every round's figures as JSON instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = run(args.rounds)
    if args.json:
        print(json.dumps(results))
        return
    for work, found in results.items():
        print(f"\n{work}: a step's time over plain local training's")
        print(f"  {'':<12} {'median':>7} {'least':>7} {'most':>7} {'force':>7} {'ms':>8}")
        for name, figures in found.items():
            ratio, force = figures["ratio"], statistics.median(figures["force"])
            print(
                f"  {name:<12} {statistics.median(ratio):7.3f} {min(ratio):7.3f} {max(ratio):7.3f} {force:7.3f} "
                f"{statistics.median(figures['ms']):8.2f}"
            )


if __name__ == "__main__":
    main()
