"""What an exchange through shared memory costs, against the memory traffic that it cannot do without.

    python -m benchmarks.shared_memory [--numel 10000000] [--rounds 15] [--json]

Two processes exchange with one center at once. In each round both measure, one after the other and each begun together:

* ``floor``: an exchange looks through x before it adds anything, since nothing of a delta that is not finite may reach
  the center; then it reads x and c and writes c and the delta: 20 bytes a number in float32. What that costs is taken
  from the same two processes adding one private vector to another, which touches 12 bytes a number.
* ``fused``: ``exchange``, one pass by chunks.
* ``separate``: ``pull``, the force from the whole snapshot, ``push``.

A round's ratios compare what was measured in that round, so that a machine that is busy with something else burdens
all alike. Printed are the median, the least and the greatest over both processes' rounds.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_easgd.algorithms import displacement_
from lightning_easgd.communication.shared_memory import CHUNK_BYTES, SharedMemory
from lightning_easgd.rules import Addition

NUM_REPLICAS = 2
RATE = 0.1
TIMEOUT = timedelta(seconds=60)


def measure(
    replica: int, folder: str, barrier: Barrier, numel: int, rounds: int, chunk_bytes: int, pinned: bool
) -> None:
    """Runs in each process: leaves the seconds of each round in the folder."""
    torch.set_num_threads(1)
    if pinned:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[replica % len(cores)]})
    center = SharedMemory(chunk_bytes=chunk_bytes).open(
        torch.zeros(numel),
        replica=replica,
        num_replicas=NUM_REPLICAS,
        rule=Addition(),
        store=dist.FileStore(f"{folder}/store", NUM_REPLICAS),
        timeout=TIMEOUT,
    )
    generator = torch.Generator().manual_seed(replica)
    x, left, right = torch.empty(numel), torch.ones(numel), torch.ones(numel)
    delta = torch.empty(numel)

    def separate() -> None:
        snapshot = center.pull()
        displacement_(delta.copy_(x), snapshot.value)
        center.push(delta.mul_(RATE), read_at=snapshot.clock)

    variants: dict[str, Callable[[], Any]] = {
        "floor": lambda: left.add_(right),
        "fused": lambda: center.exchange(x, displacement_, scale=RATE).wait(),
        "separate": separate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with center:
        for number in range(rounds + 1):
            for name, run in variants.items():
                # Just written, as a replica's parameters are when they have been read into one vector.
                (left if name == "floor" else x).normal_(generator=generator)
                barrier.wait(TIMEOUT.total_seconds())
                began = time.perf_counter()
                run()
                took_s = time.perf_counter() - began
                if number > 0:  # the first round maps the pages
                    seconds[name].append(took_s * (20 / 12 if name == "floor" else 1))
    result = {"seconds": seconds, "wait_s": center.traffic.wait_s}
    Path(folder, f"{replica}.json").write_text(json.dumps(result))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def benchmark(numel: int, rounds: int, chunk_bytes: int, pinned: bool) -> dict[str, Any]:
    """Returns milliseconds of each variant and ratios to the floor, each a median with minimum and maximum."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(NUM_REPLICAS)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=measure, args=(r, folder, barrier, numel, rounds, chunk_bytes, pinned), daemon=True)
            for r in range(NUM_REPLICAS)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")
        results = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(NUM_REPLICAS)]
    seconds = {name: [s for result in results for s in result["seconds"][name]] for name in results[0]["seconds"]}
    ratios = {
        f"{name} / {base}": spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])
        for name, base in (("fused", "floor"), ("separate", "floor"), ("separate", "fused"))
    }
    return {
        "numel": numel,
        "rounds": rounds,
        "chunk_bytes": chunk_bytes,
        "pinned": pinned,
        "milliseconds": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()},
        "ratios": ratios,
        "wait_s": sum(result["wait_s"] for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=10_000_000, help="numbers of the center (default 1e7)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default 15)")
    parser.add_argument("--chunk-bytes", type=int, default=CHUNK_BYTES, help="default: the transport's")
    parser.add_argument("--pin", action="store_true", help="give each process a core of its own")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    result = benchmark(given.numel, given.rounds, given.chunk_bytes, given.pin)
    if given.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{given.numel} numbers, chunks of {given.chunk_bytes} bytes, {given.rounds} rounds of 2 processes at once")
    for unit, table in (("ms", result["milliseconds"]), ("", result["ratios"])):
        for name, row in table.items():
            print(f"{name:18} {row['median']:7.2f} {unit:2}  ({row['min']:.2f} to {row['max']:.2f})")


if __name__ == "__main__":
    main()
