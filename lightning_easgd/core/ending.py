"""Makes sure that a process that has ended well has exit code 0.

A thread of torch's Gloo groups that finishes an operation asks for Python's lock. If the interpreter is already
shutting down, Python ends the thread in a place where C++ does not allow that. C++ then ends the whole process:
"terminate called without an active exception". This module therefore ends all groups, and waits for their threads,
while the interpreter still runs.
"""

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_easgd.communication._c10d import close_groups, set_timeout

__all__ = ["end_at_exit", "end_groups", "own_default_group"]

log = logging.getLogger(__name__)

# How long to wait for an operation that a lost peer never answers.
_LONGEST_S = 10.0

# torch's default group, if it was made within ``own_default_group``. A script that ends it also ends its
# store; the next default group begins there.
_default_group: "weakref.ref[Any] | None" = None
_at_exit_of: "tuple[int, _Ending] | None" = None  # a process, and what it has to tell when it exits


@contextmanager
def own_default_group(timeout: timedelta) -> Iterator[None]:
    """Ends the default group of ``torch.distributed`` that is made in this context when this process exits.

    A default group that existed before, or that the user makes later, is not touched.

    Args:
        timeout: for the group's operations and its store, once all ranks have come.
    """
    global _default_group
    had_one = dist.is_initialized()
    yield
    end_at_exit()
    if had_one or not dist.is_initialized():
        return
    group: Any = dist.group.WORLD
    _default_group = weakref.ref(group)
    set_timeout(timeout, group)
    distributed_c10d._get_default_store().set_timeout(timeout)


def end_groups() -> None:
    """Ends all groups that this package made. Not collective; waits for their threads, ten seconds at most."""
    ending = _Ending()
    ending.finish()


class _Ending:
    """A thread that ends all groups as soon as it is told to.

    The thread is started long before that, because Python 3.12 starts no threads while a process exits.
    """

    def __init__(self) -> None:
        self._is_wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightning_easgd-ending", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        self._is_wanted.set()
        self._thread.join(_LONGEST_S)
        if self._thread.is_alive():
            log.warning("the process groups could not be ended within %.0f s", _LONGEST_S)

    def _run(self) -> None:
        self._is_wanted.wait()
        _end_groups()


def _end_groups() -> None:
    global _default_group
    group = None if _default_group is None else _default_group()
    _default_group = None
    close_groups()
    if group is not None and dist.is_initialized() and dist.group.WORLD is group:
        del group  # the last reference but torch's own
        dist.destroy_process_group()


def end_at_exit() -> None:
    """Ends all groups that this package made when this process exits. Idempotent; local."""
    # A forked process starts without groups, but with its parent's functions to call at exit.
    global _at_exit_of
    if _at_exit_of is None:
        atexit.register(_at_exit)
    if _at_exit_of is None or _at_exit_of[0] != os.getpid():
        _at_exit_of = os.getpid(), _Ending()


def _at_exit() -> None:
    if _at_exit_of is not None and _at_exit_of[0] == os.getpid():
        _at_exit_of[1].finish()
