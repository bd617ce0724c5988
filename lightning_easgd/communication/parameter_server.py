"""A center that replicas on several hosts share: one of them serves it, the others add to it when they like.

The center lies in shared memory on the server's host. Replicas there attach to it directly; each of the others has a
session with the server (``_session.py``), a two-rank Gloo group found through the store, and a thread on the server's
side that reads and adds in its name. A replica waits for the server alone, never for another replica.
"""

import contextlib
import inspect
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for
from datetime import timedelta
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from lightning_easgd import rules
from lightning_easgd.communication._c10d import PrefixStore, Store, TCPStore, new_group
from lightning_easgd.communication._host import host_identity
from lightning_easgd.communication._session import FAREWELL, Channel, Session, SessionServer, Terms, Wire
from lightning_easgd.communication._transport import OpenCenter, Traffic, Transport, TransportError, check_open
from lightning_easgd.communication.shared_memory import SharedCenter
from lightning_easgd.interfaces import Exchange, Snapshot
from lightning_easgd.rules import CenterRule

__all__ = ["ParameterServer", "connect", "decode_rule", "encode_rule"]

_CPU = torch.device("cpu")


def connect(store: Store, shard: int, replica: int, rank: int, timeout: timedelta) -> Channel:
    """Opens a replica's session with a shard; rank 0 is the server, 1 the replica. Blocks until both have come."""
    group = new_group(PrefixStore(f"session/{shard}/{replica}", store), rank, 2, _CPU, timeout)
    return Channel(group, 1 - rank, timeout)


def encode_rule(rule: CenterRule) -> str:
    """Returns a rule of ``lightning_easgd.rules`` as JSON, its class's name and its arguments: no code travels.

    Raises:
        ValueError: the rule is another one, or has an argument that JSON does not know.
    """
    kind = type(rule)
    try:
        if getattr(rules, kind.__name__, None) is not kind:
            raise TypeError("it is not in lightning_easgd.rules")
        arguments = {name: getattr(rule, name) for name in inspect.signature(kind).parameters}
        return json.dumps({"name": kind.__name__, "arguments": arguments})
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the center rule {rule!r} cannot be sent to a stand-alone server ({error}); let a replica serve: "
            "ParameterServer() without address"
        ) from error


def decode_rule(text: str) -> CenterRule:
    """Returns the rule that ``encode_rule`` wrote.

    Raises:
        ValueError: it names no rule of ``lightning_easgd.rules``.
    """
    given = json.loads(text)
    kind = getattr(rules, given["name"], None) if given["name"] in rules.__all__ else None
    if not (inspect.isclass(kind) and issubclass(kind, CenterRule)):
        raise ValueError(f"this version of lightning_easgd has no center rule {given['name']!r}")
    rule: CenterRule = kind(**given["arguments"])
    return rule


class ParameterServer(Transport):
    """Asynchronous transport over any number of hosts, on ``torch.distributed`` alone.

    By default the vector lies on the host of replica 0, which serves it beside its own training. With ``num_shards``
    it is cut into as many slices, the k-th served by the k-th host. With ``address`` none of the replicas serves, but
    a process of its own: ``python -m lightning_easgd.center``.

    Whose connection breaks counts as lost, and the others go on; when a server is gone, the next operation of its
    clients raises. ``close`` waits for nobody: a replica that serves goes on serving in the background until its
    clients have closed; its process, should it end before, first waits for that, 30 seconds at most.

    Memory: where a shard is served its slice, what the rule remembers, and for each session two slices (with
    ``wire="bfloat16"`` three and a half); in a remote replica the vector and a message (with bfloat16 two and a half).

    Args:
        num_shards: number of slices, >= 1, at most the number of hosts.
        wire: what numbers travel as: ``"float32"`` (the center's own dtype) or ``"bfloat16"``, half as many bytes.
            What rounding takes from a delta is added to the next one; what it takes from the center follows with the
            next pull.
        address: ``"host:port"`` of a stand-alone server, which holds one shard.

    Raises:
        ValueError: an argument is out of range.
    """

    synchronous = False

    def __init__(self, *, num_shards: int = 1, wire: Wire = "float32", address: str | None = None) -> None:
        if isinstance(num_shards, bool) or not isinstance(num_shards, int) or num_shards < 1:
            raise ValueError(f"ParameterServer(num_shards={num_shards!r}): must be an integer >= 1")
        if wire not in get_args(Wire):
            raise ValueError(f"ParameterServer(wire={wire!r}): must be one of {', '.join(map(repr, get_args(Wire)))}")
        if address is not None:
            host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
            if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
                raise ValueError(f"ParameterServer(address={address!r}): must be 'host:port', a port from 1 to 65535")
            if num_shards != 1:
                raise ValueError(
                    f"ParameterServer(address={address!r}, num_shards={num_shards}): a stand-alone server holds one "
                    "shard; leave num_shards out"
                )
        self.num_shards, self.wire, self.address = num_shards, wire, address

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
    ) -> OpenCenter:
        """Opens the center; see ``Transport.open``.

        Raises:
            ValueError: there are fewer hosts than shards, or the rule cannot travel to a stand-alone server.
        """
        check_open(self, initial, replica, num_replicas, rule)
        terms = Terms(
            numel=initial.numel(),
            dtype=str(initial.dtype).removeprefix("torch."),
            num_replicas=num_replicas,
            num_slots=num_slots,
            num_vectors=rule.num_vectors,
            wire=self.wire,
            num_shards=self.num_shards,
        )
        opening = _Opening(terms, initial, replica, rule, store, timeout)
        with contextlib.ExitStack() as undo:
            undo.callback(opening.undo)
            try:
                center = (
                    opening.among_replicas(self._host(replica)) if self.address is None else opening.at(self.address)
                )
            except TransportError:
                raise
            except RuntimeError as error:  # of the store or of a process group
                raise TransportError(f"{opening.who}: {error}") from error
            undo.pop_all()
        return center

    def _host(self, replica: int) -> str:
        """Returns which host a replica is on; tests put replicas of one machine apart."""
        del replica
        return host_identity()

    def __repr__(self) -> str:
        """Returns the constructor call, without defaults."""
        given = [f"num_shards={self.num_shards}"] if self.num_shards != 1 else []
        given += [f"wire={self.wire!r}"] if self.wire != "float32" else []
        given += [f"address={self.address!r}"] if self.address is not None else []
        return f"{type(self).__name__}({', '.join(given)})"


class _Opening:
    """One replica's way to an open center."""

    def __init__(
        self, terms: Terms, initial: Tensor, replica: int, rule: CenterRule, store: Store, timeout: timedelta
    ) -> None:
        self.who = f"replica {replica} of {terms.num_replicas} could not open the center"
        self._terms, self._initial, self._replica, self._rule = terms, initial, replica, rule
        self._timeout = timeout
        self._store = store
        self._assembly = _Assembly(store, replica, terms.num_replicas, timeout)
        self._vector = torch.empty(initial.shape, dtype=initial.dtype, pin_memory=initial.is_cuda)
        self._server: SessionServer | None = None
        self._attached: SharedCenter | None = None
        self._shards: list[_Shard] = []

    def among_replicas(self, host: str) -> OpenCenter:
        """Opens a center that some of the replicas serve. Collective."""
        terms, replica = self._terms, self._replica
        mine = {"host": host, "name": socket.gethostname(), "terms": terms.to_json()}
        all_of_them = [json.loads(text) for text in self._assembly.gather("open", json.dumps(mine))]
        for other, theirs in enumerate(all_of_them):
            if theirs["terms"] != all_of_them[0]["terms"]:
                raise TransportError(
                    f"{self.who}: replica {other} opens with {theirs['terms']}, replica 0 with "
                    f"{all_of_them[0]['terms']}"
                )
        hosts = [each["host"] for each in all_of_them]
        first_on = {h: hosts.index(h) for h in hosts}  # in the order of these replicas
        if terms.num_shards > len(first_on):
            raise ValueError(
                f"ParameterServer(num_shards={terms.num_shards}): each shard needs a host of its own, and there are "
                f"{len(first_on)}"
            )
        # All go through the pairs of shard and replica in one order, so that whoever waits is waited for by nobody.
        for shard, server in enumerate(list(first_on.values())[: terms.num_shards]):
            if replica == server:
                self._serve(shard, [r for r, h in enumerate(hosts) if h != host])
            elif hosts[server] == host:
                self._attach(shard, self._assembly.get(f"path/{shard}"))
            else:
                channel = connect(self._store, shard, replica, 1, self._timeout)
                self._join(channel, shard, f"{all_of_them[server]['name']} (replica {server})", brings=shard > 0)
        return self._center()

    def at(self, address: str) -> OpenCenter:
        """Opens a center that a process of its own serves. Collective."""
        host, _, port = address.rpartition(":")
        try:
            server = TCPStore(host, int(port), is_master=False, timeout=self._timeout)
        except RuntimeError as error:
            raise TransportError(
                f"{self.who}: no server at {address} (python -m lightning_easgd.center): {error}"
            ) from error
        if self._replica == 0:
            rule = encode_rule(self._rule)
            number = server.add("openings", 1)
            server.set(f"opening/{number}/request", json.dumps({"terms": self._terms.to_json(), "rule": rule}))
            # Replica 0 alone reads a refusal, after which the server ends, and passes it on.
            ours = PrefixStore(f"opening/{number}", server)
            ours.wait(["answer"], self._timeout)
            refusal = ours.get("answer").decode()
            if refusal:
                ours.add("read", 1)
            self._store.set("refusal", refusal)
            self._store.set("opening", str(number))
        number = int(self._assembly.get("opening"))
        ours = PrefixStore(f"opening/{number}", server)
        refusal = self._assembly.get("refusal")
        if refusal:
            raise TransportError(f"{self.who}: the server at {address} refuses: {refusal}")
        self._join(connect(ours, 0, self._replica, 1, self._timeout), 0, address, brings=True)
        return self._center()

    def undo(self) -> None:
        """Gives up what was opened."""
        for shard in self._shards:
            shard.cut()
        if self._server is not None:
            self._server.stop()
        if self._attached is not None:
            self._attached.close()

    def _serve(self, shard: int, clients: list[int]) -> None:
        part = self._initial[self._terms.shard(shard)].cpu()
        channels = {}
        if shard > 0:  # then replica 0 is on another host
            channels[0] = connect(self._store, shard, 0, 0, self._timeout)
            part = channels[0].receive_vector(torch.empty_like(part))
        terms = self._terms
        path = SharedCenter.create(part, num_replicas=terms.num_replicas, num_slots=terms.num_slots, rule=self._rule)
        self._server = SessionServer(path, terms, part.numel(), self._rule, self._timeout)
        self._attach(shard, path)
        self._store.set(f"path/{shard}", path)
        for client in clients:
            channel = channels.get(client) or connect(self._store, shard, client, 0, self._timeout)
            self._server.accept(client, channel)

    def _attach(self, shard: int, path: str) -> None:
        terms, whole = self._terms, self._terms.num_shards == 1
        self._attached = _AttachedCenter(
            path,
            replica=self._replica,
            num_replicas=terms.num_replicas,
            num_slots=terms.num_slots,
            rule=self._rule,
            timeout=self._timeout,
            device=self._initial.device if whole else _CPU,
            store=self._store if whole else None,
            assembly=self._assembly,
            server=self._server if whole else None,
        )
        if not whole:
            self._shards.append(_LocalShard(self._attached, self._vector[terms.shard(shard)]))

    def _join(self, channel: Channel, shard: int, server: str, *, brings: bool) -> None:
        part = self._terms.shard(shard)
        if brings and self._replica == 0:
            channel.send_vector(self._initial[part].cpu())
        session = Session(channel, self._terms, self._vector[part], replica=self._replica, server=server)
        self._shards.append(session)

    def _center(self) -> OpenCenter:
        center: OpenCenter
        if self._attached is not None and not self._shards:
            center = self._attached
        else:
            for shard in self._shards:
                shard.read_exactly()
            center = _DistantCenter(
                self._shards,
                self._terms,
                self._vector,
                replica=self._replica,
                rule=self._rule,
                device=self._initial.device,
                timeout=self._timeout,
                assembly=self._assembly,
                server=self._server,
            )
        self._assembly.gather("open", "")
        return center


class _Assembly:
    """Where all replicas of a center meet: rare, collective and blocking, each wait bounded by the timeout."""

    def __init__(self, store: Store, replica: int, num_replicas: int, timeout: timedelta) -> None:
        self._store, self._replica, self._num_replicas, self._timeout = store, replica, num_replicas, timeout
        self._number = 0

    def get(self, key: str) -> str:
        """Waits for a key and returns its value. ``TransportError`` if nobody sets it."""
        self._wait("open", [key], lambda: f"there is no {key!r} in the store")
        return self._store.get(key).decode()

    def gather(self, purpose: str, mine: str) -> list[str]:
        """Waits for all replicas and returns what each has brought. ``TransportError`` if not all come."""
        self._number += 1
        keys = [f"assembly/{self._number}/{replica}" for replica in range(self._num_replicas)]
        self._store.set(keys[self._replica], mine)
        self._wait(
            purpose,
            keys,
            lambda: f"no sign of the replicas {[r for r, k in enumerate(keys) if not self._store.check([k])]}",
        )
        return [self._store.get(key).decode() for key in keys]

    def _wait(self, purpose: str, keys: list[str], missing: Callable[[], str]) -> None:
        try:
            self._store.wait(keys, self._timeout)
        except RuntimeError as error:
            raise TransportError(
                f"replica {self._replica} of {self._num_replicas} could not {purpose} the center: {missing()} for "
                f"{self._timeout.total_seconds():g} s"
            ) from error


class _AttachedCenter(SharedCenter):
    """The center in a replica on the server's host. The replicas meet elsewhere than those of ``SharedMemory``."""

    def __init__(self, path: str, *, assembly: _Assembly, server: SessionServer | None, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self._assembly, self._server = assembly, server

    def _begin_operation(self) -> None:
        super()._begin_operation()
        if self._server is not None:
            self.traffic.bytes_sent += self._server.take_bytes_sent()

    def _meet(self, where: str) -> None:
        del where
        self._assembly.gather("restore", "")


class _Shard(Protocol):
    """A slice of the center as a ``_DistantCenter`` reaches it; ``Session`` says what each name means."""

    clock: int
    staleness: int
    lost: list[int]
    announced: Tensor
    bytes_sent: int
    wait_s: float

    def request(self) -> None: ...

    def receive(self) -> None: ...

    def read_exactly(self) -> None: ...

    def stage(self, delta: Tensor) -> None: ...

    def transmit(self, read_at: int, slots: Tensor) -> None: ...

    def abstain(self, slots: Tensor) -> None: ...

    def flush(self) -> None: ...

    def memory(self) -> list[Tensor]: ...

    def write(self, value: Tensor, memory: list[Tensor], clock: int) -> None: ...

    def close(self) -> None: ...

    def cut(self) -> None: ...


class _LocalShard:
    """A shard that lies on the replica's own host, behind the names of ``Session``.

    Args:
        center: the replica's handle.
        value: (n,) on the CPU, the replica's private copy; written by ``receive``.
    """

    def __init__(self, center: SharedCenter, value: Tensor) -> None:
        self.clock = self.staleness = self.bytes_sent = 0
        self.wait_s = 0.0
        self.lost: list[int] = []
        self.announced = torch.zeros(center.announced.shape, dtype=torch.float64)
        self._center, self._value = center, value
        self._message = torch.empty_like(value)

    def request(self) -> None:
        pass  # there is nobody to ask

    def receive(self) -> None:
        self._value.copy_(self._center.pull().value)
        self.flush()

    read_exactly = receive

    def stage(self, delta: Tensor) -> None:
        self._message.copy_(delta)

    def transmit(self, read_at: int, slots: Tensor) -> None:
        self._center.announcement.copy_(slots)
        self._center.push(self._message, read_at=read_at)

    def abstain(self, slots: Tensor) -> None:
        self._center.announcement.copy_(slots)
        self._center.abstain()

    def flush(self) -> None:
        self.clock, self.staleness = self._center.clock, self._center.traffic.staleness
        self.wait_s, self._center.traffic.wait_s = self._center.traffic.wait_s, 0.0
        self.lost = self._center.lost()
        self.announced.copy_(self._center.announced)

    def memory(self) -> list[Tensor]:
        memory: list[Tensor] = self._center.state_dict()["memory"]
        return memory

    def write(self, value: Tensor, memory: list[Tensor], clock: int) -> None:
        self._center.overwrite(value, memory, clock)

    def close(self) -> None:
        self._center.close()

    cut = close


class _DistantCenter(OpenCenter):
    """The center in a replica that does not share the memory of all of it.

    What takes a server's time goes on in a thread beside the caller, one operation at a time: a push, or a whole
    exchange. ``value`` may change while an exchange is outstanding.
    """

    synchronous = False

    def __init__(
        self,
        shards: list[_Shard],
        terms: Terms,
        vector: Tensor,
        *,
        replica: int,
        rule: CenterRule,
        device: torch.device,
        timeout: timedelta,
        assembly: _Assembly,
        server: SessionServer | None,
    ) -> None:
        super().__init__(
            replica=replica, num_replicas=terms.num_replicas, num_slots=terms.num_slots, dtype=terms.torch_dtype
        )
        self._terms, self._rule, self._timeout = terms, rule, timeout
        self._assembly, self._server = assembly, server
        self._shards = [(shard, terms.shard(k)) for k, shard in enumerate(shards)]
        self._vector = vector  # on the CPU; the shards write their slices
        self._value = vector.to(device)  # the same tensor where the replica is on the CPU
        self._stream = _new_stream(device)
        self._outbox: Tensor | None = None  # a delta on its way to the messages
        self._expected: Tensor | None = None  # where the center would be next time, if nobody else added to it
        self._unconfirmed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lightning_easgd-client")
        self._work: _Work | None = None
        self._is_closed = False
        self._take_in()
        self._note()

    @property
    def value(self) -> Tensor:
        return self._value

    @property
    def clock(self) -> int:
        return self._clock

    def pull(self) -> Snapshot:
        self._begin_operation()
        with self._exposed():
            self._read()
        self._note()
        return Snapshot(self._value, self.clock)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds ``delta`` to the center; returns as soon as it is copied. See ``OpenCenter.push``.

        Where asked for, ``traffic.drift`` is how far the next pull finds the center from where this delta alone would
        have taken it from the last one.
        """
        self._begin_operation()
        with self._exposed():
            self._refuse_nonfinite(delta)
            self._stage(delta, 1.0, measure=self.measures_drift)
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

        def work() -> None:
            with self._on_stream():
                self._read()
                delta(x, self._value)
                self._refuse_nonfinite(x)
                self._stage(x, scale, measure=measure)
            self._transmit(self._clock, slots)
            self.traffic.exchanges += 1

        return _Pending(self, self._start(work), x)

    def abstain(self) -> None:
        self._begin_operation()
        slots = self.announcement.double()
        self._start(lambda: self._abstain(slots))

    # --- what may go on in the thread -------------------------------------------------------------------------------

    def _read(self) -> None:
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

    def _stage(self, delta: Tensor, scale: float, *, measure: bool) -> None:
        if delta.is_cuda or scale != 1:  # through a vector that stays, pinned where a device copies into it
            if self._outbox is None:
                self._outbox = torch.empty(delta.numel(), dtype=delta.dtype, pin_memory=delta.is_cuda)
            delta = self._outbox.copy_(delta)
            if scale != 1:
                delta.mul_(scale)
        for shard, part in self._shards:
            shard.stage(delta[part])
        if measure:
            self._expected = self._vector + delta

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

    def _start(self, operation: Callable[[], None]) -> "_Work":
        self._unconfirmed = True
        self._work = _Work(operation, self._worker)
        return self._work

    def _settle(self, timeout: timedelta) -> None:
        """Completes the outstanding operation, or raises what it raised."""
        work, self._work = self._work, None
        if work is None:
            return
        began = time.perf_counter()
        try:
            work.finish(timeout)
        except FutureTimeoutError as error:
            self._cut()
            raise TransportError(
                f"replica {self.replica} of {self.num_replicas}: an operation of the parameter server that began "
                f"{time.perf_counter() - work.began:.1f} s ago is not over; the timeout is {timeout.total_seconds()} s"
            ) from error
        finally:
            self.traffic.exposed_s += time.perf_counter() - began
            self.traffic.hidden_s += max(0.0, min(began, work.ended) - work.began)
            self._note()

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
        self._note()

    def close(self) -> None:
        """Leaves the center without waiting for other replicas; a server is given two seconds to hear it. Idempotent.

        A server in this replica goes on serving its clients until they close.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._work is not None and not self._work.is_over_within(FAREWELL):
            self._cut()
        self._work = None
        self._worker.shutdown()
        for shard, _ in self._shards:
            shard.close()
        self._shards = []
        self._vector = self._value = self._vector.new_empty(0)
        self._outbox = None


def _new_stream(device: torch.device) -> torch.cuda.Stream | None:
    kind: Any = torch.cuda.Stream  # torch does not annotate its constructor
    return kind(device) if device.type == "cuda" else None


class _Work:
    """An operation in the thread of a ``_DistantCenter``."""

    def __init__(self, operation: Callable[[], None], worker: ThreadPoolExecutor) -> None:
        self.began = self.ended = time.perf_counter()
        self._operation = operation
        self._future: Future[None] = worker.submit(self._run)

    def _run(self) -> None:
        try:
            self._operation()
        finally:
            self.ended = time.perf_counter()

    def finish(self, timeout: timedelta) -> None:
        """Waits until it is over and raises what it raised; ``FutureTimeoutError`` if it is not over."""
        self._future.result(timeout.total_seconds())

    def is_over_within(self, timeout: timedelta) -> bool:
        """Waits until it is over, and returns whether it is."""
        return bool(wait_for([self._future], timeout.total_seconds()).done)


class _Pending:
    """An exchange in the thread of a ``_DistantCenter``."""

    def __init__(self, center: _DistantCenter, work: _Work, x: Tensor) -> None:
        self._center, self._work, self._x = center, work, x

    def done(self) -> None:
        """Does nothing: the delta is the caller's own."""

    def wait(self) -> Tensor:
        if self._center._work is self._work:
            self._center._settle(self._center._timeout)
        else:  # another operation has completed it, or raised what it raised
            self._work.finish(timedelta(0))
        return self._x
