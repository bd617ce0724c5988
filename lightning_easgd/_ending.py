"""That a process which has ended well ends with exit code 0.

A thread of torch's Gloo groups that finishes an operation asks for Python's lock. If the interpreter is being taken
down by then, the thread is ended in a place where C++ does not allow it, and with it the process: "terminate called
without an active exception". So all groups are ended, and their threads waited for, while the interpreter still runs.
"""

import atexit
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_easgd.communication._c10d import close_groups

__all__ = ["end_groups", "own_default_group"]

log = logging.getLogger(__name__)

# An operation that a lost peer never answers is given up after so long.
_LONGEST_S = 10.0

_default_group: Any = None  # torch's, if it was made within ``own_default_group``
_registered_pid: int | None = None


@contextmanager
def own_default_group(timeout: timedelta) -> Iterator[None]:
    """Sees that the default group of ``torch.distributed`` that is made within is ended when this process exits.

    One that was there before, or that the user makes later, is not touched.

    Args:
        timeout: of its operations, and of its store, once all have come.
    """
    global _default_group
    had_one = dist.is_initialized()
    yield
    _end_at_exit()
    if had_one or not dist.is_initialized():
        return
    _default_group = dist.group.WORLD
    distributed_c10d._set_pg_timeout(timeout, _default_group)
    distributed_c10d._get_default_store().set_timeout(timeout)


def end_groups() -> None:
    """Ends all groups that are this package's. Not collective; waits for their threads, ten seconds at most."""
    thread = threading.Thread(target=_end_groups, name="lightning_easgd-ending", daemon=True)
    thread.start()
    thread.join(_LONGEST_S)
    if thread.is_alive():
        log.warning("the process groups could not be ended within %.0f s", _LONGEST_S)


def _end_groups() -> None:
    global _default_group
    group, _default_group = _default_group, None
    close_groups()
    if group is not None and dist.is_initialized() and dist.group.WORLD is group:
        del group  # the last reference but torch's own
        dist.destroy_process_group()


def _end_at_exit() -> None:
    # A process that was forked starts with no groups of its own, and with its parent's functions to call at exit.
    global _registered_pid
    if _registered_pid is None:
        atexit.register(_at_exit)
    _registered_pid = os.getpid()


def _at_exit() -> None:
    if _registered_pid == os.getpid():
        end_groups()
