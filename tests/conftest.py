"""Shared fixtures: process start, thread count, and guards against what a test might leave behind."""

import inspect
import multiprocessing.process
import os
import signal
import subprocess
import threading
from types import CodeType
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Gloo of every test talks over the loopback interface.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
torch.set_num_threads(1)


# --- what starts processes -------------------------------------------------------------------------------------------

_STARTS = {"run_replicas", "Replicas", "Popen", "subprocess", "mp", "multiprocessing"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts processes, and keeps together on one worker what shares them."""
    for item in items:
        assert isinstance(item, pytest.Function)
        fixtures = [f for defs in item._fixtureinfo.name2fixturedefs.values() for f in defs]
        functions = [item.function, *(f.func for f in fixtures), *_parameters(item)]
        if any(_starts_processes(function, set()) for function in functions):
            item.add_marker("processes")
        group_of = getattr(item.module, "xdist_group_of", None)
        if group_of is not None:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))


def _parameters(item: pytest.Function) -> list[Any]:
    return [*item.callspec.params.values()] if hasattr(item, "callspec") else []


def _starts_processes(function: Any, seen: set[Any]) -> bool:
    """Whether a function or class of the tests, or one that it names, names something that starts processes."""
    if isinstance(function, type) and _is_of_a_test(function.__module__):
        return any(_starts_processes(method, seen) for method in vars(function).values())
    function = inspect.unwrap(getattr(function, "func", function))  # of a partial, of a cache
    code = getattr(function, "__code__", None)
    if code is None or code in seen or not _is_of_a_test(function.__module__):
        return False
    seen.add(code)
    names = _names(code)
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    return not _STARTS.isdisjoint(names) or any(_starts_processes(each, seen) for each in named if callable(each))


def _is_of_a_test(module: str) -> bool:
    return module.partition(".")[0] == "tests" and module != __name__


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names}.union(*map(_names, inner))


@pytest.fixture(autouse=True)
def no_unmarked_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts a process and is not marked, so that ``-m "not processes"`` stays a quick suite."""
    if request.node.get_closest_marker("processes") is None:
        for owner, name in ((subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start")):
            monkeypatch.setattr(owner, name, _refuse_to_start)


def _refuse_to_start(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("this test starts a process, but conftest did not see it: mark it with pytest.mark.processes")


# --- what a test may leave behind ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def restore_process_state():
    """Restores environment variables and signal handlers, and fails on what must not outlive a test."""
    environment = dict(os.environ)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    threads = set(threading.enumerate())
    yield
    os.environ.clear()
    os.environ.update(environment)
    for s, handler in handlers.items():
        signal.signal(s, handler)
    assert not dist.is_initialized(), "the test left torch's default process group behind"
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("lightning_easgd-session"):
            thread.join(60)  # a server's ends a moment after its client's close
    left = [t for t in set(threading.enumerate()) - threads if t.is_alive() and t.name.startswith("lightning_easgd")]
    assert not left, f"the test left threads behind: {left}"
