"""Jobs in a loop, for as long as one likes: that all ends are the right ones. Not part of the suite.

    python -m tests.soak torchrun [--jobs 50] [--parallel 2] [--busy 2]
        starts scripts under torchrun that fit and validate; each must end with exit code 0
    python -m tests.soak kill [--jobs 50] [--parallel 2] [--busy 2] [--seed 0] [--launcher popen]
        ends one process of a job by SIGKILL at a random moment of each kind, from its imports on to its leaving, both
        namespaces, synchronous and asynchronous; the others must end within the promised time, by an error unless
        training was over. Nobody else kills them, or Lightning's own launcher has started them. 72 jobs have each
        kind of moment with each namespace, transport and rank once

Prints a table; exits with 1 if a job misses what is promised.
"""

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist

from lightning_easgd import EASGD, EASGDStrategy, SharedMemory
from lightning_easgd.communication._roll_call import RollCall
from tests.helpers import COMMAND_S, ROOT, Replicas, free_port
from tests.modules import NAMESPACES, REGRESSIONS, loader, trainer

PROMISED_S = 60.0
# In place of five minutes, for a victim that had no line to the others yet: to them it is one that never comes.
SILENCE = timedelta(seconds=20)
IMPORTS, SETUP, MEET, GROUP = "its imports", "the strategy's setup", "the rendezvous", "init_process_group"
CONNECTED, TRAINING, EVALUATION = "before its first step", "training", "an evaluation"
LEAVES, LEFT = "on_train_end", "on_fit_end"
STARTS = (IMPORTS, SETUP, MEET, GROUP, CONNECTED)
MOMENTS = (*STARTS, TRAINING, EVALUATION, LEAVES, LEFT)
RUNS_S = 10.0  # within which a job that trains is ended

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


class Job(NamedTuple):
    """What one job is: the same for all its processes.

    Attributes:
        namespace: of Lightning.
        is_synchronous: whether replicas exchange through AllReduce, else through SharedMemory.
        moment: in which its victim dies.
        culprit: the rank that dies.
        holder: the rank that stays where it is at ``moment``, where that is of the start: the culprit, or the child
            that is there while its parent dies.
        folder: where each rank says where it is.
    """

    namespace: str
    is_synchronous: bool
    moment: str
    culprit: int
    holder: int
    folder: str

    def __str__(self) -> str:
        """Returns what the table counts by."""
        return f"{self.namespace}, {'synchronous' if self.is_synchronous else 'asynchronous'}, rank {self.culprit}"

    @property
    def ends(self) -> bool:
        """Whether it trains for an epoch, not for ever."""
        return self.moment in (LEAVES, LEFT)

    def place(self, rank: int) -> str:
        """Returns where a rank has said that it is."""
        path = Path(self.folder, f"place-{rank}")
        return path.read_text() if path.exists() else "nowhere"

    def say(self, rank: int, what: str) -> None:
        """Says it at once for whoever reads it: a file that is being written is empty for a moment."""
        part = Path(self.folder, f"place-{rank}.part")
        part.write_text(what)
        part.replace(part.with_suffix(""))
        if what == self.moment and rank == self.holder and what in STARTS:
            time.sleep(COMMAND_S)  # until it is killed, or its parent is


def train(job: Job, replica: int, max_silence: timedelta | None) -> None:
    """Trains as one rank of a job."""
    base = NAMESPACES[job.namespace].Callback

    class Looking(base):  # type: ignore[misc,valid-type]
        """Says where this replica is, makes replica 1 the slower one, so that 0 waits for it, and the places last."""

        def at(self, what: str, lasts_s: float = 0.0) -> None:
            job.say(replica, what)
            time.sleep(lasts_s)

        def on_train_batch_start(self, *_: Any) -> None:
            self.at("a step", 0.04 * (1 + replica))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            self.at("a meeting, or on the way" if is_last else "between steps")

        def on_validation_batch_start(self, *_: Any) -> None:
            self.at(EVALUATION, 0.05)

        def on_train_end(self, *_: Any) -> None:
            self.at(LEAVES, 0.3)

        def on_fit_end(self, *_: Any) -> None:
            self.at(LEFT, 0.3)

    def say_at(owner: Any, name: str, what: str, later: str = "a meeting") -> None:
        function, places = getattr(owner, name), itertools.chain([what], itertools.repeat(later))

        def say_first(*args: Any, **kwargs: Any) -> Any:
            job.say(replica, next(places))
            return function(*args, **kwargs)

        mock.patch.object(owner, name, say_first).start()

    strategy: Any = EASGDStrategy if job.namespace == "pytorch_lightning" else _other_strategy()
    say_at(strategy, "setup_environment", SETUP)
    say_at(RollCall, "gather", MEET)
    say_at(dist, "init_process_group", GROUP)
    say_at(strategy, "setup", CONNECTED)
    trainer(
        job.namespace,
        strategy=strategy(EASGD(period=2), None if job.is_synchronous else SharedMemory(), max_silence=max_silence),
        max_epochs=1 if job.ends else -1,
        callbacks=[Looking()],
    ).fit(REGRESSIONS[job.namespace](), loader(), loader(32))


def _train(replica: int, job: Job, max_silence: timedelta | None) -> None:
    job.say(replica, IMPORTS)
    train(job, replica, max_silence)


def _other_strategy() -> Any:
    from lightning_easgd.pytorch import EASGDStrategy as Other

    return Other


def run_kill(number: int, arguments: argparse.Namespace) -> tuple[str, str, bool]:
    """Runs one job, kills one of its processes, and returns what it was, how it ended, and whether that is right.

    A job whose victim had ended by itself before it could be killed is run again with another moment.
    """
    rng = random.Random(f"{arguments.seed}/{number}")
    run = {"tests": _kill_replica, "popen": _kill_popen}[arguments.launcher]
    moment = MOMENTS[number // 4 % len(MOMENTS)]
    culprit = (number + number // 2 + number // 36) % 2  # both at each kind of moment
    for again in range(20):
        with tempfile.TemporaryDirectory() as folder:
            holder = 1 if arguments.launcher == "popen" else culprit
            job = Job(sorted(NAMESPACES)[number % 2], number // 2 % 2 == 0, moment, culprit, holder, folder)
            found = run(job, rng)
        if found is not None:
            what, how, is_right = found
            return what, f"{how}{f' ({again} had left before)' if again else ''}", is_right
    return str(job), "its victim had always left before it could be killed", False


def _wait_for(job: Job, rng: random.Random, is_over: Callable[[], bool]) -> float:
    """Waits for the moment, and a random time more, which it returns."""
    deadline = time.monotonic() + COMMAND_S
    who = job.holder if job.moment in STARTS else job.culprit
    wanted = "a step" if job.moment == TRAINING else job.moment
    # Who dies when not all have met is missed only after ``max_silence``: who comes later cannot tell.
    others = () if job.moment in (IMPORTS, SETUP) else (1 - who,)
    while time.monotonic() < deadline and not is_over():
        if job.place(who) == wanted and not any(job.place(other) in ("nowhere", IMPORTS, SETUP) for other in others):
            break
        time.sleep(0.005)
    after_s = rng.uniform(0, {TRAINING: RUNS_S, EVALUATION: 0.1, LEFT: 1.0}.get(job.moment, 0.4))
    time.sleep(after_s)
    return after_s


def _kill_replica(job: Job, rng: random.Random) -> tuple[str, str, bool] | None:
    """Kills a process of a launcher that kills nobody."""
    replicas = Replicas(_train, 2, job, SILENCE if job.moment in (IMPORTS, SETUP) else None)
    victim, other = replicas.processes[job.culprit], replicas.processes[1 - job.culprit]
    after_s = _wait_for(job, rng, lambda: victim.exitcode is not None)
    where = job.place(job.culprit)
    began = time.monotonic()
    victim.kill()
    victim.join()
    other.join(2 * PROMISED_S)
    took_s = time.monotonic() - began
    code = other.exitcode
    replicas._timeout = 1.0
    replicas.join()
    if victim.exitcode == 0:
        return None
    lines = [line for line in replicas.error(1 - job.culprit).strip().splitlines() if line]
    # Who has trained to the end needs nobody any more: the other may end well too.
    may_end_well = job.ends and where in (LEAVES, LEFT)
    is_right = victim.exitcode == -9 and code is not None and (code != 0 or may_end_well) and took_s < PROMISED_S
    why = lines[-1][:110] if lines else "it ended well" if code == 0 else "ended by its watcher"
    return (
        f"{job}: {where}",
        f"killed after {after_s:.1f} s, exit code {victim.exitcode}: the other ended {took_s:.1f} s later, "
        f"exit code {code}: {why}",
        is_right,
    )


POPEN_SCRIPT = """
import os, sys, time
from datetime import timedelta
from pathlib import Path

rank = int(os.environ.get("LOCAL_RANK", "0"))
Path(f"pid-{rank}").write_text(str(os.getpid()))
Path(f"place-{rank}.part").write_text("its imports")
Path(f"place-{rank}.part").rename(f"place-{rank}")
if sys.argv[3] == "its imports" and rank == int(sys.argv[5]):
    time.sleep(float(sys.argv[6]))
from tests.soak import Job, train

if __name__ == "__main__":
    train(Job(sys.argv[1], sys.argv[2] == "True", *sys.argv[3:4], *map(int, sys.argv[4:6]), os.getcwd()), rank, None)
"""


def _kill_popen(job: Job, rng: random.Random) -> tuple[str, str, bool] | None:
    """Kills a process of Lightning's own launcher: rank 0, which has started rank 1, or that one."""
    folder = Path(job.folder)
    (folder / "script.py").write_text(POPEN_SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in env.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT")}
    hold_s = COMMAND_S if job.culprit == 1 else 5.0  # an import cannot be left before it is over
    command = [sys.executable, "script.py", job.namespace, str(job.is_synchronous), job.moment]
    command += [str(job.culprit), str(job.holder), str(hold_s)]
    with (folder / "said").open("w") as said:
        parent = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=said)
    after_s = _wait_for(job, rng, lambda: parent.poll() is not None)
    where = f"{job.place(0)} / {job.place(1)}"
    pids = [int(path.read_text()) if path.exists() else 0 for path in (folder / "pid-0", folder / "pid-1")]
    began = time.monotonic()
    was_there = _is_there(pids[job.culprit])
    if was_there:
        os.kill(pids[job.culprit], signal.SIGKILL)
    try:
        parent.communicate(timeout=2 * PROMISED_S)  # closes when the last one has ended
        is_over = True
    except subprocess.TimeoutExpired:
        is_over = False
        for pid in pids:
            if _is_there(pid):
                os.kill(pid, signal.SIGKILL)
        parent.communicate()
    took_s = time.monotonic() - began
    code = parent.returncode
    if not was_there or (job.culprit == 0 and code == 0):
        return None
    lines = [line for line in (folder / "said").read_text().strip().splitlines() if line]
    is_right = is_over and took_s < PROMISED_S and (code != 0 or (job.ends and job.place(1) in (LEAVES, LEFT)))
    return (
        f"popen, {job}: {where}",
        f"killed after {after_s:.1f} s: all had ended {took_s:.1f} s later, exit code of rank 0 {code}: "
        f"{lines[-1][:110] if lines else ''}",
        is_right,
    )


def _is_there(pid: int) -> bool:
    """Returns whether it is a process of the script that has not ended."""
    try:
        return b"script.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


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
    parser.add_argument("--launcher", choices=["tests", "popen"], default="tests", help="of the jobs of kill")
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
