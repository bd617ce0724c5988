"""Jobs in a loop, for as long as one likes: that all ends are the right ones. Not part of the suite.

    python -m tests.soak torchrun [--jobs 50] [--parallel 2] [--busy 2]
        starts scripts under torchrun that fit and validate; each must end with exit code 0
    python -m tests.soak kill [--jobs 50] [--parallel 2] [--busy 2] [--seed 0]
        ends one process of a job by SIGKILL at a random moment from its start on, some while they leave, both
        namespaces, synchronous and asynchronous; nobody kills the others, which must end within the promised time, by
        an error unless training was over

Prints a table; exits with 1 if a job misses what is promised.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_easgd import EASGD, EASGDStrategy, SharedMemory
from tests.helpers import COMMAND_S, ROOT, Replicas, free_port
from tests.modules import NAMESPACES, REGRESSIONS, loader, trainer

PROMISED_S = 60.0
SILENCE = timedelta(seconds=20)  # in place of five minutes: who dies before the others know it never comes
LEAVES, LEFT = "on_train_end", "on_fit_end"
STARTS_S, RUNS_S = 5.0, 25.0  # a job's first moments, in which half of the deaths are; and the rest

SCRIPT = """
import os, sys
from tests.modules import Regression, loader, trainer

if __name__ == "__main__":
    module = Regression()
    t = trainer(strategy=sys.argv[1])
    t.fit(module, loader(), loader(16))
    t.validate(module, loader(16), verbose=False)
"""


def run_torchrun(number: int, _: argparse.Namespace) -> tuple[str, str, bool]:
    """Runs one job and returns what it was, how it ended, and whether that is right."""
    strategy = ("easgd", "easgd_async")[number % 2]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(SCRIPT)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        command += [f"--master-port={free_port()}", "script.py", strategy]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            return strategy, f"hangs for {COMMAND_S:.0f} s", False
    why = next((line for line in done.stderr.splitlines() if "terminate called" in line or "Error:" in line), "")
    return strategy, f"exit code {done.returncode} {why[:100]}".strip(), done.returncode == 0


def _train(replica: int, namespace: str, transport: Any, ends: bool, folder: str) -> None:
    base = NAMESPACES[namespace].Callback
    place = Path(folder, f"place-{replica}")

    def say(what: str) -> None:
        """At once for whoever reads it: a file that is being written is empty for a moment."""
        part = place.with_suffix(".part")
        part.write_text(what)
        part.replace(place)

    class Looking(base):  # type: ignore[misc,valid-type]
        """Says where this replica is, makes replica 1 the slower one, so that 0 waits for it, and the places last."""

        def at(self, what: str, lasts_s: float = 0.0) -> None:
            say(what)
            time.sleep(lasts_s)

        def on_train_batch_start(self, *_: Any) -> None:
            self.at("a step", 0.04 * (1 + replica))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            self.at("a meeting, or on the way" if is_last else "between steps")

        def on_validation_batch_start(self, *_: Any) -> None:
            self.at("an evaluation", 0.05)

        def on_train_end(self, *_: Any) -> None:
            self.at(LEAVES, 0.3)

        def on_fit_end(self, *_: Any) -> None:
            self.at(LEFT, 0.3)

    strategy: Any = EASGDStrategy if namespace == "pytorch_lightning" else _other_strategy()
    say("its start")
    trainer(
        namespace,
        strategy=strategy(EASGD(period=2), transport, max_silence=SILENCE),
        max_epochs=1 if ends else -1,
        callbacks=[Looking()],
    ).fit(REGRESSIONS[namespace](), loader(), loader(32))


def _other_strategy() -> Any:
    from lightning_easgd.pytorch import EASGDStrategy as Other

    return Other


def run_kill(number: int, arguments: argparse.Namespace) -> tuple[str, str, bool]:
    """Runs one job, kills one of its processes, and returns what it was, how it ended, and whether that is right."""
    rng = random.Random(f"{arguments.seed}/{number}")
    namespace = sorted(NAMESPACES)[number % 2]
    transport = (None, SharedMemory())[number // 2 % 2]
    culprit = rng.randrange(2)
    ends = rng.random() < 0.3  # a job that trains for an epoch: it is killed from its last evaluation on
    after_s = rng.uniform(0, 2.0 if ends else STARTS_S if rng.random() < 0.5 else RUNS_S)
    what = f"{namespace}, {'synchronous' if transport is None else 'asynchronous'}, rank {culprit}"
    with tempfile.TemporaryDirectory() as folder:
        replicas = Replicas(_train, 2, namespace, transport, ends, folder)
        place = Path(folder, f"place-{culprit}")
        deadline = time.monotonic() + COMMAND_S
        while time.monotonic() < deadline and not (
            place.exists() and (not ends or place.read_text() in ("an evaluation", LEAVES, LEFT))
        ):
            time.sleep(0.01)
        time.sleep(after_s)  # the moment
        where = place.read_text() if place.exists() else "nowhere"
        began = time.monotonic()
        victim, other = replicas.processes[culprit], replicas.processes[1 - culprit]
        victim.kill()
        victim.join()
        other.join(2 * PROMISED_S)
        took_s = time.monotonic() - began
        code = other.exitcode
        replicas._timeout = 1.0
        replicas.join()
        lines = [line for line in replicas.error(1 - culprit).strip().splitlines() if line]
    # Who has trained to the end needs nobody any more: the other may end well too.
    may_end_well = ends and (victim.exitcode == 0 or where in (LEAVES, LEFT))
    is_right = code is not None and (code != 0 or may_end_well) and took_s < PROMISED_S
    why = lines[-1][:110] if lines else "it ended well" if code == 0 else "ended by its watcher"
    return (
        f"{what}: {where}",
        f"killed after {after_s:.1f} s, exit code {victim.exitcode}: the other ended {took_s:.1f} s later, "
        f"exit code {code}: {why}",
        is_right,
    )


@contextmanager
def busy(count: int) -> Any:
    """Keeps so many processors busy beside the jobs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["torchrun", "kill"])
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--parallel", type=int, default=2, help="jobs side by side")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run = {"torchrun": run_torchrun, "kill": run_kill}[arguments.what]
    ends: Counter[tuple[str, bool]] = Counter()
    with busy(arguments.busy), ThreadPoolExecutor(arguments.parallel) as pool:
        for number, (what, how, is_right) in enumerate(
            pool.map(lambda number: run(number, arguments), range(arguments.jobs))
        ):
            ends[what, is_right] += 1
            print(f"{number:4}  {'right' if is_right else 'WRONG'}  {what}: {how}", flush=True)
    print("\n| job | right | wrong |\n|---|---|---|")
    for what in sorted({what for what, _ in ends}):
        print(f"| {what} | {ends[what, True]} | {ends[what, False]} |")
    return int(any(not is_right for _, is_right in ends))


if __name__ == "__main__":
    sys.exit(main())
