"""One replica's handle on a center in shared memory: the chunks, their locks, and what is done under them."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._ferry import Ferry
from lightning_easgd.communication._flight import Flight
from lightning_easgd.communication._mapping import FREE_LOCK, Layout, Mapping
from lightning_easgd.communication._roll_call import await_all
from lightning_easgd.communication._transport import Completed, OpenCenter, Outstanding, Traffic, TransportError
from lightning_easgd.interfaces import Exchange, Snapshot
from lightning_easgd.rules import CenterRule

__all__ = ["CHUNK_BYTES", "SharedCenter", "await_keys"]

CHUNK_BYTES = 256 << 10  # measured best of 128 KiB to 1 MiB: more do not stay in a cache, less cost more calls
_CPU = torch.device("cpu")
_BEGUN, _COMPLETED = 0, 1  # counters
_MOST_OF_DOT = 1 << 30  # numbers; a device's dot refuses more than 2^31 - 1
_SHORTEST_S, _LONGEST_S = 20e-6, 2e-3  # between two looks at a lock that is taken


class SharedCenter(OpenCenter):
    """One replica's handle on a center in shared memory. Used from one thread, the announcement's slots included.

    Nothing is collective but ``load_state_dict``. Tensors on the CPU are exchanged before a call returns; those on a
    CUDA device go through pinned memory, an ``exchange`` in a thread beside the caller.

    Args:
        path: what ``create`` returned, on this host.
        replica: the replica that the handle belongs to; a replica has one handle at a time.
        num_replicas: as at ``create``.
        num_slots: as at ``create``.
        rule: what the center does with a delta; as at ``create``.
        timeout: the longest wait for a lock, or for the others in ``load_state_dict``.
        device: where the replica's vectors are.
        store: where the replicas meet in ``load_state_dict``, used with the caller's prefix; None where nobody is to
            be met.

    Raises:
        TransportError: the file is not there, differs from the arguments, or the replica has a handle already.
    """

    synchronous = False

    def __init__(
        self,
        path: str,
        *,
        replica: int,
        num_replicas: int,
        num_slots: int,
        rule: CenterRule,
        timeout: timedelta,
        device: torch.device = _CPU,
        store: Store | None = None,
    ) -> None:
        _require_posix()
        who = f"replica {replica} of {num_replicas}"
        try:
            mapping = Mapping(path, replica)
        except FileNotFoundError as error:
            raise TransportError(
                f"{who} does not find the center of replica 0, {path}: SharedMemory needs all replicas on one host, "
                "with one /dev/shm; use ParameterServer() where there are several"
            ) from error
        except BlockingIOError as error:
            raise TransportError(f"{who} has a handle on the center in {path} already, or it was removed") from error
        except OSError as error:
            raise TransportError(f"{who} could not map the center in {path}: {error}") from error
        layout = mapping.layout
        super().__init__(replica=replica, num_replicas=num_replicas, num_slots=num_slots, dtype=layout.dtype)
        given = {"num_replicas": num_replicas, "num_slots": num_slots, "num_vectors": rule.num_vectors}
        for name, mine in given.items():
            theirs = getattr(layout, name)
            if mine != theirs:
                mapping.close()
                raise TransportError(f"{who}: {name} is {mine} here and {theirs} in the center's file")
        self._mapping = mapping
        self._rule, self._timeout, self._device, self._store = rule, timeout, device, store
        self._clock = int(mapping.counters[_COMPLETED])
        # For each chunk the center's part, then those of the rule's vectors.
        self._parts = list(zip(*(_chunks(vector, layout.chunk) for vector in mapping.vectors), strict=True))
        first = replica * len(self._parts) // num_replicas
        self._order = [*range(first, len(self._parts)), *range(first)]
        self._snapshot: Tensor | None = None  # the private copy, on the CPU
        self._value: Tensor | None = None  # the private copy; where the replica is on the CPU, the same tensor
        self._lazy_ferry: Ferry | None = None  # of a replica on a device, from its first addition on
        self._flight: Flight | None = None
        self._num_loads = 0
        self._is_closing = False

    @classmethod
    def create(
        cls,
        initial: Tensor,
        *,
        num_replicas: int,
        num_slots: int,
        rule: CenterRule,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> str:
        """Creates the file of a center and returns the path to open it by. Neither collective nor blocking.

        It is kept for the first handle of this process, which takes it over: without a handle it goes when the process
        ends. What killed processes of the same user left behind is removed.

        Args:
            initial: (d,) float32 or float64, the center's value; copied.
            num_replicas: how many replicas will share it.
            num_slots: numbers that each of them announces.
            rule: tells how many vectors are needed.
            chunk_bytes: bytes of a vector under one lock.

        Raises:
            TransportError: there is no room for it.
        """
        _require_posix()
        itemsize = initial.element_size()
        chunk = max(1, chunk_bytes // itemsize)
        try:
            return Mapping.create(
                Layout(initial.numel(), itemsize, num_replicas, num_slots, rule.num_vectors, chunk), initial
            )
        except OSError as error:
            raise TransportError(f"SharedMemory could not create its file: {error}") from error

    def check_like(self, initial: Tensor) -> None:
        """Raises ``TransportError`` unless the center has the size and dtype of ``initial``."""
        layout = self._mapping.layout
        if (initial.numel(), initial.dtype) != (layout.numel, layout.dtype):
            raise TransportError(
                f"replica {self.replica} has {initial.numel()} numbers of {initial.dtype}, the center {layout.numel} "
                f"of {layout.dtype}"
            )

    @property
    def value(self) -> Tensor:
        """(d,) the private copy: the center as of the last pull, the first one being made here if need be."""
        if self._value is None:
            self.pull()
        assert self._value is not None
        return self._value

    @property
    def clock(self) -> int:
        """The additions that were completed when the last operation of this replica saw the center."""
        return self._clock

    def pull(self) -> Snapshot:
        """Copies the center chunk by chunk, each as it is between two additions; see ``OpenCenter.pull``."""
        self._begin_operation()
        began = time.perf_counter()
        snapshot, value = self._private()
        parts = _chunks(snapshot, self._mapping.layout.chunk)
        with self._locked("pull", shared=True):
            clock = self._clock = int(self._mapping.counters[_COMPLETED])
            self._read_slots()
        self._visit("pull", lambda i: parts[i].copy_(self._parts[i][0]), shared=True)
        if value is not snapshot:
            value.copy_(snapshot)
        self.traffic.exposed_s += time.perf_counter() - began
        return Snapshot(value, clock)

    def new_vector(self) -> Tensor:
        layout = self._mapping.layout
        return torch.empty(layout.numel, dtype=layout.dtype, device=self._device)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds ``delta`` before it returns; see ``OpenCenter.push``."""
        self._begin_operation()
        began = time.perf_counter()
        self._refuse_nonfinite(delta)
        if delta.is_cuda:
            delta = self._ferry.host.copy_(delta)
        with self._locked("push"):
            self._write_slots()
            weight = self._begin_addition(read_at)
        chunk = self._mapping.layout.chunk
        deltas = _chunks(delta, chunk)
        read = None if self._snapshot is None or not self.measures_drift else _chunks(self._snapshot, chunk)
        square = 0.0

        def add(i: int) -> None:
            nonlocal square
            center, *memory = self._parts[i]
            if read is not None:
                square += float(torch.linalg.vector_norm(center - read[i], dtype=torch.float64)) ** 2
            self._rule.apply_(center, deltas[i], *memory, alpha=weight)

        self._add("push", add)
        self.traffic.drift = square**0.5
        self.traffic.exposed_s += time.perf_counter() - began

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """Reads the center and adds to it in one pass, chunk by chunk. See ``Center.exchange``; raises like ``push``.

        Blocks for the pass if ``x`` is on the CPU; else it goes on in a thread, and what that raises comes with
        ``wait`` or the next operation. ``x`` is looked through before anything is added.
        """
        self._begin_operation()
        began = time.perf_counter()
        is_huge = self._look_through(x)
        with self._locked("exchange"):
            self._write_slots()
            self._read_slots()
            factor = scale * self._begin_addition(int(self._mapping.counters[_COMPLETED]))
        self.traffic.drift = 0.0
        if x.is_cuda:
            flight = self._flight = self._ferry.carry(x, lambda host: self._exchange(host, delta, factor, is_huge))
            self.traffic.exposed_s += time.perf_counter() - began
            return Outstanding(x, complete=lambda: self._complete(flight))
        self._exchange(x, delta, factor, is_huge)
        self.traffic.exposed_s += time.perf_counter() - began
        return Completed(x)

    def _look_through(self, x: Tensor) -> bool:
        """Refuses ``x`` if a number is not finite; returns whether one is so large that a difference may not be."""
        # The cheapest look at all numbers there is; beyond the square root of the largest number it overflows.
        if all(math.isfinite(float(torch.dot(part, part))) for part in torch.split(x, _MOST_OF_DOT)):
            return False
        self._refuse_nonfinite(x)
        return True

    def _exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], factor: float, is_huge: bool) -> None:
        parts = _chunks(x, self._mapping.layout.chunk)

        def move(i: int) -> None:
            center, *memory = self._parts[i]
            delta(parts[i], center)
            if is_huge:
                self._refuse_nonfinite(parts[i])  # chunk by chunk: the others' may have been added
            self._rule.apply_(center, parts[i], *memory, alpha=factor)

        self._add("exchange", move)

    def abstain(self) -> None:
        """Writes this replica's slots; see ``OpenCenter.abstain``."""
        self._begin_operation()
        with self._locked("abstention"):
            self._write_slots()

    # --- under locks ------------------------------------------------------------------------------------------------

    def _write_slots(self) -> None:
        self._mapping.board[self.replica].copy_(self.announcement)

    def _read_slots(self) -> None:
        self.announced.copy_(self._mapping.board.sum(dim=0))

    def _begin_addition(self, read_at: int) -> float:
        """Counts an addition and returns its weight: no other can come between the two."""
        counters = self._mapping.counters
        self.traffic.staleness = int(counters[_BEGUN]) - read_at
        weight = self._rule.weight(self.traffic.staleness)
        counters[_BEGUN] += 1
        return weight

    def _add(self, operation: str, add: Callable[[int], None]) -> None:
        """Calls ``add`` for each chunk under its lock and counts the addition as completed."""
        counters = self._mapping.counters
        try:
            self._visit(operation, add)
        except BaseException:
            with self._locked(operation):
                counters[_BEGUN] -= 1
            raise
        with self._locked(operation):
            counters[_COMPLETED] += 1
            self._clock = int(counters[_COMPLETED])
        self.traffic.exchanges += 1

    def _visit(
        self,
        operation: str,
        visit: Callable[[int], object],
        *,
        chunks: list[int] | None = None,
        shared: bool = False,
    ) -> None:
        """Calls ``visit`` once for each chunk, or each of ``chunks``, under its lock, a free one first."""
        mapping, patience = self._mapping, _Patience(self, operation)
        pending = deque(self._order if chunks is None else chunks)
        refused = 0
        while pending:
            chunk = pending.popleft()
            lock = mapping.lock_of(chunk)
            if not mapping.try_lock(lock, shared=shared):
                pending.append(chunk)
                refused += 1
                if refused >= len(pending):
                    patience.pause()
                continue
            try:
                visit(chunk)
            finally:
                mapping.unlock(lock)
            if refused:
                refused = 0
                patience.renew()

    @contextmanager
    def _locked(self, operation: str, *, shared: bool = False) -> Iterator[None]:
        """Holds the lock on the counters and the slots."""
        mapping, patience = self._mapping, _Patience(self, operation)
        while not mapping.try_lock(FREE_LOCK, shared=shared):
            patience.pause()
        try:
            yield
        finally:
            mapping.unlock(FREE_LOCK)

    # --- what is the replica's own ----------------------------------------------------------------------------------

    def _begin_operation(self) -> None:
        if not self._mapping.is_open:
            raise TransportError(f"replica {self.replica}: the center in shared memory is closed")
        self.drain()

    def _private(self) -> tuple[Tensor, Tensor]:
        """Returns the private copy on the CPU and the one on the replica's device; allocated at first use."""
        if self._snapshot is None or self._value is None:
            layout = self._mapping.layout
            pinned = self._device.type == "cuda"
            self._snapshot = torch.empty(layout.numel, dtype=layout.dtype, pin_memory=pinned)
            self._value = torch.empty_like(self._snapshot, device=self._device) if pinned else self._snapshot
        return self._snapshot, self._value

    @property
    def _ferry(self) -> Ferry:
        if self._lazy_ferry is None:
            self._lazy_ferry = Ferry(self._mapping.vectors[0], self._device)
        return self._lazy_ferry

    def lost(self) -> list[int]:
        """Returns the replicas that gave their locks back without ``close``; see ``OpenCenter.lost``."""
        return self._mapping.lost() if self._mapping.is_open else []

    def drain(self, timeout: timedelta | None = None) -> None:
        """Completes an exchange that a device is waiting for, if there is one; see ``OpenCenter.drain``."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        if not flight.finish(self._timeout if timeout is None else timeout, self.traffic):
            raise TransportError(f"replica {self.replica} of {self.num_replicas}: its exchange did not end")
        flight.check()

    def _complete(self, flight: Flight) -> None:
        if self._flight is flight:
            self.drain()
        else:  # another operation has completed it, or raised what it raised
            flight.check()

    def state_dict(self) -> dict[str, Any]:
        """Returns clock, the rule's state and vectors, and this replica's traffic; see ``OpenCenter.state_dict``."""
        self._begin_operation()
        return {
            "clock": self._clock,
            "rule": self._rule.state_dict(),
            "memory": [vector.clone() for vector in self._mapping.vectors[1:]],
            "traffic": vars(self.traffic).copy(),
        }

    def load_state_dict(self, state: dict[str, Any], value: Tensor) -> None:
        """Restores the center; see ``OpenCenter.load_state_dict``. What replica 0 is given counts.

        Raises:
            TransportError: not all replicas came in time.
        """
        self._begin_operation()
        self._rule.load_state_dict(state["rule"])
        self.traffic = Traffic(**state["traffic"])
        self._meet("before")  # nobody adds any more
        if self.replica == 0 or self._store is None:
            self.overwrite(value, state["memory"], int(state["clock"]))
        self._meet("after")
        self._num_loads += 1
        self.pull()

    def overwrite(self, value: Tensor, memory: list[Tensor], clock: int) -> None:
        """Replaces the whole center. Not collective, does not wait; no handle may be in use meanwhile.

        Args:
            value: (d,) the center.
            memory: the rule's vectors, each (d,).
            clock: additions that ``value`` contains.
        """
        for vector, saved in zip(self._mapping.vectors, [value, *memory], strict=True):
            vector.copy_(saved)
        self._mapping.counters.fill_(clock)

    def _meet(self, where: str) -> None:
        if self._store is None:
            return
        keys = [f"loaded/{self._num_loads}/{where}/{r}" for r in range(self.num_replicas)]
        self._store.set(keys[self.replica], "")
        await_keys(
            self._store,
            keys,
            self._timeout,
            f"replica {self.replica} of {self.num_replicas} could not restore the center in shared memory: not all "
            "replicas came",
        )

    def close(self) -> None:
        """Leaves the center without waiting for peers; the last one to do so removes its file. Idempotent."""
        self._release()
        self._mapping.close()

    def abandon(self) -> None:
        """Ends as if the process had been killed: locks are given back, and others find the replica ``lost``."""
        self._release()
        self._mapping.abandon()

    def _release(self) -> None:
        self._is_closing = True
        if self._lazy_ferry is not None:
            self._lazy_ferry.close()
        self._lazy_ferry = self._flight = None
        self._parts, self._order = [], []
        self._snapshot = self._value = None


class _Patience:
    """Waits for a lock: ever longer between two looks, in all at most the center's timeout."""

    def __init__(self, center: SharedCenter, operation: str) -> None:
        self._center, self._operation = center, operation
        self.renew()

    def renew(self) -> None:
        """Begins anew, after the lock was there."""
        self._waited_s, self._next_s = 0.0, _SHORTEST_S

    def pause(self) -> None:
        """Sleeps a little; raises ``TransportError`` when the timeout has run out."""
        center = self._center
        if self._waited_s > center._timeout.total_seconds() or center._is_closing:
            raise TransportError(
                f"replica {center.replica} of {center.num_replicas}: its {self._operation} waited {self._waited_s:.1f} "
                "s for a lock on the center in shared memory, which another replica holds without moving on; what was "
                "added before stays"
            )
        began = time.perf_counter()
        time.sleep(self._next_s)
        took_s = time.perf_counter() - began
        self._waited_s += took_s
        center.traffic.wait_s += took_s
        self._next_s = min(2 * self._next_s, _LONGEST_S)


def _chunks(vector: Tensor, size: int) -> list[Tensor]:
    return [vector[i : i + size] for i in range(0, vector.numel(), size)]


def await_keys(store: Store, keys: list[str], timeout: timedelta, failure: str) -> None:
    """Waits for keys of a store. ``TransportError``, which begins with ``failure``, if one is not set in time."""
    if missing := await_all(store, keys, timeout):
        raise TransportError(
            f"{failure} within {timeout.total_seconds():.0f} s (no {[keys[place] for place in missing]})"
        )


def _require_posix() -> None:
    if sys.platform == "win32":
        raise TransportError("SharedMemory needs POSIX file locks, which Windows does not have; use ParameterServer()")
