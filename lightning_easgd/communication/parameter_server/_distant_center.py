"""The center in a replica on another host than a server's: sessions, and a thread beside the caller that uses them."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication._flight import Flight
from lightning_easgd.communication._line import new_stream
from lightning_easgd.communication._session import FAREWELL, SessionServer, Terms
from lightning_easgd.communication._transport import OpenCenter, Outstanding, Traffic, TransportError
from lightning_easgd.communication.parameter_server._assembly import Assembly
from lightning_easgd.communication.parameter_server._shards import Shard, write_scaled
from lightning_easgd.interfaces import Exchange, Snapshot
from lightning_easgd.rules import CenterRule

__all__ = ["DistantCenter"]


class DistantCenter(OpenCenter):
    """The center in a replica that does not share the memory of all of it.

    What takes a server's time goes on in a thread beside the caller, one operation at a time: a push, or a whole
    exchange.

    On the CPU, with numbers that travel as they are, it has two vectors. In one the center arrives. The other is lent,
    or has a copy of what is pushed. Both are sent from where they lie. The caller may still read what it has been lent
    while that is sent, so that a factor goes into the other one; ``value`` is then read anew if it is asked for.
    """

    synchronous = False

    def __init__(
        self,
        shards: list[Shard],
        terms: Terms,
        vector: Tensor,
        *,
        replica: int,
        rule: CenterRule,
        device: torch.device,
        timeout: timedelta,
        assembly: Assembly,
        server: SessionServer | None,
    ) -> None:
        super().__init__(
            replica=replica, num_replicas=terms.num_replicas, num_slots=terms.num_slots, dtype=terms.torch_dtype
        )
        self._terms, self._rule, self._timeout = terms, rule, timeout
        self._assembly, self._server = assembly, server
        self._shards = [(shard, terms.shard(k)) for k, shard in enumerate(shards)]
        self._rounds = terms.wire_dtype != terms.torch_dtype
        self._vector = vector  # on the CPU; the shards write their slices
        self._value = vector.to(device)  # the same tensor where the replica is on the CPU
        # Whether what arrives and what is sent has other memory than ``value``.
        self._is_buffered = self._rounds or self._value is not vector
        self._is_whole = True  # whether ``value`` is the center as of a reading
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._message: Tensor | None = None  # on the CPU, from the first use on
        self._expected: Tensor | None = None  # where the center would be next time, if nobody else added to it
        self._unconfirmed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lightning_easgd-client")
        self._flight: Flight | None = None
        self._is_closed = False
        self._take_in()
        self._note()

    @property
    def value(self) -> Tensor:
        """(d,) the center as of the last reading; read anew if its memory has been used since. See ``OpenCenter``."""
        if not self._is_whole:
            self.pull()
        return self._value

    @property
    def clock(self) -> int:
        return self._clock

    def pull(self) -> Snapshot:
        self._begin_operation()
        with self._exposed():
            self._read()
            self._is_whole = True
        self._note()
        return Snapshot(self._value, self.clock)

    def borrow(self) -> Tensor:
        """Completes what is outstanding and lends (d,) memory for the x of the next exchange. See ``Center.borrow``."""
        self._begin_operation()
        return super().borrow() if self._rounds or self._value.is_cuda else self._outgoing()

    def new_vector(self) -> Tensor:
        return torch.empty_like(self._value)

    def _outgoing(self) -> Tensor:
        if self._message is None:
            with torch.inference_mode(False):  # the thread, which may write it, is outside of the caller's mode
                self._message = torch.empty_like(self._vector, pin_memory=self._value.is_cuda)
        return self._message

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds ``delta`` to the center; returns as soon as it is copied. See ``OpenCenter.push``.

        Where asked for, ``traffic.drift`` is how far the next pull finds the center from where this delta alone would
        have taken it from the last one.
        """
        self._begin_operation()
        with self._exposed():
            self._refuse_nonfinite(delta)
            measure = self.measures_drift and self._is_whole
            is_kept = self._stage(delta, 1.0, measure=measure, is_the_callers=True)
            self._is_whole = self._is_whole and is_kept
        slots = self.announcement.double()
        self._start(lambda: self._transmit(read_at, slots))
        self.traffic.exchanges += 1

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """Reads the center and adds to it. Returns at once; raises like ``push``, from ``wait`` or the next operation.

        The servers are asked, ``delta`` is called and the result is sent in a thread beside the caller.
        """
        self._begin_operation()
        slots, measure = self.announcement.double(), self.measures_drift
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            x.record_stream(self._stream)

        self._is_whole = self._is_buffered

        def work() -> None:
            with self._on_stream():
                self._read()
                delta(x, self._value)
                self._refuse_nonfinite(x)
                self._is_whole = self._stage(x, scale, measure=measure, is_the_callers=False)
            self._transmit(self._clock, slots)
            self.traffic.exchanges += 1

        flight = self._start(work)
        return Outstanding(x, complete=lambda: self._complete(flight))

    def abstain(self) -> None:
        self._begin_operation()
        slots = self.announcement.double()
        self._start(lambda: self._abstain(slots))

    # --- what may go on in the thread -------------------------------------------------------------------------------

    def _read(self) -> None:
        self._is_whole = self._is_buffered
        for shard, _ in self._shards:
            shard.request()
        for shard, _ in self._shards:
            shard.receive()
        self._take_in()

    def _take_in(self) -> None:
        # Each shard counts its own additions; a delta's age is told in the first one's.
        self._clock = self._shards[0][0].clock
        self._offsets = [shard.clock - self._clock for shard, _ in self._shards]
        if self._value is not self._vector:
            self._value.copy_(self._vector)
        if self._expected is not None:
            self.traffic.drift = float(torch.linalg.vector_norm(self._vector - self._expected))
            self._expected = None

    def _stage(self, x: Tensor, scale: float, *, measure: bool, is_the_callers: bool) -> bool:
        """Makes ``scale * x`` what the next ``_transmit`` sends.

        Args:
            x: (d,) on the replica's device, finite. It is only read, and afterwards by the caller too.
            scale: its factor.
            measure: whether the next reading measures the drift.
            is_the_callers: whether the caller may also write to ``x`` afterwards, lent or not.

        Returns:
            Whether the center that was read last is still in its memory.
        """
        if x.is_cuda:
            x = self._outgoing().copy_(x)
            if scale != 1:
                x.mul_(scale)
            scale, is_the_callers = 1.0, False
        if measure:
            self._expected = torch.mul(x, scale).add_(self._vector)
        if not self._rounds:
            if x.data_ptr() != self._outgoing().data_ptr():
                x = write_scaled(self._outgoing(), x, scale)
            elif scale != 1 or is_the_callers:
                x = write_scaled(self._vector, x, scale)
            scale = 1.0
        for shard, part in self._shards:
            shard.stage(x[part], scale)
        return x is not self._vector

    def _transmit(self, read_at: int, slots: Tensor) -> None:
        for (shard, _), offset in zip(self._shards, self._offsets, strict=True):
            shard.transmit(read_at + offset, slots)

    def _abstain(self, slots: Tensor) -> None:
        for shard, _ in self._shards:
            shard.abstain(slots)

    def _flush(self) -> None:
        for shard, _ in self._shards:
            shard.flush()

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        torch.cuda.set_device(self._stream.device)  # a thread begins with device 0
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    # --- the caller's side ------------------------------------------------------------------------------------------

    def _begin_operation(self) -> None:
        if self._is_closed:
            raise TransportError(f"replica {self.replica}: the center of the parameter server is closed")
        self._settle(self._timeout)

    def _start(self, operation: Callable[[], None]) -> Flight:
        self._unconfirmed = True
        flight = self._flight = Flight(operation, self._worker.submit)
        return flight

    def _settle(self, timeout: timedelta) -> None:
        """Completes the outstanding operation, or raises what it raised."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        is_over = flight.finish(timeout, self.traffic)
        self._note()
        if not is_over:
            self._cut()
            raise TransportError(
                f"replica {self.replica} of {self.num_replicas}: an operation of the parameter server that began "
                f"{time.perf_counter() - flight.launched_at:.1f} s ago is not over; the timeout is "
                f"{timeout.total_seconds()} s"
            )
        flight.check()

    def _complete(self, flight: Flight) -> None:
        if self._flight is flight:
            self._settle(self._timeout)
        else:  # another operation has completed it, or raised what it raised
            flight.check()

    def _note(self) -> None:
        """Takes over what the shards have learned and spent."""
        for shard, _ in self._shards:
            self.traffic.bytes_sent += shard.bytes_sent
            self.traffic.wait_s += shard.wait_s
            shard.bytes_sent, shard.wait_s = 0, 0.0
        if self._server is not None:
            self.traffic.bytes_sent += self._server.take_bytes_sent()
        self.traffic.staleness = max(shard.staleness for shard, _ in self._shards)
        self._clock = self._shards[0][0].clock
        self.announced.copy_(self._shards[0][0].announced)

    @contextlib.contextmanager
    def _exposed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.traffic.exposed_s += time.perf_counter() - began

    def _cut(self) -> None:
        for shard, _ in self._shards:
            shard.cut()

    def lost(self) -> list[int]:
        """Returns the replicas that had ended without ``close`` when a server last answered this one."""
        return sorted({replica for shard, _ in self._shards for replica in shard.lost})

    def drain(self, timeout: timedelta | None = None) -> None:
        """Returns when the servers have added what this replica has pushed. See ``OpenCenter.drain``."""
        if self._is_closed:
            return
        self._settle(timeout or self._timeout)
        if self._unconfirmed:
            self._start(self._flush)
            self._settle(timeout or self._timeout)
            self._unconfirmed = False

    def state_dict(self) -> dict[str, Any]:
        """See ``OpenCenter.state_dict``. Asks the servers for what the rule remembers; blocks at most the timeout."""
        self._begin_operation()
        parts = [shard.memory() for shard, _ in self._shards]
        return {
            "clock": self.clock,
            "rule": self._rule.state_dict(),
            "memory": [torch.cat(slices) for slices in zip(*parts, strict=True)],
            "traffic": vars(self.traffic).copy(),
        }

    def load_state_dict(self, state: dict[str, Any], value: Tensor) -> None:
        """Restores the center; see ``OpenCenter.load_state_dict``. What replica 0 is given counts.

        Raises:
            TransportError: not all replicas came in time.
        """
        self._begin_operation()
        self.drain()
        self._rule.load_state_dict(state["rule"])
        self.traffic = Traffic(**state["traffic"])
        self._assembly.gather("restore", "")  # nobody adds any more
        if self.replica == 0:
            for shard, part in self._shards:
                memory = [vector[part].cpu() for vector in state["memory"]]
                shard.write(value[part].cpu(), memory, int(state["clock"]))
        self._assembly.gather("restore", "")
        for shard, _ in self._shards:
            shard.read_exactly()
        self._expected = None
        self._take_in()
        self._is_whole = True
        self._note()

    def close(self) -> None:
        """Leaves the center without waiting for other replicas; a server is given two seconds to hear it. Idempotent.

        A server in this replica goes on serving its clients until they close.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._flight is not None and not self._flight.is_over(FAREWELL):
            self._cut()
        self._flight = None
        self._worker.shutdown()
        for shard, _ in self._shards:
            shard.close()
        self._shards = []
        self._vector = self._value = self._vector.new_empty(0)
        self._is_whole, self._message, self._lent = True, None, None
