"""The replicated center on a CUDA device: the caller's thread enqueues all of it, and there is no other."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._line import Place, await_event, elapsed_s, finite_or_zero_, new_event, new_stream
from lightning_easgd.communication._transport import Completed, Outstanding, TransportError
from lightning_easgd.communication._wire import Chunk, Lane, Wire
from lightning_easgd.communication.all_reduce._replicated_center import ReplicatedCenter
from lightning_easgd.interfaces import Exchange
from lightning_easgd.rules import CenterRule

__all__ = ["DeviceCenter"]

_LEAD = 2  # numbers before the slots in a device's header
_NUM_TIMED = 8  # exchanges whose times are yet to be read from the device


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


class DeviceCenter(ReplicatedCenter):
    """The center on a CUDA device. Everything is enqueued by the caller's thread, on a stream beside the caller's.

    So all replicas' operations have one order, the program's, and the host waits for the device once per exchange: for
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
        return Outstanding(x, release=lambda: self._give_back(launch))

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
            self._other = self.new_vector()
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
