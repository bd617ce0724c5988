"""Shared fixtures: process start, thread count, and guards against what a test might leave behind."""

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

# Gloo of every test talks over the loopback interface.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
torch.set_num_threads(1)


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
