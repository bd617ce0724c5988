"""The wire protocol between a replica and a host that serves a center: a two-rank Gloo session, server and client.

A message is a header of int64 and, for some operations, a payload; both ends know all sizes beforehand, from ``Terms``.
The server is rank 0, the client rank 1. The slots ride in the header, float64 bit by bit::

    client -> server    operation, argument, slots                       argument: the clock that a push was read at
    server -> client    clock, staleness, lost (1 per replica), slots    staleness: of this client's last push

    PULL        answered: header, payload           PUSH     header, payload; not answered
    PULL_EXACT  the same, never rounded             ABSTAIN  header; not answered
    FLUSH       answered: header                    CLOSE    header; not answered
    MEMORY      answered: the rule's vectors        WRITE    header (argument: clock), value, vectors; answered: header

Messages arrive in the order in which they were sent, so that what answers a flush has seen every push before it.

With the wire in bfloat16 no rounding error is ever lost. Up, the client adds what rounding took from one delta to the
next. Down, both ends keep what the client has; the server sends the rounded difference to the center and both add it.
"""

import contextlib
import copy
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import Literal

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Group, Work
from lightning_easgd.communication._shared_center import SharedCenter
from lightning_easgd.communication._transport import TransportError
from lightning_easgd.communication._wire import blocks
from lightning_easgd.rules import CenterRule

__all__ = ["FAREWELL", "Channel", "Session", "SessionServer", "Terms", "Wire", "serve"]

log = logging.getLogger(__name__)

Wire = Literal["float32", "bfloat16"]

_PULL, _PULL_EXACT, _PUSH, _ABSTAIN, _FLUSH, _MEMORY, _WRITE, _CLOSE = range(8)
_HEADER, _PAYLOAD, _EXACT, _CUT = range(4)  # tags: a receive that is posted meets only messages of its own size

# How long a server waits for a client that computes. Its end is noticed by the connection's, not by this.
_IDLE = timedelta(days=365)
FAREWELL = timedelta(seconds=2)
# How long a process that ends waits for its clients to have closed.
_LINGER = timedelta(seconds=30)
_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Terms:
    """The terms that both ends of every session of a center must agree on; sent as JSON through the store.

    Attributes:
        numel: length of the whole vector.
        dtype: "float32" or "float64".
        num_replicas: how many replicas share the center.
        num_slots: numbers that ride along.
        num_vectors: vectors that the rule remembers.
        wire: what payloads travel as; "float32" is the vector's own dtype.
        num_shards: slices of the vector.
    """

    numel: int
    dtype: str
    num_replicas: int
    num_slots: int
    num_vectors: int
    wire: str
    num_shards: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The vector's dtype."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def wire_dtype(self) -> torch.dtype:
        """The payloads' dtype."""
        return torch.bfloat16 if self.wire == "bfloat16" else self.torch_dtype

    def shard(self, index: int) -> slice:
        """Returns the slice of the vector that shard ``index`` holds: contiguous, sizes differ by at most one."""
        return slice(self.numel * index // self.num_shards, self.numel * (index + 1) // self.num_shards)

    def to_json(self) -> str:
        """Returns what ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Terms":
        """Returns the terms that were written so."""
        return cls(**json.loads(text))


class Channel:
    """One end of a session. An operation that fails, or that takes longer than it may, ends the session.

    Args:
        group: of two ranks.
        peer: the other one.
        timeout: of a wait, unless told otherwise.
    """

    def __init__(self, group: Group, peer: int, timeout: timedelta) -> None:
        self._group, self._peer, self._timeout = group, peer, timeout

    def expect(self, tensor: Tensor, tag: int) -> Work | None:
        """Begins to receive; None if there is nothing to."""
        return self._group.recv([tensor], self._peer, tag) if tensor.numel() else None

    def send(self, tensor: Tensor, tag: int, timeout: timedelta | None = None) -> int:
        """Sends a contiguous tensor, waits until it has left, and returns its size in bytes."""
        if tensor.numel():
            self._group.send([tensor], self._peer, tag).wait(timeout or self._timeout)
        return tensor.numel() * tensor.element_size()

    def finish(self, work: Work | None, timeout: timedelta | None = None) -> None:
        """Waits until what was expected is there."""
        if work is not None:
            work.wait(timeout or self._timeout)

    def receive(self, tensor: Tensor, tag: int) -> Tensor:
        """Receives into ``tensor`` and returns it."""
        self.finish(self.expect(tensor, tag))
        return tensor

    def send_vector(self, vector: Tensor) -> int:
        """Sends a whole vector in the center's dtype; returns its size in bytes."""
        return self.send(vector.contiguous(), _EXACT)

    def receive_vector(self, vector: Tensor) -> Tensor:
        """Receives what ``send_vector`` sent into ``vector``, of the same shape and dtype, and returns it."""
        return self.receive(vector, _EXACT)

    def cut(self) -> None:
        """Ends the session: threads that wait on it, at either end, wake. Safe from another thread; does not wait."""
        # Gloo gives up a connection on which a wait has run out, and offers no other way to wake one that waits.
        with contextlib.suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._peer, _CUT).wait(timedelta(milliseconds=1))


class Session:
    """The client's end: one shard of the center as a remote replica reaches it. For one thread at a time.

    Args:
        channel: to the server.
        terms: of the center.
        value: (n,) on the CPU, the replica's private copy of the shard; written by ``receive``.
        replica: the client.
        server: how errors name the other end.

    Attributes:
        clock: of the last answer.
        staleness: of this replica's last addition, as of the last answer.
        lost: replicas that had ended without closing, as of the last answer.
        announced: (num_slots,) float64, the slots' sum as of the last answer.
        bytes_sent: so far.
        wait_s: seconds spent waiting for the server so far.
    """

    def __init__(self, channel: Channel, terms: Terms, value: Tensor, *, replica: int, server: str) -> None:
        self.clock = self.staleness = self.bytes_sent = 0
        self.wait_s = 0.0
        self.lost: list[int] = []
        self.announced = torch.zeros(terms.num_slots, dtype=torch.float64)
        self._channel, self._terms, self._value, self._server = channel, terms, value, server
        self._replica = replica
        # With rounding there is a message of its own, for both ways. Else the center arrives where it stays, and a
        # delta is sent from where it lies.
        self._payload = torch.empty(value.shape, dtype=terms.wire_dtype) if self._rounds else value
        self._residual = torch.zeros_like(value) if self._rounds else None
        self._request = torch.zeros(2 + terms.num_slots, dtype=torch.int64)
        self._answer = torch.zeros(2 + terms.num_replicas + terms.num_slots, dtype=torch.int64)
        self._message = self._payload
        self._pending: tuple[Work | None, Work | None] = None, None

    @property
    def _rounds(self) -> bool:
        return self._terms.wire_dtype != self._terms.torch_dtype

    def request(self) -> None:
        """Asks for the center; ``receive`` takes the answer."""
        with self._named("asking for"):
            # Expected before it is asked for: the server need not first learn that there is room.
            self._pending = self._expect_answer(), self._channel.expect(self._payload, _PAYLOAD)
            self._send_request(_PULL)

    def receive(self) -> None:
        """Waits for the answer and brings the private copy up to date."""
        header, payload = self._pending
        with self._named("reading"):
            self._channel.finish(header)
            self._channel.finish(payload)
            self._read_answer()
            if self._rounds:
                self._value.add_(self._payload)

    def read_exactly(self) -> None:
        """Reads the center without rounding: where both ends begin to keep what the client has."""
        with self._named("reading"):
            header, payload = self._expect_answer(), self._channel.expect(self._value, _EXACT)
            self._send_request(_PULL_EXACT)
            self._channel.finish(header)
            self._channel.finish(payload)
            self._read_answer()

    def stage(self, delta: Tensor, scale: float) -> None:
        """Makes ``scale * delta`` the message of the next ``transmit``. Local.

        Args:
            delta: (n,) on the CPU, finite. Without rounding not copied: it must stand until ``transmit`` returns.
            scale: its factor; 1 without rounding.
        """
        if self._residual is None:
            assert scale == 1
            self._message = delta
            return
        for part, rest in blocks(delta, self._residual):
            rest.add_(part if scale == 1 else part * scale)
        # What even bfloat16's largest number falls short of stays behind, like any other rounding error.
        self._message = self._payload.copy_(self._residual).nan_to_num_(nan=math.nan)
        self._residual.sub_(self._payload)

    def transmit(self, read_at: int, slots: Tensor) -> None:
        """Sends what was staged, and the slots (float64). Returns when it has left."""
        with self._named("adding to"):
            self._send_request(_PUSH, read_at, slots)
            self.bytes_sent += self._channel.send(self._message, _PAYLOAD)

    def abstain(self, slots: Tensor) -> None:
        """Sends the slots alone."""
        with self._named("announcing to"):
            self._send_request(_ABSTAIN, 0, slots)

    def flush(self) -> None:
        """Returns when the server has done all that this session has sent."""
        with self._named("completing what was added to"):
            header = self._expect_answer()
            self._send_request(_FLUSH)
            self._channel.finish(header)
            self._read_answer()

    def memory(self) -> list[Tensor]:
        """Returns the rule's vectors."""
        with self._named("reading the memory of"):
            self._send_request(_MEMORY)
            vectors = range(self._terms.num_vectors)
            return [self._channel.receive_vector(torch.empty_like(self._value)) for _ in vectors]

    def write(self, value: Tensor, memory: list[Tensor], clock: int) -> None:
        """Replaces the center, the rule's vectors and the clock."""
        with self._named("writing"):
            header = self._expect_answer()
            self._send_request(_WRITE, clock)
            for vector in [value, *memory]:
                self.bytes_sent += self._channel.send_vector(vector)
            self._channel.finish(header)
            self._read_answer()

    def close(self) -> None:
        """Says goodbye, for two seconds at most, and leaves."""
        self._request[0] = _CLOSE
        with contextlib.suppress(RuntimeError):  # a peer that is gone need not be told
            self._channel.send(self._request, _HEADER, FAREWELL)

    def cut(self) -> None:
        """Leaves without telling the server; wakes a thread that waits for the server. Does not wait."""
        self._channel.cut()

    def _expect_answer(self) -> Work | None:
        return self._channel.expect(self._answer, _HEADER)

    def _send_request(self, operation: int, argument: int = 0, slots: Tensor | None = None) -> None:
        self._request[0], self._request[1] = operation, argument
        if slots is not None:
            self._request[2:].copy_(slots.view(torch.int64))
        self.bytes_sent += self._channel.send(self._request, _HEADER)

    def _read_answer(self) -> None:
        self.clock, self.staleness = int(self._answer[0]), int(self._answer[1])
        self.lost = self._answer[2 : 2 + self._terms.num_replicas].nonzero().view(-1).tolist()
        self.announced.copy_(self._answer[2 + self._terms.num_replicas :].view(torch.float64))

    @contextlib.contextmanager
    def _named(self, operation: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise TransportError(
                f"replica {self._replica} of {self._terms.num_replicas}: {operation} the center on {self._server} "
                f"failed after {time.perf_counter() - began:.1f} s: {error}"
            ) from error
        finally:
            self.wait_s += time.perf_counter() - began


def serve(channel: Channel, center: SharedCenter, terms: Terms, numel: int, count_sent: Callable[[int], None]) -> None:
    """Answers one client until it closes; blocks until then.

    Memory: a vector of the shard's length besides the handle's own copy; with the wire in bfloat16 two.

    Args:
        channel: to the client.
        center: the client's handle.
        terms: of the center.
        numel: length of the shard.
        count_sent: told how many bytes each answer has, before it is sent.

    Raises:
        RuntimeError: the client is gone, or was too slow in the middle of a message.
        TransportError: the center could not be reached.
        NonFiniteDeltaError: the client let a delta through that it should have refused.
    """
    rounds = terms.wire_dtype != terms.torch_dtype
    request = torch.zeros(2 + terms.num_slots, dtype=torch.int64)
    answer = torch.zeros(2 + terms.num_replicas + terms.num_slots, dtype=torch.int64)
    incoming = torch.empty(numel, dtype=terms.wire_dtype)
    held = torch.zeros(numel, dtype=terms.torch_dtype) if rounds else None  # what the client has

    def reply(payload: Tensor = _NOTHING, tag: int = _PAYLOAD) -> None:
        answer.zero_()
        answer[0], answer[1] = center.clock, center.traffic.staleness
        answer[[2 + replica for replica in center.lost()]] = 1
        answer[2 + terms.num_replicas :].copy_(center.announced.double().view(torch.int64))
        count_sent(answer.nbytes + payload.nbytes)
        channel.send(answer, _HEADER)
        channel.send(payload, tag)

    def announce() -> None:
        center.announcement.copy_(request[2:].view(torch.float64))

    delta = channel.expect(incoming, _PAYLOAD)  # ahead, so that a push need not ask whether there is room
    while True:
        channel.finish(channel.expect(request, _HEADER), _IDLE)
        operation, argument = int(request[0]), int(request[1])
        if operation == _PULL and held is not None:
            difference = (center.pull().value - held).to(terms.wire_dtype).nan_to_num_(nan=math.nan)
            held.add_(difference)
            reply(difference)
        elif operation == _PULL:
            reply(center.pull().value)
        elif operation == _PULL_EXACT:
            value = center.pull().value
            if held is not None:
                held.copy_(value)
            reply(value, _EXACT)
        elif operation == _PUSH:
            announce()
            channel.finish(delta)
            center.push(incoming.to(terms.torch_dtype), read_at=argument)
            delta = channel.expect(incoming, _PAYLOAD)
        elif operation == _ABSTAIN:
            announce()
            center.abstain()
        elif operation == _FLUSH:
            reply()
        elif operation == _MEMORY:
            for vector in center.state_dict()["memory"]:
                count_sent(vector.nbytes)
                channel.send_vector(vector)
        elif operation == _WRITE:
            value, *memory = (
                channel.receive_vector(torch.empty(numel, dtype=terms.torch_dtype))
                for _ in range(1 + terms.num_vectors)
            )
            center.overwrite(value, memory, argument)
            reply()
        else:
            return


class SessionServer:
    """The sessions of one shard, each served by a thread until its client closes or is lost.

    A session that breaks ends alone: its thread says so in the log, the client counts as lost, the others go on. A
    process that ends waits for its clients to close, 30 seconds at most, and then cuts the sessions that are open.

    Args:
        path: of the shard, from ``SharedCenter.create``.
        terms: of the center.
        numel: length of the shard.
        rule: the center's.
        timeout: of every wait but that for a client's next request.
    """

    def __init__(self, path: str, terms: Terms, numel: int, rule: CenterRule, timeout: timedelta) -> None:
        self._path, self._terms, self._numel, self._rule, self._timeout = path, terms, numel, rule, timeout
        self._lock = threading.Lock()
        self._bytes_sent = 0
        self._sessions: list[_ServedSession] = []

    def accept(self, replica: int, channel: Channel) -> None:
        """Serves one client from now on. Does not wait."""
        center = SharedCenter(
            self._path,
            replica=replica,
            num_replicas=self._terms.num_replicas,
            num_slots=self._terms.num_slots,
            rule=copy.deepcopy(self._rule),
            timeout=self._timeout,
        )
        self._sessions.append(_ServedSession(channel, center, self._terms, self._numel, self._count_sent))

    def take_bytes_sent(self) -> int:
        """Returns the bytes that all sessions have sent since the last call."""
        with self._lock:
            taken, self._bytes_sent = self._bytes_sent, 0
        return taken

    def join(self, timeout: float) -> bool:
        """Waits for all sessions to end, ``timeout`` seconds at most, and returns whether they have."""
        return _join(self._sessions, timeout)

    def stop(self) -> None:
        """Cuts the sessions that are open. Waits for their threads, two seconds at most."""
        _stop(self._sessions)

    def lost(self) -> list[int]:
        """Returns the clients whose session broke."""
        return [session.replica for session in self._sessions if session.is_lost]

    def _count_sent(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes_sent += num_bytes


class _ServedSession:
    """One client's session and the thread that serves it.

    Attributes:
        replica: the client.
        thread: ends with the session.
        is_lost: whether the client has gone without a goodbye.
    """

    def __init__(
        self, channel: Channel, center: SharedCenter, terms: Terms, numel: int, count_sent: Callable[[int], None]
    ) -> None:
        self.replica = center.replica
        self.is_lost = False
        self._is_stopping = False
        self._channel: Channel | None = channel
        self._center, self._terms, self._numel, self._count_sent = center, terms, numel, count_sent
        name = f"lightning_easgd-session-{self.replica}"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        _running.add(self)
        _end_sessions_at_exit()
        self.thread.start()

    def stop(self) -> None:
        """Cuts the session. Does not wait for its thread."""
        self._is_stopping = True
        channel = self._channel
        if channel is not None:
            channel.cut()

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            # The group is taken down here, not when somebody forgets the session, which may be the interpreter's end.
            self._channel = None
            _running.discard(self)

    def _serve(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            serve(channel, self._center, self._terms, self._numel, self._count_sent)
        except Exception as error:  # whatever it is ends this session, and no other
            channel.cut()
            # Its locks are given back as if it had been killed: the others see that it did not leave of itself.
            self._center.abandon()
            if not self._is_stopping:
                self.is_lost = True
                log.warning("the session of replica %d ended without a goodbye: %s", self.replica, error)
        else:
            self._center.close()


_running: set[_ServedSession] = set()


def _join(sessions: Iterable[_ServedSession], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    for session in sessions:
        session.thread.join(max(0.0, deadline - time.monotonic()))
    return not any(session.thread.is_alive() for session in sessions)


def _stop(sessions: Iterable[_ServedSession]) -> None:
    for session in sessions:
        session.stop()
    _join(sessions, FAREWELL.total_seconds())


def _end_sessions() -> None:
    # A thread that is still in torch when the interpreter is taken down ends the process with an abort.
    sessions = list(_running)
    if not _join(sessions, _LINGER.total_seconds()):
        _stop(sessions)


_finalized_pid: int | None = None


def _end_sessions_at_exit() -> None:
    """Has the sessions of this process ended when it exits, however often it is called."""
    # Unlike ``atexit``, this is called in the processes of ``multiprocessing`` too. What was registered before a fork
    # is forgotten there, so that registering when the module is imported would not do.
    global _finalized_pid
    if _finalized_pid != os.getpid():
        _finalized_pid = os.getpid()
        Finalize(None, _end_sessions, exitpriority=100)
