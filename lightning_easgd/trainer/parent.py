"""That a process which Lightning's launcher has started as a rank does not outlive the rank that started it.

Lightning ends all when a process that it has started dies. The other way round nobody tells the others until they have
met: one that is still importing, or preparing data, would wait minutes for a rank 0 that is gone.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["announce", "may_leave", "refuse_orphan", "watch"]

# The process id of the rank that starts others: there for these alone, which take it away again.
_NAME = "LIGHTNING_EASGD_PARENT"
_LOOK_S = 1.0

_is_free = threading.Event()  # whether this process has others than its parent to tell it who is alive
_parent: int | None = None


def announce(launcher: Any) -> None:
    """Makes ``launcher.launch`` say to the processes that it starts who their parent is.

    What it then runs in this process, and whatever that starts, does not see it.
    """
    launch = launcher.launch

    def launch_and_say(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            os.environ.pop(_NAME, None)
            return function(*args, **kwargs)

        os.environ[_NAME] = str(os.getpid())
        try:
            return launch(run, *args, **kwargs)
        finally:
            os.environ.pop(_NAME, None)

    launcher.launch = launch_and_say


def watch() -> None:
    """Ends this process soon after its parent, if that is a rank that has started it, until ``may_leave``.

    One that has merely inherited the environment, from whomever, is not watched.
    """
    global _parent
    found = os.environ.pop(_NAME, None)
    if found is None:
        return
    _parent = int(found)
    if os.getppid() == _parent:
        threading.Thread(target=_watch, args=(_parent,), name="lightning_easgd-parent", daemon=True).start()


def refuse_orphan() -> None:
    """Raises ``RuntimeError`` if the rank that has started this process was gone before it could be watched."""
    if _parent is not None and os.getppid() != _parent and not _is_free.is_set() and _is_gone(_parent):
        raise RuntimeError(_words(_parent))


def may_leave() -> None:
    """Says that this process hears of the others' ends in another way from here on. Idempotent."""
    _is_free.set()


def _watch(parent: int) -> None:
    while not _is_free.wait(_LOOK_S):
        if os.getppid() != parent:
            # The main thread may be in a call that lasts: an import, a download, a wait for rank 0's store.
            print(f"[lightning_easgd] {_words(parent)}, so this process is ended", file=sys.stderr, flush=True)
            os._exit(1)


def _words(parent: int) -> str:
    rank = os.environ.get("LOCAL_RANK", "?")
    return f"local rank {rank}: local rank 0, which has started this process (as process {parent}), is gone"


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is somebody else's
        return False
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has gone just now, or there is no such file here
        return False
    return state in ("Z", "X")  # dead, and nobody has asked how it ended
