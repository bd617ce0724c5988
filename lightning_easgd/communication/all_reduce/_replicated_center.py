"""The replicated center on the CPU: a thread of the center's sums, while the caller computes."""

import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Group, PrefixStore, Store, Work, new_group
from lightning_easgd.communication._flight import Flight, in_daemon_thread
from lightning_easgd.communication._line import Place
from lightning_easgd.communication._shared_vectors import SharedVectors
from lightning_easgd.communication._transport import Completed, OpenCenter, Outstanding, Traffic, TransportError
from lightning_easgd.communication._wire import (
    Chunk,
    Errors,
    ExactLane,
    Lane,
    Layout,
    RoundingLane,
    Wire,
    blocks,
    bytes_of_ring,
    codec_of,
)
from lightning_easgd.interfaces import Exchange, Snapshot
from lightning_easgd.rules import CenterRule

__all__ = ["ReplicatedCenter", "Revocable"]

# Bytes of a chunk, in the center's dtype. On the CPU small enough for the cache; on a device each launch has its price.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
_NUM_LANES = 4  # chunks that are under way at once, and may be before a lent vector is given back


class Revocable:
    """A group that starts nothing more once it is revoked.

    What is going on then fails; what is queued, but has not begun, may last until its timeout.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._lock = threading.Lock()
        self._revoked = False

    def allreduce(self, tensors: list[Tensor]) -> Work:
        """See ``Group``; ``RuntimeError`` once it is revoked."""
        with self._lock:
            self._check()
            return self._group.allreduce(tensors)

    def alltoall_base(self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int]) -> Work:
        """See ``Group``; ``RuntimeError`` once it is revoked."""
        with self._lock:
            self._check()
            return self._group.alltoall_base(output, input, output_sizes, input_sizes)

    def revoke(self) -> None:
        """Starts nothing more, and ends what is going on where the group can. Safe from another thread."""
        with self._lock:
            self._revoked = True
            if hasattr(self._group, "abort"):
                self._group.abort()

    def _check(self) -> None:
        if self._revoked:
            raise RuntimeError("it was given up")


class _Sent:
    """What this replica sends in an exchange, as the caller's thread and the one of the exchange see it.

    Attributes:
        delta: (d,) what it adds, in the center's memory; None for an abstention.
        scale: its factor.
        lent: what a caller may still read of that memory; None where nothing is.
        released: set when the memory may be overwritten.
        cancelled: whether the exchange is given up; set before ``released``.
    """

    def __init__(self, delta: Tensor | None, scale: float, *, lent: Tensor | None) -> None:
        self.delta, self.scale, self.lent = delta, scale, lent
        self.released = threading.Event()
        self.cancelled = False
        if lent is None:
            self.release()

    @property
    def is_free(self) -> bool:
        """Whether the delta's memory may be overwritten by now."""
        return self.released.is_set() and not self.cancelled

    def release(self) -> None:
        """Lets the delta's memory be overwritten."""
        self.released.set()

    def take_back(self) -> None:
        """Does the same, and gives the caller a copy of what it may still read, in the very tensor that it holds."""
        lent, self.lent = self.lent, None
        if lent is not None and not self.released.is_set():
            with torch.no_grad():
                lent.set_(lent.clone())  # type: ignore[call-overload]
        self.release()

    def cancel(self) -> None:
        """Gives the exchange up."""
        self.cancelled = True
        self.release()

    def await_release(self, timeout: timedelta) -> None:
        """Waits until the delta's memory may be overwritten; ``RuntimeError`` if it may not in time."""
        if not self.released.wait(timeout.total_seconds()):
            raise RuntimeError("the vector that the center had lent was not given back in time")
        if self.cancelled:
            raise RuntimeError("it was given up")


class ReplicatedCenter(OpenCenter):
    """The center as each replica holds it, on the CPU: the two vectors, and the thread of an exchange.

    Args:
        initial: see ``Transport.open``, like the next six.
        replica: see there.
        num_replicas: see there.
        rule: see there.
        store: see there.
        timeout: see there.
        num_slots: see there.
        wire: see ``AllReduce``.
        shared_memory: see ``AllReduce``.
        place: on a device, see ``AllReduce.open``.

    Raises:
        TransportError: not all replicas came in time.
    """

    synchronous = True

    def __init__(
        self,
        initial: Tensor,
        replica: int,
        num_replicas: int,
        rule: CenterRule,
        store: Store,
        timeout: timedelta,
        num_slots: int,
        wire: Wire,
        shared_memory: bool,
        place: Place | None,
    ) -> None:
        super().__init__(replica=replica, num_replicas=num_replicas, num_slots=num_slots, dtype=initial.dtype)
        self._rule = rule
        self._timeout = timeout
        self._clock = self._additions = 0
        self._memory = [torch.zeros_like(initial) for _ in range(rule.num_vectors)]
        # The delta, and what becomes the next center or the deltas' sum; from the first exchange on, or shared.
        self._other: Tensor | None = None
        # Chunks of a rule without memory may be applied as they come: the old center stands until all have.
        self._by_chunks = not rule.num_vectors and not rule.synchronous_only
        # How many deltas there are in the sum, and the sum of the slots.
        self._header = self._new_header(initial, num_slots)
        self._flight: tuple[Flight, _Sent] | None = None
        self._failed = False
        # The clocks after exchanges in which nobody added anything: they make no delta older.
        self._idle: list[int] = []
        self._wire: Wire = "float32" if num_replicas == 1 else wire  # one replica sends nothing
        has_messages = num_replicas > 1 and initial.numel() > 0
        may_share = shared_memory and wire == "float32" and not initial.is_cuda and has_messages
        self._shared: SharedVectors | None = None
        self._token = torch.zeros(1)  # for all-reduces that say something by being complete
        try:
            group = place.group if place else new_group(store, replica, num_replicas, initial.device, timeout)
            if may_share:
                where = PrefixStore("shared", store)
                self._shared = SharedVectors.open(initial, where, replica, num_replicas, timeout)
            if self._shared is None:
                self._value = initial.clone()
            else:
                self._value, self._other = self._shared.own
                self._value.copy_(initial)
            if initial.numel() > 0:
                group.broadcast(self._value, 0).wait(timeout)
        except RuntimeError as error:
            raise TransportError(
                f"replica {replica} of {num_replicas} could not open the all-reduce center: {error}"
            ) from error
        self._group: Revocable | None = Revocable(group)
        codec = codec_of(self._wire, initial)
        chunk = _CHUNK_BYTES[initial.device.type] // initial.itemsize
        self._layout = Layout(initial.numel(), num_replicas, chunk, 1 if codec is None else codec.align)
        self._errors = None if codec is None else Errors(self._layout, num_replicas, initial)
        payload = initial.numel() * initial.itemsize if codec is None else codec.size(self._layout.padded)
        payload = payload if self._shared is None else 2 * self._token.itemsize
        header = self._header.numel() * initial.itemsize
        self._bytes_of_header = bytes_of_ring(num_replicas, header)
        self._bytes_of_payload = bytes_of_ring(num_replicas, payload + header) - self._bytes_of_header
        self._lanes: list[Lane] = []

    def _new_header(self, initial: Tensor, num_slots: int) -> Tensor:
        return initial.new_empty(1 + num_slots)

    def _new_lane(self) -> Lane:
        assert self._group is not None
        size, layout = self.num_replicas, self._layout
        timeout = None if self._value.is_cuda else self._timeout
        if self._errors is None:
            return ExactLane(self._group, size * layout.largest, self._value, timeout)
        codec = codec_of(self._wire, self._value)
        assert codec is not None
        return RoundingLane(self._group, self.replica, size, layout, codec, self._errors, timeout)

    @property
    def value(self) -> Tensor:
        return self._value

    @property
    def clock(self) -> int:
        return self._clock

    @property
    def additions(self) -> int:
        return self._additions

    def pull(self) -> Snapshot:
        self._require_open()
        self.drain()
        return Snapshot(self._value, self._clock)

    def borrow(self) -> Tensor:
        """Completes what is outstanding and lends (d,) memory for the x of the next exchange. See ``Center.borrow``."""
        self._require_open()
        self.drain()
        return self._message()[:]  # a tensor of the caller's own, on the same memory

    def _message(self) -> Tensor:
        if self._other is None:
            with torch.inference_mode(False):  # the thread, which writes it, is outside of the caller's mode
                self._other = self.new_vector()
        return self._other

    def new_vector(self) -> Tensor:
        return torch.empty_like(self._value)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._require_open()
        if not math.isfinite(self._copy(delta, read_at, 1.0, look=True)):
            self._refuse_nonfinite(delta)
        self._launch(self._other, 1.0)

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        snapshot = self.pull()
        total = 0.0
        for part, center in blocks(x, snapshot.value):
            delta(part, center)
            total += float(part.sum())  # while it is in the cache; finite only if all numbers are
        if not math.isfinite(total):
            self._refuse_nonfinite(x)
        if self._other is None or x.data_ptr() != self._other.data_ptr():
            self._copy(x, snapshot.clock, scale, look=False)
            self._launch(self._other, 1.0)
            return Completed(x)
        sent = self._launch(self._other, scale * self._rule.weight(0), lent=x)
        return Outstanding(x, release=sent.release)

    def abstain(self) -> None:
        self._require_open()
        self.drain()
        self._message()
        self._launch(None, 1.0)

    def _copy(self, delta: Tensor, read_at: int, scale: float, *, look: bool) -> float:
        """Puts a delta with its factors into the memory of the next exchange.

        Returns:
            The sum of its numbers if asked to ``look``, which is finite only if all numbers are; else 0.
        """
        self.drain()
        message = self._message()
        # All replicas add at once, so a delta is as old as the exchange before this one: the weight is everyone's.
        self._idle = [clock for clock in self._idle if clock > read_at]
        staleness = self._clock - read_at - self.num_replicas * len(self._idle)
        factor, total = scale * self._rule.weight(staleness), 0.0
        for part, target in blocks(delta, message):
            target.copy_(part) if factor == 1 else torch.mul(part, factor, out=target)
            total += float(part.sum()) if look else 0.0
        return total

    def _require_open(self) -> None:
        if self._group is None:
            raise TransportError(f"replica {self.replica}: the all-reduce center is closed")
        if self._failed:
            raise TransportError(
                f"replica {self.replica} of {self.num_replicas}: an all-reduce has failed before; the replicas are no "
                "longer in step, and the center has the value from before it"
            )

    def _launch(self, delta: Tensor | None, scale: float, *, lent: Tensor | None = None) -> _Sent:
        self._header[0] = 0 if delta is None else 1
        self._header[1:].copy_(self.announcement)
        sent = _Sent(delta, scale, lent=lent)
        self._flight = Flight(lambda: self._fly(sent), in_daemon_thread("all-reduce")), sent
        self._count_launch(adds=delta is not None)
        return sent

    def _count_launch(self, *, adds: bool) -> None:
        self.traffic.bytes_sent += self._bytes_of_header + (self._bytes_of_payload if adds else 0)
        self.traffic.exchanges += adds

    # --- in the thread of an exchange -------------------------------------------------------------------------------

    @torch.no_grad()
    def _fly(self, sent: _Sent) -> None:
        if self._shared is None:
            self._sum(sent)
        else:
            self._sum_in_memory(self._shared, sent)

    def _sum(self, sent: _Sent) -> None:
        """Sums header and chunks over the replicas; the order of operations is the same in all of them.

        Chunks follow the header where anyone adds something. A replica that adds something knows that, and does not
        wait for the header.
        """
        assert self._group is not None
        chunks, lanes = self._layout.chunks, self._ready_lanes()
        heading = self._group.allreduce([self._header])
        if sent.delta is None:
            heading.wait(self._timeout)
            if self._header[0] == 0:
                return
        for i in range(len(chunks) + 1):
            if i < len(chunks):
                lane, chunk = lanes[i % len(lanes)], chunks[i]
                if i >= len(lanes):
                    self._settle(sent, chunks[i - len(lanes)], lane.finish())
                part = None if sent.delta is None else sent.delta[chunk[0] : chunk[1]]
                lane.launch(chunk, part, sent.scale, in_place=sent.is_free)
            if i == 0:
                heading.wait(self._timeout)
            else:
                lanes[(i - 1) % len(lanes)].relay()
        for i in range(len(chunks) - len(lanes), len(chunks)):
            self._settle(sent, chunks[i], lanes[i % len(lanes)].finish())

    def _ready_lanes(self) -> list[Lane]:
        while len(self._lanes) < min(_NUM_LANES, len(self._layout.chunks)):
            self._lanes.append(self._new_lane())
        return self._lanes

    def _sum_in_memory(self, shared: SharedVectors, sent: _Sent) -> None:
        """The same without messages: each replica makes one part of the new center, or of the sum."""
        assert self._group is not None
        assert self._other is not None
        shared.factors[self.replica].fill_(math.nan if sent.delta is None else sent.scale)
        self._group.allreduce([self._header]).wait(self._timeout)  # now all deltas are there
        if self._header[0] > 0:
            sent.await_release(self._timeout)
            index = shared.index_of(self._other)
            shared.reduce(index, self._value, self._rule if self._by_chunks else None)
            self._group.allreduce([self._token]).wait(self._timeout)  # and now all parts
            shared.gather(index)
            self._group.allreduce([self._token]).wait(self._timeout)  # nobody reads this replica's any more

    def _settle(self, sent: _Sent, chunk: Chunk, total: Tensor) -> None:
        """Writes the new center's chunk, or the sum's, over the delta's, once that is no longer needed."""
        sent.await_release(self._timeout)
        self._write(chunk, total)

    def _write(self, chunk: Chunk, total: Tensor) -> None:
        assert self._other is not None
        start, stop, _ = chunk
        for new, old, part in blocks(self._other[start:stop], self._value[start:stop], total):
            if self._by_chunks:
                self._rule.applied(old, part, new)
            else:
                new.copy_(part)

    # --- in the caller's --------------------------------------------------------------------------------------------

    def drain(self, timeout: timedelta | None = None) -> None:
        outstanding, self._flight = self._flight, None
        if outstanding is None:
            return
        flight, sent = outstanding
        age_s = time.perf_counter() - flight.launched_at
        sent.take_back()
        # The operations' own timeout says more, so it may come first.
        limit = self._timeout + timedelta(seconds=1) if timeout is None else timeout
        if not flight.finish(limit, self.traffic) or flight.error is not None:
            self._failed = True
            sent.cancel()
            raise TransportError(
                f"replica {self.replica} of {self.num_replicas}: the all-reduce that began {age_s:.1f} s ago did not "
                f"complete and was not applied: {flight.error or 'the time is out'}"
            ) from flight.error
        num_deltas = int(self._header[0])
        if num_deltas > 0:  # where all abstain, a rule with momentum must not take it for a step of zero
            self._take_sum()
        self._note(self._header[1:], num_deltas, num_deltas, adds=sent.delta is not None)

    def _take_sum(self) -> None:
        """Makes the new center of what an exchange has left beside the old one."""
        assert self._other is not None
        if self._by_chunks:
            self._value, self._other = self._other, self._value
        else:
            self._rule.apply_(self._value, self._other, *self._memory)

    def _note(self, slots: Tensor, num_deltas: int, num_messages: int, *, adds: bool) -> None:
        """Counts an exchange and takes over its slots."""
        self.announced.copy_(slots)
        self._clock += self.num_replicas
        self._additions += num_deltas
        if num_messages == 0:
            self._idle.append(self._clock)
        elif not adds:
            self.traffic.bytes_sent += self._bytes_of_payload

    def lost(self) -> list[int]:
        return []  # the exchange that misses one raises

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self._clock,
            "additions": self._additions,
            "idle": list(self._idle),
            "rule": self._rule.state_dict(),
            "memory": [vector.to("cpu", copy=True) for vector in self._memory],
            "rounding": None if self._errors is None else self._errors.state_dict(),
            "traffic": vars(self.traffic).copy(),
        }

    def load_state_dict(self, state: dict[str, Any], value: Tensor) -> None:
        self._value.copy_(value)
        self._clock, self._additions = int(state["clock"]), int(state["additions"])
        self._idle = list(state.get("idle", ()))
        self._rule.load_state_dict(state["rule"])
        for vector, saved in zip(self._memory, state["memory"], strict=True):
            vector.copy_(saved)
        if self._errors is not None:
            self._errors.load_state_dict(state.get("rounding"))
        self.traffic = Traffic(**state["traffic"])

    def close(self) -> None:
        group, self._group = self._group, None
        outstanding, self._flight = self._flight, None
        # A group waits for its operations when it is destroyed; one that a lost peer never answers must not hold us.
        if outstanding is not None:
            outstanding[1].cancel()
        if group is not None and (outstanding is not None or self._failed):
            group.revoke()
        self._value = self._value.new_empty(0)
        self._other, self._errors, self._shared = None, None, None
        self._memory, self._lanes = [], []
