"""What a step costs under elastic averaging and under each of its peers, beside the same replicas left alone.

    python -m benchmarks.peers --link loopback --work cnn --data path/to/fashion-mnist
    python -m benchmarks.peers --link 100mbit --work transformer --data path/to/tinyshakespeare --json peers.json
    python -m benchmarks.peers --link 1gbit --work cnn --replicas 2 4 8
    python -m benchmarks.peers --link 100mbit --time-to-accuracy --data path/to/fashion-mnist

Methods:

* ``local``: the replicas without any communication, the limit.
* ``ddp``; ``post_local_sgd``: Lightning's own, the latter from the first step on and with its hook on the CPU too.
* ``torchft_local_sgd``, ``torchft_diloco_5``, ``torchft_diloco_9``: torchft's, DiLoCo sent so many steps before it is
  needed. In a plain loop: they do not pay for Lightning's, the others do, ``local`` included.
* ``easgd_float32``, ``easgd_bfloat16``, ``easgd_int8``: this package, by wire format.
* ``bare_...``: all-reduces of as many bytes, one after another, without training.

All train the same module on the same data, one thread a replica. In each round every method makes some periods of
steps, one method after the other, in processes that last over all rounds and otherwise stand still; a round's ratios
compare what was measured in it. Printed are the median, the least and the greatest over the rounds; the first round,
which warms up, does not count. ``limit`` is max(step of ``local``, ``bare`` / period), of the method's own wire format.
Bytes are what the interfaces have counted, memory is the peak of a process above ``local``'s, as a multiple of the
parameters'. Nothing is under way between rounds: what was is waited for within the round. EASGD's rounds begin with the
step that exchanges, after a first one that is a step shorter, as its exchange has a period to complete.

Links: one host's ``loopback``, or a host for each replica at a switch with 1 Gbit/s or 100 Mbit/s: network namespaces,
made and removed here, which need Linux, root, ``ip`` and ``tc``.

With ``--time-to-accuracy``, over several seeds, each in fresh processes: seconds and samples (of all replicas) until
the model has so much accuracy on the validation images, and its accuracy on the test images after equal samples. A
copy of it is kept every period and looked at later, off the clock. The model is the center that a replica has at the
time, without what is under way, which is waited for only at the end; for the peers, their replicas' mean; for ``local``
each replica, and its accuracy their mean.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.nn.utils import vector_to_parameters
from typing_extensions import Self

from benchmarks._methods import METHODS, TIMEOUT, WIRES, Job, Order, run
from benchmarks._network import RATES, Network, why_not
from benchmarks._work import NUM_IMAGES, WORKS, Data, Work, files, load

PEERS = [method for method in METHODS if not method.startswith("bare_")]


class Replicas:
    """The processes of one method's replicas. They stand still but for the orders that are given them.

    Args:
        method: a key of ``METHODS``.
        network: has a host for each of them.
        work: see ``Work``.
        data: see ``load``.
        period: steps from one exchange to the next.
        seed: of parameters and data.
    """

    def __init__(self, method: str, network: Network, work: str, data: Data, period: int, seed: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self.method = method
        self._connections = []
        self._processes = []
        for replica, host in enumerate(network.hosts):
            ours, theirs = context.Pipe()
            job = Job(method, work, data, period, seed, host, replica, len(network.hosts))
            process = context.Process(target=run, args=(job, theirs), name=f"{method} {replica}", daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        try:
            self._send((network.hosts[0].address, self._receive()[0]))
        except BaseException:
            self._kill()
            raise

    def steps(self, number: int) -> list[dict[str, Any]]:
        """Makes so many steps and returns what each replica says of them."""
        self._send(Order(number))
        return self._receive()

    def models(self, number: int, every: int) -> list[tuple[float, torch.Tensor]]:
        """Makes so many steps and returns the models on the way, one in ``every`` steps.

        Each is the second at which the slowest replica had it, and what the replicas then had, (num_replicas, d).
        """
        self._send(Order(number, every))
        times = zip(*(answer["kept_at"] for answer in self._receive()), strict=True)
        self._send("kept")
        kept = [torch.frombuffer(bytearray(m), dtype=torch.float32) for m in self._receive(as_bytes=True)]
        models = torch.stack([vectors.view(number // every, -1) for vectors in kept], 1)
        return [(max(at), model) for at, model in zip(times, models, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._send(Order(0))
            deadline = time.monotonic() + 60
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _kill(self) -> None:
        """Ends the processes that have not ended by themselves."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _send(self, message: Any) -> None:
        for replica, connection in enumerate(self._connections):
            try:
                connection.send(message)
            except BrokenPipeError:
                raise self._ended(replica) from None

    def _ended(self, replica: int) -> RuntimeError:
        return RuntimeError(f"{self.method}: the process of replica {replica} has ended")

    def _receive(self, *, as_bytes: bool = False) -> list[Any]:
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        messages: dict[int, Any] = {}
        while len(messages) < len(self._connections):
            waiting = [i for i in range(len(self._connections)) if i not in messages]
            ready = wait([self._connections[i] for i in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{self.method}: replicas {waiting} have not answered within {TIMEOUT}")
            for i in waiting:
                if self._connections[i] in ready:
                    try:
                        messages[i] = self._connections[i].recv_bytes() if as_bytes else self._connections[i].recv()
                    except EOFError:
                        raise self._ended(i) from None
        return [messages[i] for i in range(len(messages))]


def wire_of(method: str) -> str:
    wire = method.rpartition("_")[2]
    return wire if wire in WIRES else "float32"


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(given: argparse.Namespace, methods: list[str], data: Data, num_replicas: int) -> dict[str, Any]:
    """Returns the figures of every method, with so many replicas."""
    bares = [f"bare_{wire}" for wire in WIRES if any(wire_of(method) == wire for method in methods)]
    answers: dict[str, list[list[dict[str, Any]]]] = {method: [] for method in [*methods, *bares]}
    bytes_sent: dict[str, list[int]] = {method: [] for method in answers}
    steps = dict.fromkeys(methods, given.steps) | dict.fromkeys(bares, given.steps // given.period)
    if given.link != "loopback" and "ddp" in steps:
        steps["ddp"] = given.period  # each of its steps waits for the link, and is like the other ones
    with Network(given.link, num_replicas) as network, ExitStack() as stack:
        replicas = {
            method: stack.enter_context(Replicas(method, network, given.work, data, given.period, seed=0))
            for method in answers
        }
        for number in range(given.rounds + 1):
            for method in list(answers) if number % 2 else reversed(answers):
                before = network.bytes_sent()
                # EASGD exchanges in a period's last step and waits for it a period later: its rounds begin with that.
                is_early = number == 0 and method.startswith("easgd")
                answer = replicas[method].steps(steps[method] - is_early)
                if number > 0:
                    answers[method].append(answer)
                    bytes_sent[method].append(network.bytes_sent() - before)
            print(f"round {number} of {given.rounds}, {num_replicas} replicas", file=sys.stderr, flush=True)

    def mean(method: str, key: str) -> list[float]:
        """Over the replicas, a round."""
        return [statistics.mean(a[key] for a in answer) for answer in answers[method]]

    ms = {method: [1e3 * s / steps[method] for s in mean(method, "seconds")] for method in answers}
    num_bytes = 4 * Work(given.work).num_parameters
    result: dict[str, Any] = {
        "num_replicas": num_replicas,
        "parameter_bytes": num_bytes,
        "bare_ms": {wire_of(bare): spread(ms[bare]) for bare in bares},
        "methods": {},
    }
    for method in methods:
        bare = ms[f"bare_{wire_of(method)}"]
        figures = {
            "over_local": spread([m / local for m, local in zip(ms[method], ms["local"], strict=True)]),
            "over_limit": spread(
                [m / max(local, b / given.period) for m, local, b in zip(ms[method], ms["local"], bare, strict=True)]
            ),
            "ms": spread(ms[method]),
            "bytes_a_step": statistics.median(bytes_sent[method]) / (steps[method] * num_replicas),
            "memory_above_local": (mean(method, "peak_bytes")[-1] - mean("local", "peak_bytes")[-1]) / num_bytes,
        }
        if "ddp" in methods:
            figures["ddp_over_it"] = spread([d / m for d, m in zip(ms["ddp"], ms[method], strict=True)])
        if answers[method][0][0]["exposed_s"] is not None:
            took_s, stood_s = mean(method, "seconds"), mean(method, "exposed_s")
            figures["exposed"] = spread([e / s for e, s in zip(stood_s, took_s, strict=True)])
        result["methods"][method] = figures
    return result


def print_table(result: dict[str, Any], period: int) -> None:
    bare = ", ".join(f"{wire} {row['median']:.1f} ms" for wire, row in result["bare_ms"].items())
    print(f"\n{result['num_replicas']} replicas, period {period}; bare all-reduce: {bare}")
    print(
        f"{'':<18} {'over local':>20} {'over limit':>20} {'ddp over it':>11} {'ms a step':>23} {'exposed':>8} "
        f"{'bytes a step':>13} {'memory':>7}"
    )

    def with_range(row: dict[str, float], digits: int) -> str:
        return f"{row['median']:.{digits}f} ({row['min']:.{digits}f} to {row['max']:.{digits}f})"

    for method, row in result["methods"].items():
        ddp = f"{row['ddp_over_it']['median']:.2f}" if "ddp_over_it" in row else ""
        exposed = f"{100 * row['exposed']['median']:.1f} %" if "exposed" in row else ""
        print(
            f"{method:<18} {with_range(row['over_local'], 2):>20} {with_range(row['over_limit'], 2):>20} {ddp:>11} "
            f"{with_range(row['ms'], 1):>23} {exposed:>8} {row['bytes_a_step']:>13,.0f} "
            f"{row['memory_above_local']:>7.2f}"
        )


def time_to_accuracy(given: argparse.Namespace, method: str, data: Data, seed: int) -> dict[str, Any]:
    """Trains one method from one seed until it has had ``given.num_steps`` and the accuracy, or ``given.max_steps``."""
    model = Work(given.work)

    def accuracy(weights: torch.Tensor, split: str) -> float:
        found = []
        for vector in weights if method == "local" else [weights.mean(0)]:
            vector_to_parameters(vector, model.parameters())
            found.append(model.accuracy(data[split], data[f"{split}_labels"]))
        return statistics.mean(found)

    seconds, steps = 0.0, 0
    reached: dict[str, float] = {}
    figures: dict[str, Any] = {"method": method, "seed": seed, "curve": []}
    (num_replicas,) = given.replicas
    with (
        Network(given.link, num_replicas) as network,
        Replicas(method, network, given.work, data, given.period, seed) as replicas,
    ):
        while steps < given.max_steps and (steps < given.num_steps or not reached):
            number = given.num_steps if steps == 0 else min(10 * given.period, given.max_steps - steps)
            for took_s, weights in replicas.models(number, given.period):
                steps += given.period
                figures["curve"].append((steps, seconds + took_s, accuracy(weights, "validation")))
                if not reached and figures["curve"][-1][2] >= given.target:
                    reached = {"seconds": seconds + took_s, "samples": steps * NUM_IMAGES * num_replicas}
                if steps == given.num_steps:
                    figures["accuracy"] = accuracy(weights, "test")
            seconds = figures["curve"][-1][1]
    return figures | reached


def print_times(runs: list[dict[str, Any]], given: argparse.Namespace) -> None:
    print(f"\n{given.replicas[0]} replicas, period {given.period}, {given.seeds} seeds; accuracy {given.target:g}")
    print(f"{'':<18} {'ddp over it':>11} {'seconds':>23} {'samples':>24} {f'accuracy, {given.num_steps} steps':>26}")
    of_methods: dict[str, list[dict[str, Any]]] = {}
    for r in runs:
        of_methods.setdefault(r["method"], []).append(r)
    medians = {
        method: statistics.median(r["seconds"] for r in of_method)
        for method, of_method in of_methods.items()
        if all("seconds" in r for r in of_method)
    }
    for method, of_method in of_methods.items():
        ratio = seconds = samples = ""
        if method in medians:
            s, n = (spread([r[key] for r in of_method]) for key in ("seconds", "samples"))
            if "ddp" in medians:
                ratio = f"{medians['ddp'] / s['median']:.2f}"
            seconds = f"{s['median']:.1f} ({s['min']:.1f} to {s['max']:.1f})"
            samples = f"{n['median']:.0f} ({n['min']:.0f} to {n['max']:.0f})"
        else:
            seconds = f"{sum('seconds' in r for r in of_method)} of {len(of_method)} reach it"
        a = spread([r["accuracy"] for r in of_method])
        final = f"{a['median']:.3f} ({a['min']:.3f} to {a['max']:.3f})"
        print(f"{method:<18} {ratio:>11} {seconds:>23} {samples:>24} {final:>26}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", choices=list(RATES), default="loopback", help="default: loopback")
    parser.add_argument("--work", choices=WORKS, default="cnn", help="default: cnn")
    parser.add_argument("--methods", nargs="+", choices=PEERS, default=PEERS, help="beside local; default: all")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2], help="how many; one table each (default: 2)")
    parser.add_argument("--period", type=int, default=10, help="steps, at least 10 with torchft_diloco_9 (default: 10)")
    parser.add_argument("--steps", type=int, default=60, help="of a method in a round, whole periods (default: 60)")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default: 7)")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files, or of input.txt")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--time-to-accuracy", action="store_true", help="train to an accuracy instead")
    parser.add_argument("--target", type=float, default=0.8, help="that accuracy, of the validation images (0.8)")
    parser.add_argument("--num-steps", type=int, default=260, help="after which to test, whole periods (default: 260)")
    parser.add_argument("--max-steps", type=int, default=1000, help="after which to give up (default: 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    given = parser.parse_args()
    if given.steps % given.period or given.num_steps % given.period:
        parser.error(f"--steps {given.steps} and --num-steps {given.num_steps} must be whole periods of {given.period}")
    if given.max_steps < given.num_steps or given.max_steps % given.period:
        parser.error(
            f"--max-steps {given.max_steps} must be at least --num-steps {given.num_steps}, and whole periods of "
            f"{given.period}"
        )
    if given.time_to_accuracy and (given.work == "transformer" or len(given.replicas) > 1):
        parser.error("--time-to-accuracy is of images, with one number of --replicas")
    if min(given.replicas) < 2 or given.rounds < 1 or given.seeds < 1:
        parser.error("--replicas must be 2 or more, --rounds and --seeds 1 or more")
    lacking = [] if given.data is None else [name for name in files(given.work) if not (given.data / name).is_file()]
    if lacking:
        parser.error(f"--data {given.data} lacks {', '.join(lacking)}")
    return given


def available(methods: list[str], period: int) -> list[str]:
    """Returns the methods that can run here, ``local`` first, and says why others cannot."""
    chosen = ["local", *(method for method in PEERS if method in methods and method != "local")]
    reasons = {
        method: f"it is sent at least a period of {period} ahead"
        for method, delay in (("torchft_diloco_5", 5), ("torchft_diloco_9", 9))
        if delay >= period
    }
    if importlib.util.find_spec("torchft") is None:
        missing = "torchft is not installed: pip install -e '.[bench]'"
        reasons |= {method: missing for method in chosen if method.startswith("torchft")}
    for method in chosen:
        if method in reasons:
            print(f"{method}: skipped, {reasons[method]}")
    return [method for method in chosen if method not in reasons]


def end(signum: int, frame: FrameType | None) -> None:
    """Leaves by way of the context managers, which remove the namespaces; a second signal does not disturb them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + signum)


def main() -> None:
    given = arguments()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, end)
    reason = why_not()
    if reason and given.link != "loopback":
        print(f"--link {given.link}: skipped, {reason}")
        return
    methods = available(given.methods, given.period)
    # The hosts have no names, of which each connection warns; torchft tells of each of its exchanges.
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "RUST_LOG": "error"}
    multiprocessing.set_forkserver_preload(["benchmarks._methods", "torchft"])
    data, what = load(given.work, given.data)
    print(f"link {given.link}, {given.work} of {Work(given.work).num_parameters} parameters, on {what}", flush=True)
    if reason:
        print(f"bytes a step are those of all that goes on in this machine: {reason}")
    if given.time_to_accuracy:
        results = []
        for seed in range(given.seeds):
            for method in methods:
                results.append(time_to_accuracy(given, method, data, seed))
                print(f"seed {seed} of {given.seeds}, {method}", file=sys.stderr, flush=True)
        print_times(results, given)
    else:
        results = []
        for num_replicas in given.replicas:
            results.append(measure(given, methods, data, num_replicas))
            print_table(results[-1], given.period)
    if given.json is not None:
        context = {
            "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items()},
            "data": what,
            "processors": len(os.sched_getaffinity(0)),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        given.json.write_text(json.dumps({**context, "results": results}, indent=2))


if __name__ == "__main__":
    main()
