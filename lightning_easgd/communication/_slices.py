"""A center that the ranks of one replica reach together: each carries a slice, and the replica gathers them.

Where k ranks (the *members*) train one replica with equal parameters, each of them holds the whole delta. Instead of
sending it k times, member j reaches the j-th of k slices of the center through an ordinary transport, with the j-th
members of the other replicas, and what it reads is gathered inside the replica. Each number crosses between replicas
once per replica, over k links at once. Neither the algorithm nor the transport knows of it.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import AllgatherOptions, Group
from lightning_easgd.communication._line import await_event, is_finite, new_event, new_stream
from lightning_easgd.communication._transport import (
    Completed,
    NonFiniteDeltaError,
    OpenCenter,
    Outstanding,
    TransportError,
)
from lightning_easgd.interfaces import Exchange, Snapshot

__all__ = ["SlicedCenter", "open_sliced"]

_COMPLETED, _REFUSED, _FAILED = 0, 1, 2  # how a member's operation has ended; the largest decides for all


def open_sliced(
    initial: Tensor,
    open_slice: Callable[[Tensor], OpenCenter],
    group: Group,
    *,
    member: int,
    replica_size: int,
    timeout: timedelta,
) -> "SlicedCenter":
    """Opens a center whose slices are carried by the members of a replica. Collective over all replicas, blocking.

    Args:
        initial: (d,) float32 or float64, the same on all members; replica 0's becomes the center. Neither kept nor
            modified.
        open_slice: opens this member's slice, which it is given, (n,) with n about d / replica_size, or 0 where there
            are more members than numbers. It must be the center of the ``member``-th members of all replicas, alone;
            with the same number of slots on all members.
        group: a process group of this replica's members, in their order, for tensors on the device of ``initial``.
            Borrowed until ``close``. Other collectives may run in it if all members start them in the same order.
        member: index of the caller, 0 <= member < replica_size.
        replica_size: number of members.
        timeout: the longest wait for the other members in any operation.

    Raises:
        ValueError: ``member`` is out of range.
        TransportError: not all members came in time; also whatever ``open_slice`` raises.
    """
    if not 0 <= member < replica_size:
        raise ValueError(f"open_sliced(member={member}): must be at least 0 and below replica_size={replica_size}")
    size = -(-initial.numel() // replica_size)
    part = _slice(member, size)
    inner = open_slice(initial[part])
    kind = _SynchronousCenter if inner.synchronous else _AsynchronousCenter
    try:
        gather = _Gather(group, initial, size, replica_size, inner.announced.numel())
        return kind(inner, gather, initial, part, member, timeout)
    except BaseException:
        inner.close()
        raise


class SlicedCenter(OpenCenter):
    """The center as one member of a replica reaches it. Made by ``open_sliced``.

    ``pull``, ``push``, ``exchange``, ``abstain``, ``drain`` and ``load_state_dict`` are collective among the members:
    all make the same calls in the same order, with bit-identical deltas, and read bit-identical values and slots. Each
    of these calls blocks for its members at most ``timeout`` beyond what the slice's center takes. Whatever one
    member's slice meets while it is gathered, all members raise, and ``value`` stays what it was.

    What the slice's center counts is the slice's own and may differ between members over an asynchronous transport:
    ``clock`` and ``Snapshot.clock`` (``read_at`` goes back to the same slice), ``lost()``, ``state_dict``, and
    staleness and drift in ``traffic``. ``traffic.bytes_sent`` is what left for other replicas alone, over the members
    the bytes of one copy of the vector; ``exposed_s`` includes the gathering. Of what the members announce, member 0's
    counts. A rule sees one slice, so that an ``OuterOptimizer`` must be elementwise (Adam is, Adafactor is not).

    Memory: the whole vector, and once more for the message, beside the slice's center.

    Attributes:
        member: index of this rank in its replica.
        replica_size: number of members.
    """

    def __init__(
        self, inner: OpenCenter, gather: "_Gather", initial: Tensor, part: slice, member: int, timeout: timedelta
    ) -> None:
        super().__init__(
            replica=inner.replica,
            num_replicas=inner.num_replicas,
            num_slots=inner.announced.numel(),
            dtype=initial.dtype,
        )
        self.member, self.replica_size = member, gather.replica_size
        self.announcement, self.traffic = inner.announcement, inner.traffic
        self._inner, self._part, self._timeout = inner, part, timeout
        self._gather: _Gather | None = gather
        self._failure = ""
        self._value = torch.empty_like(initial)
        self._together("opening", lambda: inner.value, self._value, timeout)

    @property
    def value(self) -> Tensor:
        """(d,) the whole center as it was gathered last. Neither waits nor asks anybody. Not a copy."""
        return self._value

    @property
    def clock(self) -> int:
        """The additions that the own slice had seen in its last completed operation."""
        return self._inner.clock

    @property
    def additions(self) -> int:
        """The deltas that the own slice had received then."""
        return self._inner.additions

    def announce_late(self, first: int, numbers: Tensor) -> None:
        """See ``OpenCenter.announce_late``."""
        self._inner.announce_late(first, numbers)

    def lost(self) -> list[int]:
        """Returns the replicas whose member of this index is known to have ended; see ``OpenCenter.lost``."""
        return self._inner.lost()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the own slice, the rule's memory included; see ``OpenCenter.state_dict``.

        After a failed exchange one slice's may be an exchange ahead of another's and of ``value``.
        """
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any], value: Tensor) -> None:
        """Restores the center from the own slice's ``state`` and the whole ``value`` (d,). Collective over all ranks.

        Raises:
            TransportError: not all replicas, or not all members, came in time.
        """
        self._require_usable()

        def load() -> Tensor:
            self._inner.load_state_dict(state, value[self._part])
            self.traffic = self._inner.traffic
            return self._inner.value

        self._together("restoring", load, self._value, self._timeout)

    def close(self) -> None:
        """Closes the own slice's center and forgets the group, without waiting for anybody. Idempotent."""
        self._inner.close()
        self._gather = None
        self._value = self._value.new_empty(0)

    def new_vector(self) -> Tensor:
        return torch.empty_like(self._value)

    @property
    def _slots(self) -> Tensor:
        return self._inner.announced

    @property
    def _who(self) -> str:
        return f"replica {self.replica} of {self.num_replicas}, member {self.member} of {self.replica_size}"

    def _require_usable(self) -> "_Gather":
        if self._gather is None:
            raise TransportError(f"{self._who}: the sliced center is closed")
        if self._failure:
            raise TransportError(f"{self._who}: the center cannot go on after a failure: {self._failure}")
        return self._gather

    def _refuse(self, delta: Tensor) -> None:
        """Raises ``NonFiniteDeltaError`` on all members alike, since all look at the whole delta.

        A synchronous center's on a device is told what has been found there, and raises with its next exchange.
        """
        if delta.is_cuda and self.synchronous:
            if delta.numel() > 0:
                self._inner.verdict = is_finite(delta)
            return
        began = time.perf_counter()
        self._refuse_nonfinite(delta)
        self.traffic.exposed_s += time.perf_counter() - began

    def _together(self, operation: str, complete: Callable[[], Tensor], into: Tensor, timeout: timedelta) -> None:
        """Completes an operation of each member's slice and gathers the slices; collective among the members.

        Args:
            operation: what errors call it.
            complete: completes the own slice's operation and returns its result, (n,).
            into: (d,) receives the slices; untouched unless all members have completed theirs.
            timeout: the longest wait for the members, ``complete`` included.

        Raises:
            NonFiniteDeltaError: some member's slice refused its part, and none failed.
            TransportError: some member's slice failed, or a member did not come.
        """
        gather = self._require_usable()
        deadline = time.monotonic() + timeout.total_seconds()
        part, outcome = into[self._part], _COMPLETED
        error: NonFiniteDeltaError | TransportError | None = None
        try:
            part = complete()
        except NonFiniteDeltaError as caught:
            outcome, error = _REFUSED, caught
        except TransportError as caught:
            outcome, error = _FAILED, caught
        began = time.perf_counter()
        try:
            outcomes = gather(part, self._slots, outcome, max(deadline - time.monotonic(), 1e-3))
        except RuntimeError as lost:
            self._failure = f"the {operation} of the members' slices was not gathered: {lost}"
            raise error or TransportError(f"{self._who}: {self._failure}") from lost
        finally:
            self.traffic.exposed_s += time.perf_counter() - began
        worst = max(outcomes)
        if worst == _COMPLETED:
            gather.deliver(into, self.announced)
            return
        if error is not None and outcome == worst:
            raise error
        whose = [member for member, outcome in enumerate(outcomes) if outcome == worst]
        if worst == _REFUSED:
            raise NonFiniteDeltaError(
                f"{self._who}: numbers of its delta in the slices of the members {whose} are not finite; these slices "
                "were kept out of the center"
            ) from error
        raise TransportError(f"{self._who}: the {operation} of the members {whose} failed") from error


class _SynchronousCenter(SlicedCenter):
    """All members' slices complete their n-th exchange, then the whole center is gathered."""

    synchronous = True

    _is_outstanding = False
    _has_landed = False  # the own slice's exchange, whose slots the host has not seen

    @property
    def _slots(self) -> Tensor:
        return self._inner.slots_on_device if self._has_landed else self._inner.announced  # type: ignore[attr-defined]

    def pull(self) -> Snapshot:
        self._require_usable()
        self.drain()
        return Snapshot(self._value, self.clock)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._require_usable()
        self.drain()
        self._refuse(delta)
        self._inner.push(delta[self._part], read_at=read_at)
        self._is_outstanding = True

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        delta(x, self.pull().value)
        self._refuse(x)
        # The slice's center scales and weighs in one rounding, as it would the whole vector.
        self._inner.exchange(x[self._part], _keep, scale=scale).wait()
        self._is_outstanding = True
        return Completed(x)

    def abstain(self) -> None:
        self._require_usable()
        self.drain()
        self._inner.abstain()
        self._is_outstanding = True

    def drain(self, timeout: timedelta | None = None) -> None:
        if not self._is_outstanding:
            return
        self._is_outstanding = False
        limit = self._timeout if timeout is None else timeout

        device: Any = self._inner if self._value.is_cuda else None

        def complete() -> Tensor:
            if device is None:
                self._inner.drain(limit)
            else:  # the host waits once: for the gathered slots, which come behind the slice
                device.land(timeout)
                self._has_landed = True
            return self._inner.value

        try:
            self._together("exchange", complete, self._value, limit)
            if device is not None:
                device.has_heard()
                device.drain(timeout)
        except TransportError as error:
            self._failure = self._failure or str(error)  # slices of different exchanges make no center
            raise
        finally:
            self._has_landed = False

    def close(self) -> None:
        self._is_outstanding = False
        super().close()


class _AsynchronousCenter(SlicedCenter):
    """Each member reads and adds to its slice when it likes; what the replica must agree on is gathered."""

    synchronous = False

    _pending: "_Pending | None" = None

    def pull(self) -> Snapshot:
        self._begin_operation()
        self._together("pull", lambda: self._inner.pull().value, self._value, self._timeout)
        return Snapshot(self._value, self.clock)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._begin_operation()
        self._refuse(delta)
        self._inner.push(delta[self._part], read_at=read_at)

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """See ``Center.exchange``. ``delta`` sees the own slice alone; ``wait`` gathers what all slices received.

        Raises:
            NonFiniteDeltaError: ``x`` is not finite, and nothing was added; or, from ``wait``, a difference of finite
                numbers is not, and what the other slices received stays in the center.
        """
        self._begin_operation()
        self._refuse(x)
        pending = self._pending = _Pending(x)
        try:
            pending.inner = self._inner.exchange(x[self._part], delta, scale=scale)
        except (NonFiniteDeltaError, TransportError) as error:
            pending.error = error  # the other members learn of it where they wait for this one
        return Outstanding(x, complete=lambda: self._complete(pending))

    def abstain(self) -> None:
        self._begin_operation()
        self._inner.abstain()

    def drain(self, timeout: timedelta | None = None) -> None:
        limit = self._timeout if timeout is None else timeout
        if self._pending is None:
            self._inner.drain(limit)
        else:
            self._settle(lambda: self._inner.drain(limit), limit)

    def close(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.error = TransportError(f"{self._who}: the center was closed before its exchange was complete")
        super().close()

    def _begin_operation(self) -> None:
        self._require_usable()
        self._inner.measures_drift = self.measures_drift
        if self._pending is not None:
            self._settle(lambda: None, self._timeout)

    def _complete(self, pending: "_Pending") -> None:
        if self._pending is pending:
            self._settle(lambda: None, self._timeout)
        elif pending.error is not None:  # another operation has met it
            raise pending.error

    def _settle(self, prepare: Callable[[], None], timeout: timedelta) -> None:
        """Completes the outstanding exchange, after ``prepare``."""
        pending, self._pending = self._pending, None
        assert pending is not None

        def complete() -> Tensor:
            if pending.inner is None:
                assert pending.error is not None
                raise pending.error
            prepare()
            return pending.inner.wait()

        try:
            self._together("exchange", complete, pending.x, timeout)
        except (NonFiniteDeltaError, TransportError) as error:
            pending.error = error
            raise


class _Pending:
    """An exchange of the whole vector, of which each member does a slice.

    Attributes:
        x: (d,) the caller's.
        inner: the own slice's; None if it could not begin.
        error: why it could not begin, or how it ended.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.inner: Exchange | None = None
        self.error: Exception | None = None


class _Gather:
    """Sends one row per member to all members: its slice, its slots, and how its operation has ended.

    Args:
        group: of the members.
        like: has the vector's dtype and device.
        size: of a slice; the last ones may be shorter.
        replica_size: number of members.
        num_slots: number of slots.
    """

    def __init__(self, group: Group, like: Tensor, size: int, replica_size: int, num_slots: int) -> None:
        self.replica_size = replica_size
        self._group, self._size = group, size
        # Rows of one length, though slices differ: a collective's messages may not. Beyond a slice there are zeros.
        self._own = like.new_zeros(size + num_slots + 1)
        self._rows = like.new_empty(replica_size, self._own.numel())
        # What the host reads of the rows: slots and outcomes.
        self._told = torch.empty(replica_size, num_slots + 1, dtype=like.dtype, pin_memory=like.is_cuda)
        self._stream: Any = new_stream(like.device) if like.is_cuda else None  # its methods are not annotated

    def __call__(self, part: Tensor, slots: Tensor, outcome: int, timeout_s: float) -> list[int]:
        """Returns all members' outcomes. ``RuntimeError`` if they are not there in time; the group is over then."""
        self._own[: part.numel()].copy_(part)
        self._own[self._size : -1].copy_(slots)
        self._own[-1:].fill_(outcome)
        if self._rows.is_cuda:
            return self._gather_on_device(timedelta(seconds=timeout_s))
        options = AllgatherOptions()
        # The operation's own, too: a group waits for its operations when it is destroyed.
        timeout = options.timeout = timedelta(seconds=timeout_s)
        self._group.allgather([list(self._rows)], [self._own], options).wait(timeout)
        self._told.copy_(self._rows[:, self._size :])
        return self._outcomes

    def _gather_on_device(self, timeout: timedelta) -> list[int]:
        group: Any = self._group
        caller: Any = torch.cuda.current_stream(self._rows.device)
        self._stream.wait_stream(caller)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            if hasattr(group, "_allgather_base"):  # into the rows as they lie
                group._allgather_base(self._rows.view(-1), self._own).wait()
            else:  # a list of them is gathered through a buffer as large
                group.allgather([list(self._rows)], [self._own]).wait()
            self._told.copy_(self._rows[:, self._size :], non_blocking=True)
            gathered = new_event()
            gathered.record(self._stream)
        caller.wait_event(gathered)
        await_event(gathered, timeout)
        return self._outcomes

    @property
    def _outcomes(self) -> list[int]:
        return [int(outcome) for outcome in self._told[:, -1].tolist()]

    def deliver(self, vector: Tensor, slots: Tensor) -> None:
        """Writes the slices that were gathered to ``vector`` (d,), and member 0's slots to ``slots``."""
        for member, row in enumerate(self._rows):
            part = vector[_slice(member, self._size)]
            part.copy_(row[: part.numel()])
        slots.copy_(self._told[0, :-1])


def _slice(member: int, size: int) -> slice:
    return slice(member * size, (member + 1) * size)  # indexing cuts off what reaches beyond the end


def _keep(x: Tensor, center: Tensor) -> None:
    """Takes ``x`` itself for the delta."""
    del x, center
