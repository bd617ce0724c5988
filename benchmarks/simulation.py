"""How many steps of replicas the simulation makes in a second, with 1,000 of them on a small quadratic.

    python -m benchmarks.simulation                  # 1,000 replicas, 4 numbers each
    python -m benchmarks.simulation --noise 1 --json simulation.json

The event-driven rows have random compute times, exponential with mean 1. A figure is the best of the rounds, in seconds
of this process, so that what else the machine does counts little.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_easgd.algorithms import EASGD, Algorithm, Downpour, LocalSGD
from lightning_easgd.gates import Gate, StaleSynchronous
from lightning_easgd.simulation import LockStep, Quadratic, Simulation

CASES: list[tuple[str, Algorithm, Gate | None]] = [
    ("asynchronous EASGD, period 10", EASGD(10), None),
    ("asynchronous EASGD, period 1", EASGD(1), None),
    ("DOWNPOUR, period 10", Downpour(10), None),
    ("DOWNPOUR, period 1", Downpour(1), None),
    ("DOWNPOUR, period 10, slack 3", Downpour(10), StaleSynchronous(3)),
]
LOCK_STEP_CASES: list[tuple[str, Algorithm]] = [
    ("synchronous EASGD, period 10, LockStep", EASGD(10)),
    ("local SGD, period 10, LockStep", LocalSGD(10)),
]


def exponential(generator: random.Random) -> float:
    return generator.expovariate(1.0)


def rate(run: Callable[[int], None], num_replicas: int, num_steps: int, rounds: int) -> float:
    """Returns replica-steps a second."""
    run(1)  # allocates
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        run(num_steps)
        best = min(best, time.process_time() - begin)
    return num_replicas * num_steps / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--numbers", type=int, default=4, help="d, of each replica")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation, of the gradients")
    parser.add_argument("--steps", type=int, default=50, help="of each replica, in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    objective, begin, lr = Quadratic(noise=args.noise), torch.ones(args.numbers), 1e-4
    figures: dict[str, float] = {}
    for name, algorithm, gate in CASES:
        simulation = Simulation.of(
            algorithm,
            objective,
            begin,
            num_replicas=args.replicas,
            lr=lr,
            synchronous=False,
            gate=gate,
            compute_time=exponential,
        )
        figures[name] = rate(simulation.run, args.replicas, args.steps, args.rounds)
        print(f"{name:<40} {figures[name]:>14,.0f} replica-steps/s", flush=True)
    for name, algorithm in LOCK_STEP_CASES:
        lock_step = LockStep(algorithm, objective, begin, num_replicas=args.replicas, lr=lr)
        figures[name] = rate(lock_step.run, args.replicas, args.steps * 20, args.rounds)
        print(f"{name:<40} {figures[name]:>14,.0f} replica-steps/s", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
