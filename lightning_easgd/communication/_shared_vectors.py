"""Vectors of the replicas of one host in memory that all of them map, so that a sum needs no message.

Each replica keeps its center and its delta there, and every replica adds up one *part* of them all: it reads what the
others have written, and writes the new center's part over its own delta's; from there the others copy it. That is a
reduce-scatter and an all-gather without a wire, half the passes over memory that sockets cost.

The memory has no name, and goes with the last process that maps it, however that ends. Each mapping takes a descriptor,
which Python keeps with it: one for each replica and center, about as many as the sockets of a Gloo group.
"""

import json
import logging
import math
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._roll_call import gather
from lightning_easgd.communication._wire import blocks
from lightning_easgd.rules import CenterRule

__all__ = ["SharedVectors"]

log = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
_TOKEN = 16  # bytes by which a replica knows that it has mapped what it was told of
# Of another's memory so much is mapped at a time: what a process has mapped counts as its own.
_WINDOW_BYTES = 4 << 20


class SharedVectors:
    """Two vectors of this replica, and those of the others on the same host.

    Args:
        numel: d, > 0.
        dtype: of the vectors.
        replica: this one.
        files: of all replicas in their order, each a descriptor of ``_size(numel, dtype)`` bytes; the caller
            closes them.

    Attributes:
        own: this replica's two vectors, (d,) each. They begin as zeros.
        factors: of each replica, (1,) float64: what its delta is multiplied by; NaN where it adds nothing. A replica
            writes its own before the others are told that its delta is there.
    """

    def __init__(self, numel: int, dtype: torch.dtype, replica: int, files: Sequence[int]) -> None:
        size = _size(numel, dtype)
        self._maps = [mmap.mmap(file, size) for file in files]
        self._replica = replica
        stride = _stride(numel, dtype)
        self._starts = (_PAGE, _PAGE + stride)
        self._vectors = [
            [torch.frombuffer(m, dtype=dtype, count=numel, offset=start) for start in self._starts] for m in self._maps
        ]
        self.own = self._vectors[replica]
        self.factors = [torch.frombuffer(m, dtype=torch.float64, count=1, offset=_TOKEN) for m in self._maps]
        self._itemsize = dtype.itemsize
        self._scratch = torch.empty(0, dtype=dtype)
        # Whole pages, since pages are what is given back.
        page = _PAGE // dtype.itemsize
        share = -(-numel // (len(files) * page)) * page
        self._parts = [(min(r * share, numel), min((r + 1) * share, numel)) for r in range(len(files))]

    @classmethod
    def open(
        cls, like: Tensor, store: Store, replica: int, num_replicas: int, timeout: timedelta
    ) -> "SharedVectors | None":
        """Returns the vectors, or None in every replica if they cannot all map each other's. Collective, blocking.

        They cannot on several hosts (or in several network or process namespaces of one), on a system without
        ``memfd_create`` and ``/proc``, and where there is no room.

        Args:
            like: (d,) on the CPU: size and dtype.
            store: where they tell each other, used with the caller's prefix.
            replica: this one.
            num_replicas: how many there are.
            timeout: the longest wait.

        Raises:
            TransportError: not all replicas came in time; names those that are missing.
            RuntimeError: one has other vectors; in every replica.
        """
        token, own, files, vectors, why_not = secrets.token_bytes(_TOKEN), -1, [], None, ""
        try:
            try:
                own = _new_file(_size(like.numel(), like.dtype), token)
            except OSError as error:
                why_not = str(error) or repr(error)  # never empty: that is consent
            place = {"host": _host(), "pid": os.getpid(), "file": own, "token": token.hex()}
            shape = f"{like.numel()} numbers of {like.dtype}"
            told = _tell_all(store, "memory", [place, shape], replica, num_replicas, timeout)
            if any(other != shape for _, other in told):
                raise RuntimeError(f"the replicas have different vectors: {', '.join(other for _, other in told)}")
            places = [peer for peer, _ in told]
            if not place["host"] or any(peer["host"] != place["host"] for peer in places):
                why_not = "they are on several hosts, or cannot see each other's processes"
            elif all(peer["file"] >= 0 for peer in places):
                try:
                    for peer in places:
                        files.append(_open_file(peer["pid"], peer["file"], peer["token"]))
                    vectors = cls(like.numel(), like.dtype, replica, files)
                except OSError as error:
                    why_not = str(error) or repr(error)  # never empty: that is consent
            # After that nobody needs another's descriptor any more.
            reasons = _tell_all(store, "mapped", why_not, replica, num_replicas, timeout)
        finally:
            for file in (*files, own):
                if file >= 0:
                    os.close(file)
        if not any(reasons):
            return vectors
        if replica == 0:
            log.info("the replicas sum through sockets, not through shared memory: %s", next(filter(None, reasons)))
        return None

    def index_of(self, vector: Tensor) -> int:
        """Returns which of ``own`` a vector is."""
        return next(i for i, own in enumerate(self.own) if own.data_ptr() == vector.data_ptr())

    def reduce(self, index: int, old: Tensor, rule: CenterRule | None) -> None:
        """Adds up this replica's part of all deltas, and writes what becomes of it over its own delta's.

        At least one replica has added something. The others may read, but not write, meanwhile; nobody reads this
        replica's part.

        Args:
            index: which of their vectors the deltas are in; the same in all replicas.
            old: (d,) the center.
            rule: makes the new center of it; None leaves the sum itself.
        """
        start, stop = self._parts[self._replica]
        added = [r for r, factor in enumerate(self.factors) if not math.isnan(factor)]
        factors = [float(self.factors[r]) for r in added]
        deltas = [self._vectors[r][index] for r in added]
        for window in self._windows(start, stop):
            for new, before, *parts in blocks(*(v[slice(*window)] for v in (self.own[index], old, *deltas))):
                if self._scratch.numel() < new.numel():
                    self._scratch = torch.empty_like(new)
                part = _weighted_sum(parts, factors, out=self._scratch[: new.numel()])
                if rule is None:
                    new.copy_(part)
                else:
                    rule.applied(before, part, new)
            for other in self._others():
                self._unmap(other, index, window)

    def gather(self, index: int) -> None:
        """Copies the parts that the others have made. Nobody may write to them meanwhile."""
        own = self.own[index]
        for other in self._others():
            for window in self._windows(*self._parts[other]):
                for target, part in blocks(own[slice(*window)], self._vectors[other][index][slice(*window)]):
                    target.copy_(part)
                self._unmap(other, index, window)

    def _others(self) -> Iterator[int]:
        return (r for r in range(len(self._maps)) if r != self._replica)

    def _windows(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        window = _WINDOW_BYTES // self._itemsize
        return ((first, min(first + window, stop)) for first in range(start, stop, window))

    def _unmap(self, replica: int, index: int, window: tuple[int, int]) -> None:
        """Gives back the page table's entries, not the memory: a later reading finds it again."""
        first = self._starts[index] + window[0] * self._itemsize
        last = self._starts[index] + window[1] * self._itemsize
        with suppress(OSError):  # under mlockall it may not: then the memory counts here as well, and nothing else
            self._maps[replica].madvise(mmap.MADV_DONTNEED, first, last - first)


def _weighted_sum(vectors: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> Tensor:
    """Returns ``out``, with the sum in it."""
    if factors[0] == 1 and len(vectors) > 1:  # as after a push, and a pass less
        torch.add(vectors[0], vectors[1], alpha=factors[1], out=out)
        first = 2
    else:
        torch.mul(vectors[0], factors[0], out=out)
        first = 1
    for vector, factor in zip(vectors[first:], factors[first:], strict=True):
        out.add_(vector, alpha=factor)
    return out


def _tell_all(store: Store, what: str, value: Any, replica: int, num_replicas: int, timeout: timedelta) -> list[Any]:
    """Returns what all replicas say, as soon as all have."""
    purpose = "agree on memory to sum through"
    own = json.dumps(value)
    told = gather(store, what, own, replica=replica, num_replicas=num_replicas, timeout=timeout, purpose=purpose)
    return [json.loads(text) for text in told]


def _stride(numel: int, dtype: torch.dtype) -> int:
    return -(-numel * dtype.itemsize // _PAGE) * _PAGE


def _size(numel: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a replica's memory: a page for token and factor, then the vectors."""
    return _PAGE + 2 * _stride(numel, dtype)


def _host() -> str:
    """Returns what is equal where one process can see another's descriptors, and no network is between them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))])
    except OSError:
        return ""


def _new_file(size: int, token: bytes) -> int:
    """Returns a descriptor of new memory that begins with ``token``. ``OSError`` if there is no room."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    file = os.memfd_create("lightning_easgd")
    try:
        # Reserved now: writing to a page for which there is no room later would be a SIGBUS.
        os.posix_fallocate(file, 0, size)
        os.pwrite(file, token, 0)
    except OSError:
        os.close(file)
        raise
    return file


def _open_file(pid: int, file: int, token: str) -> int:
    """Returns a descriptor of another process's memory. ``OSError`` if it may not be had."""
    opened = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if os.pread(opened, _TOKEN, 0).hex() != token:
            raise OSError("it is not what the process has told of")
    except OSError:
        os.close(opened)
        raise
    return opened
