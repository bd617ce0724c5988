"""Replicas for tests: as threads with real Gloo groups, and as processes. They fail, they never hang."""

import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# All limits are guards against hanging: many times what is waited for takes on a machine with other things to do.
TIMEOUT = timedelta(seconds=60)
SOON_S = 0.75 * TIMEOUT.total_seconds()  # what is over by then has not run into its timeout
PROCESSES_S = 240.0
COMMAND_S = 300.0  # of a command, whose processes each import torch and Lightning

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])  # imported once, not by every process


def shorten(center: Any, timeout: timedelta) -> None:
    """Gives a center's waits so little time from here on; it was opened with enough of it."""
    center._timeout = timeout
    if hasattr(center, "_inner"):  # a slice
        shorten(center._inner, timeout)
    if hasattr(center, "_lanes"):  # of an all-reduce, whose group waits for what was begun when it is destroyed
        center._group._group._set_default_timeout(timeout)
        for lane in center._lanes:
            lane._timeout = timeout
    for shard, _ in getattr(center, "_shards", []):  # of a parameter server
        shard._channel._timeout = timeout


def peak_bytes() -> int:
    """Returns the most memory that this process has ever had in use. On Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def run_threads(function: Callable[..., Any], num_replicas: int, *args: Any) -> list[Any]:
    """Calls ``function(replica, store, *args)`` in one thread a replica, over one store; returns the results."""
    store = dist.HashStore()
    results: list[Any] = [None] * num_replicas
    errors: list[BaseException | None] = [None] * num_replicas

    def run(replica: int) -> None:
        try:
            results[replica] = function(replica, store, *args)
        except BaseException as error:
            errors[replica] = error

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(num_replicas)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 3 * TIMEOUT.total_seconds()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"a replica hangs; errors so far: {errors}"
    for error in errors:
        if error is not None:
            raise error
    return results


def free_port() -> int:
    """Returns a port that is free, and that nobody is given who does not ask for it by number.

    One that the system chooses may be another process's by the time it is used, for a connection of any kind.
    """
    lowest, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = random.SystemRandom()  # other processes draw too, and tests seed the global generator
    while True:
        port = ports.randrange(10_000, lowest)
        with socket.socket() as s, suppress(OSError):  # it is taken
            s.bind(("127.0.0.1", port))
            return port


def _start_server() -> None:
    """Starts what forks all processes, if there is none yet. It finds ``tests`` by the environment, wherever it is."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path)):
        forkserver.ensure_running()


def _child(replica: int, folder: str, environment: dict[str, str], deadline: float, function: Any, args: Any) -> None:
    os.environ.update(environment)
    os.environ["LOCAL_RANK"] = str(replica)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs inherit as ignored
    faulthandler.dump_traceback_later(deadline, exit=True)
    try:
        torch.save(function(replica, *args), Path(folder, f"{replica}.pt"))
    except BaseException:
        Path(folder, f"{replica}.error").write_text(traceback.format_exc())
        raise


class Replicas:
    """Processes that run ``function(replica, *args)`` as ranks of one job, as a launcher outside of Lightning would."""

    def __init__(
        self, function: Callable[..., Any], num_replicas: int, *args: Any, timeout: float = PROCESSES_S
    ) -> None:
        self._folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._timeout = timeout
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(num_replicas),
        }
        _start_server()
        self.processes = [
            # Not daemons, which may not have a loader's workers; each ends itself at its deadline.
            CONTEXT.Process(target=_child, args=(r, self._folder, environment, timeout - 5, function, args))
            for r in range(num_replicas)
        ]
        for process in self.processes:
            process.start()

    def join(self) -> list[int | None]:
        """Waits for all processes, ends those that hang, and returns the exit codes."""
        deadline = time.monotonic() + self._timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def error(self, replica: int) -> str:
        """Returns the traceback with which a replica ended; empty if there was none."""
        path = Path(self._folder, f"{replica}.error")
        return path.read_text() if path.exists() else ""

    def results(self) -> list[Any]:
        """Waits for all processes and returns what they returned; raises if one of them failed."""
        codes = self.join()
        errors = "\n".join(f"replica {r}: {self.error(r)}" for r in range(len(codes)) if self.error(r))
        assert not any(codes), f"exit codes {codes}\n{errors}"
        return [torch.load(Path(self._folder, f"{r}.pt"), weights_only=False) for r in range(len(self.processes))]


def run_replicas(
    function: Callable[..., Any], num_replicas: int, *args: Any, timeout: float = PROCESSES_S
) -> list[Any]:
    """Runs ``function(replica, *args)`` in one process a replica and returns the results."""
    return Replicas(function, num_replicas, *args, timeout=timeout).results()
