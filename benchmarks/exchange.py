"""What a synchronous exchange costs, against the bare all-reduce of the same numbers.

    python -m benchmarks.exchange [--link loopback] [--numel 1000000 10000000] [--num-replicas 2] [--rounds 11] [--json]

Each replica is a process; they meet over Gloo, on one host or each on a host of its own, behind a link of 1 Gbit/s or
100 Mbit/s (network namespaces; Linux, root, ``ip`` and ``tc``). In each round all measure, begun together, one after
the other:

* ``bare``: one all-reduce of a float32 vector of that many numbers, and nothing else.
* ``push, WIRE``: from ``push`` of a vector to a completed center, for each wire format. A push looks through the vector
  and copies it; the exchange adds up what came and writes the new center.
* ``exchange, WIRE``: the same from ``exchange``, of a vector that the center has lent: the force in place of the copy.

A round's ratios compare what was measured in that round, so that a machine that is busy with something else burdens
all alike; processor time is the process's own, all its threads together. Printed are the median, the least and the
greatest over all processes' rounds. The first round, which maps the pages, does not count.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from benchmarks._network import RATES, Host, Network, why_not
from lightning_easgd.algorithms import displacement_
from lightning_easgd.communication import AllReduce, OpenCenter
from lightning_easgd.communication._c10d import new_group
from lightning_easgd.communication._wire import Wire
from lightning_easgd.rules import Addition

RATE = 0.1
TIMEOUT = timedelta(seconds=120)


def measure(
    replica: int, host: Host, folder: str, barrier: Barrier, num_replicas: int, numel: int, rounds: int
) -> None:
    """Runs in each process: leaves the seconds of each round in the folder."""
    host.enter()
    os.environ["GLOO_SOCKET_IFNAME"] = host.interface
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_replicas)
    delta = torch.randn(numel, generator=torch.Generator().manual_seed(replica)).mul_(1e-3)
    vector = torch.zeros(numel)
    group = new_group(dist.PrefixStore("bare", store), replica, num_replicas, torch.device("cpu"), TIMEOUT)
    variants: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {  # what is not measured, and what is
        "bare": (lambda: None, lambda: group.allreduce([vector]).wait(TIMEOUT)),
    }

    def push(center: OpenCenter) -> None:
        center.push(delta, read_at=center.clock)
        center.drain()

    def exchange(center: OpenCenter) -> None:
        center.exchange(center.borrow(), displacement_, scale=RATE).done()
        center.drain()

    with ExitStack() as stack:
        centers = {}
        for wire in get_args(Wire):
            center = centers[wire] = stack.enter_context(
                AllReduce(wire=wire).open(
                    torch.zeros(numel),
                    replica=replica,
                    num_replicas=num_replicas,
                    rule=Addition(),
                    store=dist.PrefixStore(wire, store),
                    timeout=TIMEOUT,
                )
            )
            variants[f"push, {wire}"] = (lambda: None, lambda center=center: push(center))
            variants[f"exchange, {wire}"] = (
                lambda center=center: center.borrow().copy_(delta),
                lambda center=center: exchange(center),
            )
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        processor: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(rounds + 1):
            for name, (prepare, run) in variants.items():
                prepare()
                barrier.wait(TIMEOUT.total_seconds())
                began, used = time.perf_counter(), time.process_time()
                run()
                took_s, used_s = time.perf_counter() - began, time.process_time() - used
                if number > 0:
                    seconds[name].append(took_s)
                    processor[name].append(used_s)
        barrier.wait(TIMEOUT.total_seconds())
        sent = {wire: center.traffic.bytes_sent // center.traffic.exchanges for wire, center in centers.items()}
    Path(folder, f"{replica}.json").write_text(json.dumps({"seconds": seconds, "processor": processor, "sent": sent}))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def benchmark(link: str, numel: int, num_replicas: int, rounds: int) -> dict[str, Any]:
    """Returns ratios to ``bare``, milliseconds and processor milliseconds, each a median with minimum and maximum."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_replicas)
    with Network(link, num_replicas) as network, tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=measure, args=(r, host, folder, barrier, num_replicas, numel, rounds), daemon=True)
            for r, host in enumerate(network.hosts)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")
        results = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(num_replicas)]

    def gathered(kind: str) -> dict[str, list[float]]:
        return {name: [s for result in results for s in result[kind][name]] for name in results[0][kind]}

    seconds, processor = gathered("seconds"), gathered("processor")
    return {
        "link": link,
        "numel": numel,
        "num_replicas": num_replicas,
        "rounds": rounds,
        "ratios": {
            name: spread([a / b for a, b in zip(values, seconds["bare"], strict=True)])
            for name, values in seconds.items()
            if name != "bare"
        },
        "milliseconds": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()},
        "processor_milliseconds": {name: spread([1e3 * s for s in values]) for name, values in processor.items()},
        "bytes_an_exchange": results[0]["sent"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--numel", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000], help="numbers of the center"
    )
    parser.add_argument("--link", choices=list(RATES), default="loopback", help="default: loopback")
    parser.add_argument("--num-replicas", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--rounds", type=int, default=11, help="rounds that count (default 11)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args()
    if given.link != "loopback" and (reason := why_not()):
        sys.exit(f"--link {given.link} is skipped: {reason}")
    results = [benchmark(given.link, numel, given.num_replicas, given.rounds) for numel in given.numel]
    if given.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(f"{given.link}, {result['numel']} numbers, {given.num_replicas} replicas, {given.rounds} rounds")
        tables = {"to bare": "ratios", "ms": "milliseconds", "ms of processor": "processor_milliseconds"}
        for unit, kind in tables.items():
            for name, row in result[kind].items():
                print(f"{name:20} {row['median']:8.2f} {unit:16} ({row['min']:.2f} to {row['max']:.2f})")
        for wire, num_bytes in result["bytes_an_exchange"].items():
            print(f"{wire:20} {num_bytes:8} bytes sent by each replica")


if __name__ == "__main__":
    main()
