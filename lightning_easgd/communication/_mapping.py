"""A center's file: vectors, counters and slots that processes of one host map, and the locks that go with them.

The file lies in its own folder. Every handle keeps a shared ``flock`` on that folder; a folder that can be locked
exclusively belongs to no process. The last handle that closes removes it, or the process that creates the next center.
All locks are the kernel's, which releases the locks of a process that dies.
"""

import mmap
import os
import shutil
import sys
import tempfile
import weakref
from contextlib import ExitStack, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

if sys.platform != "win32":
    import fcntl

__all__ = ["FREE_LOCK", "Layout", "Mapping"]

_PREFIX = "lightning_easgd"
_PAGE = 4096
_MARGIN = 16 << 20  # what is left of a tmpfs for others, bytes
_STRIPES = 16
FREE_LOCK = _STRIPES  # index of the lock that no chunk uses: counters and slots
_NEVER_CAME, _ATTACHED, _LEFT = 0, 1, 2


def _folders() -> list[Path]:
    """Returns where a center may lie, best first: in memory, or where there is no room for it there, on disk."""
    return [Path("/dev/shm"), Path(tempfile.gettempdir())]


@dataclass(frozen=True)
class Layout:
    """What a center's file holds.

    Attributes:
        numel: numbers of a vector.
        itemsize: bytes of such a number, 4 or 8.
        num_replicas: how many replicas share it.
        num_slots: numbers that each replica announces.
        num_vectors: vectors that the rule remembers, beside the center itself.
        chunk: numbers that are read or added to under one lock, >= 1.
    """

    numel: int
    itemsize: int
    num_replicas: int
    num_slots: int
    num_vectors: int
    chunk: int

    @property
    def dtype(self) -> torch.dtype:
        """The vectors' dtype."""
        return torch.float32 if self.itemsize == 4 else torch.float64

    @property
    def stride(self) -> int:
        """Bytes from one vector to the next."""
        return _whole_pages(self.numel * self.itemsize)

    @property
    def start(self) -> int:
        """Bytes before the first vector: layout, counters, the fate of each replica, slots."""
        return _whole_pages(8 * (len(astuple(self)) + 2 + self.num_replicas * (1 + self.num_slots)))

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.start + (1 + self.num_vectors) * self.stride


_NUM_FIELDS = 6


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


class Mapping:
    """One replica's handle on a center's file. Use from one thread at a time.

    Locks 0 to ``FREE_LOCK`` exclude other handles, also those of the same process. Chunks share the others in turn.

    Args:
        path: what ``create`` returned.
        replica: the replica that the handle belongs to; a replica has one handle at a time.

    Attributes:
        layout: what the file holds.
        vectors: the center, then the rule's vectors, each (numel,).
        counters: (2,) int64, additions that were begun, and that were completed.
        board: (num_replicas, num_slots) float64, each replica's last announced slots.
        is_open: whether it may be used; False after ``close``, and in a child that was forked since.

    Raises:
        OSError: the file is not there (``FileNotFoundError``), or ``replica`` has a handle already
            (``BlockingIOError``).
    """

    def __init__(self, path: str, replica: int) -> None:
        self._folder = Path(path)
        with ExitStack() as undo:
            # The first handle in the process that created the folder takes over the hold on it.
            self._hold = _unclaimed.pop(path) if path in _unclaimed else _hold(self._folder)
            undo.callback(os.close, self._hold)
            self._fds: list[int] = []
            for name in (*(f"lock-{k}" for k in range(_STRIPES + 1)), f"replica-{replica}"):
                self._fds.append(os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600))
                undo.callback(os.close, self._fds[-1])
            fcntl.flock(self._fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(self._folder / "center", "r+b") as file:
                buffer = mmap.mmap(file.fileno(), 0)
            undo.pop_all()
        self.layout = layout = Layout(*_view(buffer, torch.int64, 0, _NUM_FIELDS).tolist())
        offset = 8 * _NUM_FIELDS
        self.counters = _view(buffer, torch.int64, offset, 2)
        self._fate = _view(buffer, torch.int64, offset + 16, layout.num_replicas)
        slots = _view(
            buffer, torch.float64, offset + 16 + 8 * layout.num_replicas, layout.num_replicas * layout.num_slots
        )
        self.board = slots.view(layout.num_replicas, layout.num_slots)
        self.vectors = [
            _view(buffer, layout.dtype, layout.start + i * layout.stride, layout.numel)
            for i in range(1 + layout.num_vectors)
        ]
        self._replica = replica
        self._fate[replica] = _ATTACHED
        self.is_open = True
        _open.add(self)

    @classmethod
    def create(cls, layout: Layout, initial: Tensor) -> str:
        """Creates a file whose center is ``initial`` and returns its folder; everything else in it is zero.

        It is kept for the first handle of this process; without one, until the process ends. What was left by
        processes of the same user that were killed is removed.

        Raises:
            OSError: there is no room for it.
        """
        reasons = []
        for parent in _folders():
            _remove_abandoned(parent)
            try:
                folder, hold = _new_folder(parent, layout.num_bytes)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror or error}")
                continue
            with open(folder / "center", "r+b") as file:
                buffer = mmap.mmap(file.fileno(), 0)
            _view(buffer, torch.int64, 0, _NUM_FIELDS).copy_(torch.tensor(astuple(layout)))
            _view(buffer, layout.dtype, layout.start, layout.numel).copy_(initial)
            _unclaimed[str(folder)] = hold
            return str(folder)
        raise OSError(f"no room for a center of {layout.num_bytes} bytes ({'; '.join(reasons)})")

    def try_lock(self, index: int, *, shared: bool) -> bool:
        """Takes a lock if it is free, and returns whether it did. Does not wait."""
        try:
            fcntl.flock(self._fds[index], (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self, index: int) -> None:
        """Gives a lock back."""
        fcntl.flock(self._fds[index], fcntl.LOCK_UN)

    def lock_of(self, chunk: int) -> int:
        """Returns the index of the lock that protects a chunk."""
        return chunk % _STRIPES

    def lost(self) -> list[int]:
        """Returns the replicas that had a handle and ended without closing it. Does not wait."""
        attached = [r for r, fate in enumerate(self._fate.tolist()) if fate == _ATTACHED and r != self._replica]
        return [r for r in attached if self._is_abandoned(r)]

    def _is_abandoned(self, replica: int) -> bool:
        fd = os.open(self._folder / f"replica-{replica}", os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return int(self._fate[replica]) == _ATTACHED  # it may have left since

    def close(self) -> None:
        """Leaves; the last one removes the folder. Does not wait. Idempotent."""
        if not self.is_open:
            return
        self._fate[self._replica] = _LEFT
        hold = self._forsake()
        _remove_if_abandoned(self._folder, hold)
        os.close(hold)

    def abandon(self) -> None:
        """Gives all locks back without leaving, as the kernel does for a process that is killed."""
        if self.is_open:
            os.close(self._forsake())

    def _forsake(self) -> int:
        """Closes everything but the hold on the folder, which it returns."""
        self.is_open = False
        _open.discard(self)
        for fd in self._fds:
            os.close(fd)
        empty = torch.empty(0)
        self.counters = self._fate = self.board = empty
        self.vectors = []
        return self._hold


_open: "weakref.WeakSet[Mapping]" = weakref.WeakSet()
_unclaimed: dict[str, int] = {}  # folders created in this process that no handle has taken over, and the holds on them


def _close_in_child() -> None:
    # A lock is released when the last copy of its descriptor is closed: a loader's worker, forked from a replica that
    # is then killed, must not keep the replica's locks.
    for mapping in list(_open):
        os.close(mapping._forsake())
    while _unclaimed:
        os.close(_unclaimed.popitem()[1])


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_in_child)


def _view(buffer: mmap.mmap, dtype: torch.dtype, offset: int, numel: int) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype, count=numel, offset=offset) if numel else torch.empty(0, dtype=dtype)


def _hold(folder: Path) -> int:
    """Returns a descriptor of the folder with a shared lock on it: while it is open, nobody removes the folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.stat(folder)):
            raise FileNotFoundError(folder)
    except OSError:
        os.close(fd)
        raise
    return fd


def _new_folder(parent: Path, num_bytes: int) -> tuple[Path, int]:
    """Returns a folder with an empty center file of that size, and the hold on it."""
    room = os.statvfs(parent)
    if room.f_bavail * room.f_frsize < num_bytes + _MARGIN:
        raise OSError(f"{room.f_bavail * room.f_frsize} bytes are free")
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.geteuid()}-", dir=parent))
        try:
            hold = _hold(folder)
            break
        except (FileNotFoundError, BlockingIOError):
            continue  # another process took it for abandoned and removed it
    try:
        with open(folder / "center", "w+b") as file:
            # Reserved now: on a tmpfs that is full, writing to a page that is not there yet would be a SIGBUS.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)
    except OSError:
        shutil.rmtree(folder)
        os.close(hold)
        raise
    return folder, hold


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}-{os.geteuid()}-*"):
        with suppress(FileNotFoundError, PermissionError):  # removed meanwhile, or another user's under such a name
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    _remove_if_abandoned(folder, fd)
            finally:
                os.close(fd)


def _remove_if_abandoned(folder: Path, fd: int) -> None:
    """Removes the folder unless another handle holds it; ``fd`` is open on it, and any hold of its own is given up."""
    # Released first: of two that close at once each would else meet the other's hold, and none would remove it.
    fcntl.flock(fd, fcntl.LOCK_UN)
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
