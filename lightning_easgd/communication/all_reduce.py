"""A center that every replica holds, kept equal by one all-reduce an exchange.

The elastic force of synchronous EASGD needs only the replica's parameters and the center that it already holds; the
*sum* over replicas is not needed before the next exchange. So ``push`` starts the all-reduce and returns, and the next
``pull`` completes it: communication hides behind a whole period of compute, with the arithmetic unchanged.

A thread of the center's sums chunk by chunk, and writes the new center beside the old one, into the memory of the delta
that it has sent; when all is there, the two change places. So the old center is whole until the new one is, and two
vectors are enough, if the algorithm writes what it exchanges into the one that the center lends (``borrow``).

On a CUDA device all of this is asynchronous by itself, so that the caller's thread enqueues it and there is no other.

An exchange begins with a header: how many deltas there are, and the slots. Where all replicas only say that they are
there, nothing follows it. Who abstains waits for it; who adds something knows what follows, and does not.

Replicas that are all on one host keep these two vectors in memory that they share. Their all-reduces carry no vector
then: the first says that all deltas are there, the second that all parts of the new center are, the third that they
have been read.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Group, PrefixStore, Store, Work, new_group
from lightning_easgd.communication._line import Place, await_event, elapsed_s, finite_or_zero_, new_event, new_stream
from lightning_easgd.communication._shared_vectors import SharedVectors
from lightning_easgd.communication._transport import (
    Completed,
    OpenCenter,
    Traffic,
    Transport,
    TransportError,
    check_open,
)
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

__all__ = ["AllReduce"]

# Bytes of a chunk, in the center's dtype. On the CPU small enough for the cache; on a device each launch has its price.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
_LEAD = 2  # numbers before the slots in a device's header
_NUM_TIMED = 8  # exchanges whose times are yet to be read from the device
_NUM_LANES = 4  # chunks that are under way at once, and may be before a lent vector is given back


class AllReduce(Transport):
    """Synchronous transport: the center replicated in every replica, one all-reduce (sum) an exchange.

    The replicas' n-th pushes and abstentions belong together. The sum is applied to the center as one delta and counts
    as ``num_replicas`` additions. All copies stay bit-identical, since a sum is computed once and then distributed, or
    by the same operations everywhere.

    Memory: the center, a second vector of its size, messages (on the CPU 4 MiB, on a device 64 MiB, and up to 200 MB
    with a wire other than float32), and what the rule remembers; with a wire other than float32 also the rounding
    errors, ``1 + 1/num_replicas`` vectors (with two replicas one). A look at the center between an exchange's begin and
    its end costs a vector more. Where memory is shared, the first two are counted as such by the system (``top``'s
    SHR).

    On a device a delta that is not finite is found there, and is taken for zeros: it never enters the center. Its
    replica's next operation raises ``NonFiniteDeltaError``; on the CPU the exchange itself does.

    Args:
        wire: what numbers travel as: ``"float32"`` (the center's own dtype), ``"bfloat16"``, half as many bytes, or
            ``"int8"``, a quarter: multiples of one float32 for every 256 numbers. The slots travel as they are. What
            rounding takes from a delta is added to this replica's next one, and is part of the center's state: in the
            end the center receives everything. With more than two replicas the sums are rounded once more, likewise.
        shared_memory: whether replicas that are all on one host sum through memory that they share, not through
            sockets: at less than half of the processor's time, and with some bytes sent in all. For
            ``wire="float32"`` on the CPU, on Linux; elsewhere, and where processes do not see each other, as in
            containers of their own, it is sockets as with False. Default True.

    Raises:
        ValueError: ``wire`` or ``shared_memory`` is another.
    """

    synchronous = True

    def __init__(self, *, wire: Wire = "float32", shared_memory: bool = True) -> None:
        if wire not in get_args(Wire):
            raise ValueError(f"AllReduce(wire={wire!r}): must be one of {', '.join(map(repr, get_args(Wire)))}")
        if not isinstance(shared_memory, bool):
            raise ValueError(f"AllReduce(shared_memory={shared_memory!r}): must be True or False")
        self.wire = wire
        self.shared_memory = shared_memory

    def open(
        self,
        initial: Tensor,
        *,
        replica: int,
        num_replicas: int,
        rule: CenterRule,
        store: Store,
        timeout: timedelta,
        num_slots: int = 0,
        place: Place | None = None,
    ) -> OpenCenter:
        """Opens the center; see ``Transport.open``.

        Args:
            initial: see there, like all others.
            replica: see there.
            num_replicas: see there.
            rule: see there.
            store: see there.
            timeout: see there.
            num_slots: see there.
            place: on a CUDA device, where several centers share a communicator: this one's place among them, the same
                on all replicas. Default: a communicator of its own.
        """
        check_open(self, initial, replica, num_replicas, rule)
        kind = _DeviceCenter if initial.is_cuda else _ReplicatedCenter
        return kind(
            initial, replica, num_replicas, rule, store, timeout, num_slots, self.wire, self.shared_memory, place
        )

    def __repr__(self) -> str:
        """Returns the constructor call."""
        wire = [] if self.wire == "float32" else [f"wire={self.wire!r}"]
        return f"AllReduce({', '.join([*wire, *([] if self.shared_memory else ['shared_memory=False'])])})"


class _Revocable:
    """A group that starts nothing more once it is revoked.

    What is going on then fails; what is queued, but has not begun, may last until its timeout.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._lock = threading.Lock()
        self._revoked = False

    def allreduce(self, tensors: list[Tensor]) -> Work:
        with self._lock:
            self._check()
            return self._group.allreduce(tensors)

    def alltoall_base(self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int]) -> Work:
        with self._lock:
            self._check()
            return self._group.alltoall_base(output, input, output_sizes, input_sizes)

    def revoke(self) -> None:
        with self._lock:
            self._revoked = True
            if hasattr(self._group, "abort"):
                self._group.abort()

    def _check(self) -> None:
        if self._revoked:
            raise RuntimeError("it was given up")


class _Flight:
    """An exchange from its launch to its end, as the caller's thread and the center's both see it.

    Attributes:
        adds: whether this replica adds a delta.
        lent: what a caller may still read, and that is in the center's memory; None where nothing is.
        released: set when the delta's memory may be overwritten.
        cancelled: whether it is given up; set before ``released``.
        error: what ended it too early.
    """

    def __init__(self, *, adds: bool) -> None:
        self.adds = adds
        self.lent: Tensor | None = None
        self.released = threading.Event()
        self.cancelled = False
        self.error: Exception | None = None
        self.launched_at = time.perf_counter()
        self.completed_at = math.inf
        self.thread: threading.Thread | None = None

    @property
    def is_free(self) -> bool:
        """Whether the delta's memory may be overwritten by now."""
        return self.released.is_set() and not self.cancelled

    def release(self) -> None:
        """Lets the delta's memory be overwritten."""
        self.released.set()

    def keep(self) -> None:
        """Gives the caller a copy of what it may still read, in the very tensor that it holds."""
        lent, self.lent = self.lent, None
        if lent is not None and not self.released.is_set():
            with torch.no_grad():
                lent.set_(lent.clone())  # type: ignore[call-overload]


class _Lent:
    """An exchange of the vector that the center lends.

    Args:
        delta: (d,) what the caller may read until ``done``.
        release: gives its memory back.
    """

    def __init__(self, delta: Tensor, release: Callable[[], None]) -> None:
        self._delta, self._release = delta, release

    def wait(self) -> Tensor:
        """Returns the delta at once."""
        return self._delta

    def done(self) -> None:
        """Gives the delta's memory back."""
        self._release()


class _ReplicatedCenter(OpenCenter):
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
        self._flight: _Flight | None = None
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
        self._group: _Revocable | None = _Revocable(group)
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
                self._other = torch.empty_like(self._value)
        return self._other

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._require_open()
        if not math.isfinite(self._copy(delta, read_at, 1.0, look=True)):
            self._refuse_nonfinite(delta)
        self._launch(self._other, 1.0, free=True)

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
            self._launch(self._other, 1.0, free=True)
            return Completed(x)
        flight = self._launch(self._other, scale * self._rule.weight(0), free=False)
        flight.lent = x
        return _Lent(x, flight.release)

    def abstain(self) -> None:
        self._require_open()
        self.drain()
        self._message()
        self._launch(None, 1.0, free=True)

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

    def _launch(self, delta: Tensor | None, scale: float, *, free: bool) -> _Flight:
        self._header[0] = 0 if delta is None else 1
        self._header[1:].copy_(self.announcement)
        flight = self._flight = _Flight(adds=delta is not None)
        if free:
            flight.release()
        flight.thread = threading.Thread(target=self._fly, args=(flight, delta, scale), name="all-reduce", daemon=True)
        flight.thread.start()
        self._count_launch(adds=flight.adds)
        return flight

    def _count_launch(self, *, adds: bool) -> None:
        self.traffic.bytes_sent += self._bytes_of_header + (self._bytes_of_payload if adds else 0)
        self.traffic.exchanges += adds

    # --- in the thread of an exchange -------------------------------------------------------------------------------

    def _fly(self, flight: _Flight, delta: Tensor | None, scale: float) -> None:
        try:
            with torch.no_grad():
                if self._shared is None:
                    self._sum(flight, delta, scale)
                else:
                    self._sum_in_memory(self._shared, flight, delta, scale)
        except Exception as error:
            flight.error = error  # raised by ``drain``
        finally:
            flight.completed_at = time.perf_counter()

    def _sum(self, flight: _Flight, delta: Tensor | None, scale: float) -> None:
        """Sums header and chunks over the replicas; the order of operations is the same in all of them.

        Chunks follow the header where anyone adds something. Who adds knows that, and does not wait for the header.
        """
        assert self._group is not None
        chunks, lanes = self._layout.chunks, self._ready_lanes()
        heading = self._group.allreduce([self._header])
        if delta is None:
            heading.wait(self._timeout)
            if self._header[0] == 0:
                return
        for i in range(len(chunks) + 1):
            if i < len(chunks):
                lane, chunk = lanes[i % len(lanes)], chunks[i]
                if i >= len(lanes):
                    self._settle(flight, chunks[i - len(lanes)], lane.finish())
                part = None if delta is None else delta[chunk[0] : chunk[1]]
                lane.launch(chunk, part, scale, in_place=flight.is_free)
            if i == 0:
                heading.wait(self._timeout)
            else:
                lanes[(i - 1) % len(lanes)].relay()
        for i in range(len(chunks) - len(lanes), len(chunks)):
            self._settle(flight, chunks[i], lanes[i % len(lanes)].finish())

    def _ready_lanes(self) -> list[Lane]:
        while len(self._lanes) < min(_NUM_LANES, len(self._layout.chunks)):
            self._lanes.append(self._new_lane())
        return self._lanes

    def _sum_in_memory(self, shared: SharedVectors, flight: _Flight, delta: Tensor | None, scale: float) -> None:
        """The same without messages: each replica makes one part of the new center, or of the sum."""
        assert self._group is not None
        assert self._other is not None
        shared.factors[self.replica].fill_(math.nan if delta is None else scale)
        self._group.allreduce([self._header]).wait(self._timeout)  # now all deltas are there
        if self._header[0] > 0:
            self._await_release(flight)
            index = shared.index_of(self._other)
            shared.reduce(index, self._value, self._rule if self._by_chunks else None)
            self._group.allreduce([self._token]).wait(self._timeout)  # and now all parts
            shared.gather(index)
            self._group.allreduce([self._token]).wait(self._timeout)  # nobody reads this replica's any more

    def _await_release(self, flight: _Flight) -> None:
        """Waits until the delta's memory may be overwritten."""
        if not flight.released.wait(self._timeout.total_seconds()):
            raise RuntimeError("the vector that the center had lent was not given back in time")
        if flight.cancelled:
            raise RuntimeError("it was given up")

    def _settle(self, flight: _Flight, chunk: Chunk, total: Tensor) -> None:
        """Writes the new center's chunk, or the sum's, over the delta's, once that is no longer needed."""
        self._await_release(flight)
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
        flight, self._flight = self._flight, None
        if flight is None:
            return
        assert flight.thread is not None
        began = time.perf_counter()
        flight.keep()
        flight.release()
        # The operations' own timeout says more, so it may come first.
        flight.thread.join(self._timeout.total_seconds() + 1 if timeout is None else timeout.total_seconds())
        if flight.thread.is_alive() or flight.error is not None:
            self._failed = flight.cancelled = True
            raise TransportError(
                f"replica {self.replica} of {self.num_replicas}: the all-reduce that began "
                f"{began - flight.launched_at:.1f} s ago did not complete and was not applied: "
                f"{flight.error or 'the time is out'}"
            ) from flight.error
        ended = time.perf_counter()
        self.traffic.exposed_s += ended - began
        self.traffic.hidden_s += max(0.0, min(flight.completed_at, began) - flight.launched_at)
        num_deltas = int(self._header[0])
        if num_deltas > 0:  # where all abstain, a rule with momentum must not take it for a step of zero
            self._take_sum()
        self._note(self._header[1:], num_deltas, num_deltas, adds=flight.adds)

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
        flight, self._flight = self._flight, None
        # A group waits for its operations when it is destroyed; one that a lost peer never answers must not hold us.
        if flight is not None:
            flight.cancelled = True
            flight.release()
        if group is not None and (flight is not None or self._failed):
            group.revoke()
        self._value = self._value.new_empty(0)
        self._other, self._errors, self._shared = None, None, None
        self._memory, self._lanes = [], []


class _Launch:
    """An exchange on a device, from its launch to its end, as its center's thread sees it.

    Attributes:
        delta: (d,) what this replica adds; None for an abstention.
        scale: its factor.
        is_lent: whether a caller may still read it.
        in_place: whether its memory may be used for sums, in the order of the streams.
        is_enqueued: whether all of it is.
        has_landed: whether the center is the new one, in the order of the caller's stream.
        is_heard: whether the host has waited for its header.
        kept: what the device may still read.
        late: what was announced on the device, (slot, numbers), for the host as soon as it has heard the header.
    """

    def __init__(self, delta: Tensor | None, scale: float, *, is_lent: bool) -> None:
        self.delta, self.scale, self.is_lent, self.in_place = delta, scale, is_lent, not is_lent
        self.is_enqueued = self.is_heard = self.has_landed = False
        self.kept: list[Tensor] = []
        self.late: list[tuple[int, Tensor]] = []
        # In the order of the caller's stream: the delta is there; its end is asked for. In ours: header and center are.
        self.begun, self.asked = new_event(timed=True), new_event(timed=True)
        self.heard, self.arrived = new_event(), new_event(timed=True)


class _DeviceCenter(_ReplicatedCenter):
    """The center on a CUDA device. Everything is enqueued by the caller's thread, on a stream beside the caller's.

    So all replicas' operations have one order, the program's, and the host waits for the device once an exchange: for
    the header of the one before, where what has been announced stands.

    Whether a delta is finite is seen on the device. One that is not is taken for zeros, so that it never enters the
    center; its replica raises at its next operation.
    """

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
        self._stream = new_stream(initial.device) if place is None else place.line.stream
        self._place = place
        self._launched: _Launch | None = None
        self._late: list[tuple[int, Tensor]] = []
        self._timed: deque[_Launch] = deque(maxlen=_NUM_TIMED)
        self._is_refused = False
        super().__init__(initial, replica, num_replicas, rule, store, timeout, num_slots, wire, shared_memory, place)

    def _new_header(self, initial: Tensor, num_slots: int) -> Tensor:
        # How many replicas send a vector, how many of these are finite, and the slots; behind them, not summed: whether
        # this replica's is.
        self._numbers = initial.new_empty(_LEAD + num_slots + 1)
        self._outgoing, self._heard = (
            torch.zeros(self._numbers.numel(), dtype=initial.dtype, pin_memory=True) for _ in range(2)
        )
        return self._numbers[:-1]

    def announce_late(self, first: int, numbers: Tensor) -> None:
        self._late.append((first, numbers))

    def borrow(self) -> Tensor:
        message = super().borrow()
        self._raise_if_refused()
        return message

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._require_open()
        self.drain()
        self._raise_if_refused()
        self._copy(delta, read_at, 1.0, look=False)
        message = self._message()
        self._enqueue(message, 1.0, is_lent=False, finite=self._finite(message))

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        snapshot = self.pull()
        self._raise_if_refused()
        delta(x, snapshot.value)
        finite = self._finite(x)
        if self._other is None or x.data_ptr() != self._other.data_ptr():
            self._copy(x, snapshot.clock, scale, look=False)
            self._enqueue(self._message(), 1.0, is_lent=False, finite=finite)
            return Completed(x)
        launch = self._enqueue(self._other, scale * self._rule.weight(0), is_lent=True, finite=finite)
        return _Lent(x, lambda: self._give_back(launch))

    def abstain(self) -> None:
        self._require_open()
        self.drain()
        self._raise_if_refused()
        self._message()
        self._enqueue(None, 1.0, is_lent=False, finite=None)

    def _finite(self, vector: Tensor) -> Tensor | None:
        """Returns whether a delta is finite, on its device; sets it to zero if not."""
        verdict, self.verdict = self.verdict, None
        if verdict is not None:
            vector.masked_fill_(~verdict, 0)
            return verdict
        return finite_or_zero_(vector) if vector.numel() > 0 else None

    def _raise_if_refused(self) -> None:
        refused, self._is_refused = self._is_refused, False
        if refused:
            self._refuse_late()

    def _enqueue(self, delta: Tensor | None, scale: float, *, is_lent: bool, finite: Tensor | None) -> _Launch:
        """Starts an exchange; of an abstention the header alone, since what follows it depends on the others'."""
        assert self._group is not None
        if self._place is not None:
            with self._failing():
                self._place.begin(self)
        self._outgoing.fill_(0 if delta is None else 1)
        self._outgoing[_LEAD:-1].copy_(self.announcement)
        launch = self._launched = _Launch(delta, scale, is_lent=is_lent)
        stream = self._stream
        _record(launch.begun, torch.cuda.current_stream(self._value.device))
        with self._failing(), torch.no_grad(), torch.cuda.stream(stream):
            stream.wait_event(launch.begun)
            self._numbers.copy_(self._outgoing, non_blocking=True)
            if finite is not None:
                launch.kept.append(finite)
                self._numbers[1:2].copy_(finite)
                self._numbers[-1:].copy_(finite)
            for first, numbers in self._late:
                launch.kept.append(numbers)
                self._numbers[_LEAD + first :][: numbers.numel()].copy_(numbers)
                own = torch.empty(numbers.shape, dtype=self._outgoing.dtype, pin_memory=True)
                launch.late.append((first, own.copy_(numbers, non_blocking=True)))
            self._late.clear()
            heading = self._group.allreduce([self._header])
            if delta is not None:
                for chunk, lane in zip(self._layout.chunks, self._ready_lanes(), strict=False):
                    self._launch_chunk(launch, lane, chunk)
            heading.wait()
            self._heard.copy_(self._numbers, non_blocking=True)
            _record(launch.heard, stream)
        self._count_launch(adds=delta is not None)
        if delta is not None and not is_lent:
            self.enqueue_rest()
        return launch

    def _launch_chunk(self, launch: _Launch, lane: Lane, chunk: Chunk) -> None:
        part = None if launch.delta is None else launch.delta[chunk[0] : chunk[1]]
        lane.launch(chunk, part, launch.scale, in_place=launch.in_place)
        lane.relay()

    def _give_back(self, launch: _Launch) -> None:
        if launch is self._launched and launch.is_lent:
            launch.is_lent, launch.in_place = False, True
            self.enqueue_rest()

    def enqueue_rest(self) -> None:
        """Enqueues what is left of the exchange that has begun; for an abstention the host waits for its header."""
        launch = self._launched
        if launch is None or launch.is_enqueued:
            return
        if launch.is_lent:  # its holder keeps the vector: the center takes another
            launch.is_lent = False
            self._other = torch.empty_like(self._value)
        lanes, chunks = self._ready_lanes(), self._layout.chunks
        if launch.delta is None:
            with self._failing():
                self._hear(launch, self._timeout)
            if self._heard[0] == 0:
                chunks = []
        launch.is_enqueued = True
        stream, given = self._stream, new_event()
        _record(given, torch.cuda.current_stream(self._value.device))
        with self._failing(), torch.no_grad(), torch.cuda.stream(stream):
            stream.wait_event(given)
            if launch.delta is None:
                for chunk, lane in zip(chunks, lanes, strict=False):
                    self._launch_chunk(launch, lane, chunk)
            for i, chunk in enumerate(chunks):
                lane = lanes[i % len(lanes)]
                self._write(chunk, lane.finish())
                if i + len(lanes) < len(chunks):
                    self._launch_chunk(launch, lane, chunks[i + len(lanes)])
            _record(launch.arrived, stream)

    def _hear(self, launch: _Launch, timeout: timedelta) -> None:
        if not launch.is_heard:
            await_event(launch.heard, timeout)
            launch.is_heard = True

    @property
    def slots_on_device(self) -> Tensor:
        """(num_slots,) the slots' sum as of the exchange that has landed last."""
        return self._header[_LEAD:]

    def has_heard(self) -> None:
        """Says that the host has waited for an exchange that has landed, by an event behind it."""
        if self._launched is not None:
            self._launched.is_heard = True

    def land(self, timeout: timedelta | None = None) -> None:
        """Completes an exchange in the order of the caller's stream; the host waits after an abstention alone.

        ``drain`` does the rest: counts it and takes over its slots.

        Args:
            timeout: makes the host wait for the device, at most so long: not even that may be left waiting.

        Raises:
            TransportError: it could not be completed.
        """
        launch = self._launched
        if launch is None or launch.has_landed:
            return
        caller = torch.cuda.current_stream(self._value.device)
        with self._failing():
            if launch.delta is None:
                self._hear(launch, self._timeout if timeout is None else timeout)
            self.enqueue_rest()
            if timeout is not None:
                self._hear(launch, timeout)
                await_event(launch.arrived, timeout)
        _record(launch.asked, caller)
        caller.wait_event(launch.arrived)
        launch.has_landed = True
        if launch.delta is not None or self._heard[0] > 0:
            self._take_sum()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except TransportError:
            raise
        except RuntimeError as error:
            self._launched, self._failed = None, True
            if self._group is not None:
                self._group.revoke()  # before NCCL's own watch ends the process
            with suppress(RuntimeError):  # a device that has failed itself runs nothing more
                self._come_after()
            raise TransportError(
                f"replica {self.replica} of {self.num_replicas}: an all-reduce did not complete and was not applied: "
                f"{error}"
            ) from error

    def _come_after(self) -> None:
        """Lets the caller's stream wait for ours, whose operations have been given up: memory is freed in its order."""
        torch.cuda.current_stream(self._value.device).wait_stream(self._stream)

    def drain(self, timeout: timedelta | None = None) -> None:
        launch = self._launched
        if launch is None:
            return
        began = time.perf_counter()
        adds = launch.delta is not None
        self.land(timeout)
        with self._failing():
            self._hear(launch, self._timeout if timeout is None else timeout)
        self._launched = launch.delta = None
        self.traffic.exposed_s += time.perf_counter() - began
        self._timed.append(launch)
        self._measure()
        heard = self._heard
        self._is_refused = self._is_refused or (adds and not heard[-1] > 0)
        for first, numbers in launch.late:  # announced once more with what is sent next, until there are newer ones
            self.announcement[first : first + numbers.numel()] = numbers
        self._note(heard[_LEAD:-1], int(heard[1]), int(heard[0]), adds=adds)

    def _measure(self) -> None:
        """Takes in the times of exchanges that are over on the device by now."""
        while self._timed:
            first: Any = self._timed[0]  # its events' methods are not annotated
            if not (first.asked.query() and first.arrived.query()):
                break
            self._timed.popleft()
            waited_s = elapsed_s(first.asked, first.arrived)
            self.traffic.exposed_s += waited_s
            self.traffic.hidden_s += max(0.0, elapsed_s(first.begun, first.arrived) - waited_s)

    def close(self) -> None:
        launch, self._launched = self._launched, None
        group = self._group
        if self._place is not None:
            self._place.forget(self)
        self._timed.clear()
        try:
            if group is not None and launch is not None:
                group.revoke()
                with suppress(RuntimeError):  # as above
                    self._come_after()
        finally:
            super().close()


def _record(event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    event.record(stream)
