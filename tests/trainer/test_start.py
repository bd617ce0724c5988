"""While a job starts - in its imports, before and in the making of torch's default group - nobody awaits the dead."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import _notice, _rendezvous
from lightning_easgd.communication._notice import Notice
from lightning_easgd.communication._rendezvous import Rendezvous
from lightning_easgd.communication._roll_call import RollCall
from lightning_easgd.trainer import parent
from tests.helpers import COMMAND_S, ROOT, TIMEOUT, Replicas, free_port, run_replicas
from tests.modules import Regression, loader, trainer

PROMISED_S = 60.0  # to a user, for a job's end
STANDSTILL_S = 60.0  # of a busy machine; both together are far below the five minutes of ``max_silence``
GRACE = timedelta(seconds=2)  # in place of 20 seconds


def _dies_early(replica: int, culprit: int, where: str) -> None:
    """Trains with the defaults; one rank dies while all come, or in the making of the default group."""
    opened = Rendezvous.__init__

    def open_with_little_grace(self: Rendezvous, *args: Any, **kwargs: Any) -> None:
        opened(self, *args, **{**kwargs, "grace": GRACE})

    def die(first: Any, *_: Any, **__: Any) -> None:
        if isinstance(first, RollCall):
            first._store.wait([f"1/{1 - replica}"])  # who had not come yet could not tell it from one that is late
        os.kill(os.getpid(), signal.SIGKILL)

    owner, name = {"coming": (RollCall, "gather"), "default group": (dist, "init_process_group")}[where]
    with mock.patch.object(Rendezvous, "__init__", open_with_little_grace):
        if replica == culprit:
            mock.patch.object(owner, name, die).start()
        trainer().fit(Regression(), loader())


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("where", ["coming", "default group"])
def test_who_dies_before_the_default_group_stands_is_missed_at_once(culprit, where):
    replicas = Replicas(_dies_early, 2, culprit, where)
    for process in replicas.processes:
        process.join((PROMISED_S + STANDSTILL_S) / 2)  # far from where ``Replicas`` would end them, with exit code 1
    codes = [process.exitcode for process in replicas.processes]
    replicas._timeout = 1.0
    replicas.join()
    assert codes[culprit] == -signal.SIGKILL
    assert codes[1 - culprit] == 1
    said = replicas.error(1 - culprit)
    if where == "coming":
        gone = ("rank 0, which serves the store, is gone", "rank 1: its process is gone")[culprit]
        assert gone in said or "onnection" in said  # the store of rank 0 ends with it, and may say so first


def _comes_late(replica: int) -> int:
    """Rank 1 comes later than those may who begin at the same time."""
    with mock.patch.object(_rendezvous, "_ARRIVAL_S", 1.0):
        if replica == 1:
            time.sleep(5)  # this is how late it is
        t = trainer()
        t.fit(Regression(), loader())
        t.fit(Regression(), loader())  # over the default group that stands by now
    return t.global_step


def test_who_comes_late_from_its_imports_is_waited_for():
    assert run_replicas(_comes_late, 2) == [8, 8]


def _default_groups(replica: int, folder: str) -> int:
    """Trains, ends the default group, and trains again with another one."""
    for number in range(2):
        trainer().fit(Regression(), loader())
        dist.destroy_process_group()
        Path(folder, f"{number}-{replica}").touch()
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        while not Path(folder, f"{number}-{1 - replica}").exists():  # a new group must not meet the old one's store
            assert time.monotonic() < deadline
            time.sleep(0.01)
    dist.init_process_group("gloo", rank=replica, world_size=2, timeout=TIMEOUT)
    trainer().fit(Regression(), loader())
    dist.destroy_process_group()
    return next(_notice._numbers)


def test_a_script_may_end_the_default_group_and_train_again(tmp_path):
    """Each of them has a notice of its own, and a store without what an earlier one has left there."""
    assert run_replicas(_default_groups, 2, str(tmp_path)) == [2, 2]


def test_a_notice_of_an_earlier_attempt_is_not_read(monkeypatch):
    """As under torchrun, whose agent serves the store for all attempts."""
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        monkeypatch.setattr(_notice, "_numbers", iter([0, 0]))  # these are other processes
        other = Notice("127.0.0.1", port, rank=1, timeout=timedelta(seconds=1))
        with pytest.raises(RuntimeError, match="rank 1: rank 0 did not come within 1 s, or is gone"):
            other.read()
        Notice("127.0.0.1", port, rank=0, timeout=TIMEOUT).post(7 + attempt)
        assert other.read() == 7 + attempt
    del agent


def test_where_rank_0_never_comes_it_is_said():
    with pytest.raises(RuntimeError, match="rank 1: rank 0 did not come within 1 s, or is gone"):
        Notice("127.0.0.1", free_port(), rank=1, timeout=timedelta(seconds=1))


ORPHANS = """
import os, sys, time
from pathlib import Path

rank = os.environ.get("LOCAL_RANK", "0")

def wait_for(name):
    deadline = time.monotonic() + float(sys.argv[1])
    while not Path(name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)

def say(name):
    Path(name).write_text(str(os.getpid()))

if rank == "1":
    say("imports")
    wait_for("dead")
from tests.modules import Regression, loader, trainer

if __name__ == "__main__":
    t = trainer(devices=3)
    if rank == "2":
        say("prepares")
        wait_for("never")
    t.fit(Regression(), loader())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux alone")
def test_children_of_lightnings_launcher_do_not_wait_for_a_parent_that_is_gone(tmp_path):
    """One of them is still importing when rank 0 dies, the other has its Trainer and prepares data."""
    (tmp_path / "script.py").write_text(ORPHANS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in env.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT")}
    # A file, not a pipe, for what they print; a pipe, which closes when the last of them has ended, to wait for that.
    with (tmp_path / "said").open("w") as said:
        parent = subprocess.Popen(
            [sys.executable, "script.py", str(COMMAND_S)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=said
        )
    places = [tmp_path / "imports", tmp_path / "prepares"]
    deadline = time.monotonic() + COMMAND_S
    try:
        while not all(place.exists() for place in places):
            assert parent.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        (tmp_path / "dead").touch()
        parent.communicate(timeout=PROMISED_S + STANDSTILL_S)
    finally:
        parent.kill()
        for place in places:
            _kill(place)
    words = (tmp_path / "said").read_text()
    for rank in (1, 2):
        assert (
            f"local rank {rank}: local rank 0, which has started this process (as process {parent.pid}), is gone"
            in words
        )


def _kill(place: Path) -> None:
    """Ends the process that has said its number there, if it is still the child that it was."""
    pid = place.read_text() if place.exists() else ""
    command = Path(f"/proc/{pid}/cmdline")
    if pid and command.exists() and b"script.py" in command.read_bytes():
        os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(parent, "_parent", None)
    monkeypatch.setattr(parent, "_is_free", threading.Event())


def test_who_merely_inherits_the_environment_is_left_alone(monkeypatch, fresh):
    monkeypatch.setenv(parent._NAME, str(os.getpid()))  # it is nobody's child here, and alive
    with mock.patch.object(parent, "_watch") as watch:
        parent.watch()
        parent.refuse_orphan()
    watch.assert_not_called()
    assert parent._NAME not in os.environ


def test_an_orphan_is_refused_until_it_has_met_the_others(monkeypatch, fresh):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setenv(parent._NAME, str(dead.pid))
    parent.watch()
    with pytest.raises(RuntimeError, match=f"which has started this process .as process {dead.pid}., is gone"):
        parent.refuse_orphan()
    parent.may_leave()
    parent.refuse_orphan()


def test_only_what_the_launcher_starts_is_told_its_parent():
    seen = []

    class Launcher:
        def launch(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(os.environ.get(parent._NAME))
            return function(*args, **kwargs)

    launcher = Launcher()
    parent.announce(launcher)
    assert launcher.launch(lambda x, y: (x, y, os.environ.get(parent._NAME)), 1, y=2) == (1, 2, None)
    with pytest.raises(KeyError):
        launcher.launch({}.__getitem__, "absent")
    assert seen == [str(os.getpid())] * 2
    assert parent._NAME not in os.environ


@pytest.mark.parametrize("start_method", ["popen", "spawn", "fork"])
def test_launchers_of_multiprocessing_are_left_as_they_are(start_method):
    """Their processes are children of one that is no rank, which ends them; torch's own see to it."""
    launcher = trainer(strategy=EASGDStrategy(start_method=start_method)).strategy.launcher
    assert ("launch" in vars(launcher)) == (start_method == "popen")
