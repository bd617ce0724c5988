"""CUDA devices that are not there: what code for several GPUs does wrong is found on a machine that has none.

Numbers are real (they live in CPU memory); time is not. Within ``pretend_cuda()`` these are modelled:

* ``PretendTensor``: a tensor on ``cuda:k``. Mixed devices raise what CUDA raises; where the host waits is written down.
* ``torch.cuda.Stream``, ``Event``, ``stream``, ``device``, ``set_device`` with torch's rules for each thread: a new
  thread's current device is 0, and ``cudaSetDevice`` and ``cudaEventCreate`` make a context where there is none. A
  context on a device that is not the rank's own is reported.
* happens-before, by vector clocks over host threads and streams: two accesses to the same bytes, one of them a write,
  that no chain of launches, events, host waits and thread starts orders are a race, whatever the timing of this run.
  Pinned host memory takes part: a host that reads it before it has seen the copy's event races with the copy.
* memory that is given back while a stream other than its own may still use it (a missing ``record_stream``).
* ``torch.distributed.ProcessGroupNCCL`` between threads: asynchronous, on a stream of its own; ``wait()`` lets the
  current stream wait, ``wait(timeout)`` the host; tensors that are not on CUDA are refused. Launches on two
  communicators of one device that nothing orders, and ranks whose launches have another order, are reported.
* a lag: with ``lag="caller"`` the default streams, with ``lag="streams"`` all others, are executed as late as the order
  allows, so that a race becomes a wrong number, too.

Not modelled: the duration of anything, the allocator's sizes and reuse, NCCL's algorithms, CUDA graphs, cuBLAS, and
autograd (a build without CUDA has no engine for the device). A strided view counts as all bytes from its first to its
last. Locks and queues do not order threads here; starts, joins, events, conditions and executors do. A rank is a
thread; the threads that it starts belong to it. What is not modelled is not refuted by it.
"""

import collections
import contextlib
import itertools
import sys
import threading
import time
import types
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

__all__ = ["Findings", "HostWait", "Lag", "PretendTensor", "on_device", "pretend_cuda", "run_ranks"]

Lag = Literal["none", "caller", "streams"]
Clock = dict[Hashable, int]

aten = torch.ops.aten
HANG_S = 60.0  # a guard: no wait in a scenario comes near it
_PACKAGE = "/lightning_easgd/"

# What is patched below, as it was: this module's own threads must not go through the patches.
_event_set, _event_wait, _event_is_set = threading.Event.set, threading.Event.wait, threading.Event.is_set

_LOCK = threading.RLock()  # over all that is below; never held while a host waits


# ------------------------------------------------------------------------------------------------------- findings


@dataclass(frozen=True)
class HostWait:
    """A host thread that stood still for a device.

    Attributes:
        rank: whose it was.
        thread: its name.
        kind: the call.
        where: the innermost frames of the package.
    """

    rank: int | None
    thread: str
    kind: str
    where: str


class Findings:
    """What was seen since ``pretend_cuda`` was entered.

    Attributes:
        races: pairs of accesses that nothing orders, each once.
        contexts: where a rank made a context on another device than its own.
        freed: memory that was given back too early.
        unordered: launches on two communicators of one device that nothing orders.
        waits: all host waits, oldest first.
        launches: for each rank its collectives: (communicator, number of the collective in it, kind).
    """

    def __init__(self) -> None:
        self.races: dict[Hashable, str] = {}
        self.contexts: dict[Hashable, str] = {}
        self.freed: dict[Hashable, str] = {}
        self.unordered: dict[Hashable, str] = {}
        self.waits: list[HostWait] = []
        self.launches: dict[int | None, list[tuple[str, int, str]]] = collections.defaultdict(list)

    def own_waits(self) -> list[HostWait]:
        """Returns the host waits of the calling thread."""
        name = threading.current_thread().name
        with _LOCK:
            return [w for w in self.waits if w.rank == _ME.rank and w.thread == name]

    def different_orders(self) -> list[str]:
        """Returns the pairs of ranks that launch the collectives that they share in another order."""
        found = []
        for (a, mine), (b, theirs) in itertools.combinations(self.launches.items(), 2):
            shared = set(mine) & set(theirs)
            first, second = ([op for op in ops if op in shared] for ops in (mine, theirs))
            if first != second:
                at = next(i for i, (x, y) in enumerate(zip(first, second, strict=True)) if x != y)
                found.append(f"ranks {a} and {b}: {first[at]} and {second[at]} come as collective {at}")
        return found

    def problems(self) -> list[str]:
        """Returns everything but host waits that should not be, in words."""
        return [
            *(f"RACE {text}" for text in self.races.values()),
            *(f"CONTEXT {text}" for text in self.contexts.values()),
            *(f"FREED {text}" for text in self.freed.values()),
            *(f"UNORDERED {text}" for text in self.unordered.values()),
            *(f"ORDER {text}" for text in self.different_orders()),
        ]


class _World:
    """The devices of one ``pretend_cuda`` block."""

    def __init__(self, lag: Lag) -> None:
        self.lag = lag
        self.findings = Findings()
        self.contexts: set[tuple[int | None, int]] = set()
        self.default_streams: dict[tuple[int | None, int], Stream] = {}
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.communicators: dict[str, _Communicator] = {}
        # rank -> communicator -> thread -> (the thread's clock at its last launch, in words)
        self.last_launch: dict[Any, dict[str, dict[Hashable, tuple[int, str]]]] = collections.defaultdict(
            lambda: collections.defaultdict(dict)
        )


_WORLD = _World("none")


# ---------------------------------------------------------------------------------------------- threads and clocks


class _Me(threading.local):
    """What a host thread has of its own: clock, rank, current device, current streams."""

    _numbers = itertools.count()
    # Until the thread has its own: garbage may be collected within __init__, and ``_Memory.__del__`` looks here.
    vc: Clock = {}  # noqa: RUF012  (read alone)

    def __init__(self) -> None:
        self.key = ("thread", next(self._numbers))
        self.vc = {}
        self.rank: int | None = None
        self.device = 0
        self.streams: dict[int, Stream] = {}
        self.polled: Hashable = None  # the event that this thread looked at last, without anything in between


_ME = _Me()


def _join(clock: Clock, other: Clock) -> None:
    for key, n in other.items():
        if n > clock.get(key, 0):
            clock[key] = n


def _tick() -> None:
    _ME.vc[_ME.key] = _ME.vc.get(_ME.key, 0) + 1
    _ME.polled = None


def _publish() -> Clock:
    """Returns the clock of this thread as others learn it."""
    with _LOCK:
        _tick()
        return dict(_ME.vc)


def _learn(clock: Clock) -> None:
    with _LOCK:
        _join(_ME.vc, clock)


def _where() -> str:
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < 3:
        _, package, file = frame.f_code.co_filename.rpartition(_PACKAGE)
        if package:
            found.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "the test"


def _who() -> str:
    return f"{threading.current_thread().name}, {_where()}"


def _touch_context(device: int) -> None:
    if _ME.rank is not None and (_ME.rank, device) not in _WORLD.contexts:
        _WORLD.contexts.add((_ME.rank, device))
        if device != _ME.rank:
            _WORLD.findings.contexts[_ME.rank, device] = f"rank {_ME.rank} opens one on cuda:{device}: {_who()}"


def _note_wait(kind: str) -> None:
    _WORLD.findings.waits.append(HostWait(_ME.rank, threading.current_thread().name, kind, _where()))


# ----------------------------------------------------------------------------------------------- streams and events


class _Blocked(Exception):
    """A stream cannot go on before all ranks have launched a collective."""

    def __init__(self, operation: "_Operation") -> None:
        super().__init__("a collective waits for other ranks")
        self.operation = operation


class Stream:
    """As ``torch.cuda.Stream``. Its work is executed when it is launched, or, if it is lazy, when somebody needs it."""

    _numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = _device(device)
        self.device_index = self.device.index
        self.device_type = 1
        self.priority = priority
        self.stream_id = self.cuda_stream = next(self._numbers)
        self.key = ("stream", self.stream_id)
        self.vc: Clock = {}
        self.name = f"stream {self.stream_id}"
        self.lazy = _WORLD.lag == "streams"
        self.done = 0
        self._items: list[Callable[[], None] | tuple[Stream, int] | None] = []
        self._previous: list[StreamContext] = []
        with _LOCK:
            _WORLD.streams.add(self)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def __repr__(self) -> str:
        return f"<{self.name} of {self.device}>"

    def __enter__(self) -> "Stream":
        self._previous.append(StreamContext(self))
        self._previous[-1].__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._previous.pop().__exit__()

    # --- the engine; all under the lock

    @property
    def position(self) -> int:
        return len(self._items)

    def advance(self, clock: Clock | None = None) -> int:
        """Ticks for a launch by this thread, after ``clock`` too, and returns the stream's time."""
        _tick()
        _join(self.vc, _ME.vc)
        _join(self.vc, clock or {})
        self.vc[self.key] = self.vc.get(self.key, 0) + 1
        return self.vc[self.key]

    def push(self, item: "Callable[[], None] | tuple[Stream, int]") -> None:
        self._items.append(item)
        if not self.lazy:
            self.try_on()

    def try_on(self) -> None:
        with contextlib.suppress(_Blocked):
            self.run_to(self.position)

    def run_to(self, position: int) -> None:
        while self.done < position:
            item = self._items[self.done]
            if callable(item):
                item()
            elif item is not None:
                item[0].run_to(item[1])
            self._items[self.done] = None
            self.done += 1

    def host_wait(self, position: int, clock: Clock, timeout_s: float = HANG_S) -> None:
        """Blocks until the stream is at ``position``, and makes this thread know ``clock``. Not under the lock."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with _LOCK:
                    self.run_to(position)
                    _join(_ME.vc, clock)
                    return
            except _Blocked as blocked:
                left = min(deadline - time.monotonic(), blocked.operation.timeout_s)
                if not _event_wait(blocked.operation.launched, max(left, 0.0)):
                    raise dist.DistBackendError("Watchdog caught collective operation timeout") from None

    # --- torch's interface

    def wait_event(self, event: "Event") -> None:
        with _LOCK:
            if event.stream is not None:
                self.advance(event.vc)
                self.push((event.stream, event.position))

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        _wait_for_all(self, "Stream.synchronize")

    def query(self) -> bool:
        with _LOCK:
            return self.done == self.position


class Event:
    """As ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
        self.enable_timing = enable_timing
        self.stream: Stream | None = None
        self.position = 0
        self.vc: Clock = {}
        self._misses = 0
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        with _LOCK:
            _touch_context(stream.device_index)  # cudaEventCreateWithFlags under a guard of the stream's device
            stream.advance()
            self.stream, self.position, self.vc, self._misses = stream, stream.position, dict(stream.vc), 0
            self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        """Answers without waiting. A thread that asks again and again, and does nothing else, waits after all."""
        with _LOCK:
            if self.stream is None:
                return True
            done = self.stream.done >= self.position
            if done:
                if _ME.polled == id(self):
                    _note_wait("Event.query in a loop")
                _ME.polled = None
                _join(_ME.vc, self.vc)
            else:
                _ME.polled = id(self)
                self._misses += 1
                with contextlib.suppress(_Blocked):
                    self.stream.run_to(self.position)  # it gets on; that it is done shows at the next look
            return done

    def synchronize(self) -> None:
        if self.stream is not None:
            with _LOCK:
                is_known = _ME.vc.get(self.stream.key, 0) >= self.vc[self.stream.key]
            self.stream.host_wait(self.position, self.vc)
            if not is_known:  # whoever has seen that it is over does not stand still
                with _LOCK:
                    _note_wait("Event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        """Returns milliseconds, of the host's clock."""
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.stream is None or end.stream is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        with _LOCK:
            if any(e.stream is None or e.stream.done < e.position for e in (self, end)):
                raise RuntimeError("CUDA error: device not ready")
        return 1e3 * (end._time - self._time)


def _wait_for_all(stream: Stream, kind: str) -> None:
    with _LOCK:
        position, clock = stream.position, dict(stream.vc)
    stream.host_wait(position, clock)
    with _LOCK:
        _note_wait(kind)


def _device(device: Any = None) -> torch.device:
    if device is None:
        return torch.device("cuda", _ME.device)
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return device if device.index is not None else torch.device("cuda", _ME.device)


def default_stream(device: Any = None) -> Stream:
    place = (_ME.rank, _device(device).index)
    with _LOCK:
        if place not in _WORLD.default_streams:
            stream = Stream(torch.device("cuda", place[1]))
            stream.name, stream.lazy = "the default stream", _WORLD.lag == "caller"
            _WORLD.default_streams[place] = stream
        return _WORLD.default_streams[place]


def current_stream(device: Any = None) -> Stream:
    device = _device(device)
    stream = _ME.streams.get(device.index)
    return default_stream(device) if stream is None else stream


def set_device(device: Any) -> None:
    index = _device(device).index
    if index != _ME.device:
        with _LOCK:
            _touch_context(index)  # cudaSetDevice creates the primary context, since CUDA 12
        _ME.device = index


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        set_device(stream.device)
        _ME.streams[stream.device_index] = stream


class StreamContext:
    """As ``torch.cuda.StreamContext``, statement by statement: its end sets the device, in a new thread device 0."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is None:
            return
        self.src_prev_stream = current_stream(None)
        if self.src_prev_stream.device != self.stream.device:
            self.dst_prev_stream = current_stream(self.stream.device)
        set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        if self.stream is None:
            return
        if self.src_prev_stream.device != self.stream.device:
            set_stream(self.dst_prev_stream)
        set_stream(self.src_prev_stream)


class DeviceContext:
    """As ``torch.cuda.device``; torch's own goes back with ``_maybe_exchange_device``, which makes no context."""

    def __init__(self, device: Any) -> None:
        self.idx = None if device is None else _device(device).index

    def __enter__(self) -> None:
        self.prev_idx = _ME.device
        if self.idx is not None:
            set_device(self.idx)

    def __exit__(self, *_: object) -> None:
        _ME.device = self.prev_idx


def synchronize(device: Any = None) -> None:
    index = _device(device).index
    with _LOCK:
        mine = [s for s in _WORLD.streams if s.device_index == index]
        ends = [(s, s.position, dict(s.vc)) for s in mine]
    for stream, position, clock in ends:
        stream.host_wait(position, clock)
    with _LOCK:
        _note_wait("synchronize")


# ---------------------------------------------------------------------------------------------------------- memory


class _Memory:
    """A block of memory: who has touched which of its bytes. On a device it belongs to the stream it was made on."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self.findings = _WORLD.findings
        self.rank = _ME.rank
        self.made = _where()
        self.recorded: set[Hashable] = set()
        self._accesses: list[tuple[Hashable, int, int, int, bool, str]] = []

    def touch(self, key: Hashable, n: int, clock: Clock, span: tuple[int, int], is_write: bool, text: str) -> None:
        start, end = span
        if end <= start:
            return
        kept = []
        for access in self._accesses:
            k, m, first, last, wrote, before = access
            is_ordered = clock.get(k, 0) >= m
            if first < end and start < last and (wrote or is_write) and not is_ordered:
                kinds = [("write" if w else "read") for w in (wrote, is_write)]
                size = min(last, end) - max(first, start)
                _WORLD.findings.races.setdefault(
                    (before, text),
                    f"rank {self.rank}: {kinds[0]} by [{before}] and {kinds[1]} by [{text}] of the same {size} bytes",
                )
            is_covered = start <= first and last <= end and is_ordered and (is_write or (not wrote and k == key))
            if not is_covered:
                kept.append(access)
        kept.append((key, n, start, end, is_write, text))
        self._accesses = kept

    def __del__(self) -> None:
        if self.stream is None or sys.is_finalizing():
            return
        # Not under the lock: a thread may be collecting garbage, and come here, with another lock in its hands.
        after = dict(self.stream.vc)
        _join(after, _ME.vc)
        for key, n, _, _, _, text in self._accesses:
            is_streams = isinstance(key, tuple) and key[0] == "stream"
            if is_streams and key != self.stream.key and after.get(key, 0) < n and key not in self.recorded:
                self.findings.freed.setdefault(
                    (self.made, text),
                    f"rank {self.rank}: memory made in [{self.made}] is given back while [{text}] may still use it",
                )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the bytes of its storage from the tensor's first to its last."""
    if tensor.numel() == 0:
        return 0, 0
    first = tensor.storage_offset()
    last = first + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.itemsize, (last + 1) * tensor.itemsize


def _memory_of(tensor: torch.Tensor) -> _Memory | None:
    return tensor.memory if isinstance(tensor, PretendTensor | PinnedTensor) else None


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the CPU tensor behind one of ours."""
    if isinstance(tensor, PretendTensor):
        return tensor.inner
    return tensor.plain if isinstance(tensor, PinnedTensor) else tensor


def _mapped(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Returns arguments of an operator, with each tensor replaced. As pytree's, in a fraction of its time."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, x) for x in value])
    if isinstance(value, dict):
        return {key: _mapped(function, x) for key, x in value.items()}
    return value


def _inside(value: Any) -> Any:
    return _mapped(_plain, value)


def _tensors(value: Any, kind: type[torch.Tensor] = torch.Tensor) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value] if isinstance(value, kind) else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [x for part in value for x in _tensors(part, kind)]


def _launch(
    stream: Stream,
    work: Callable[[], Any],
    reads: Iterable[torch.Tensor],
    writes: Iterable[torch.Tensor],
    name: str,
) -> None:
    with _LOCK:
        _touch_context(stream.device_index)
        n = stream.advance()
        text = f"{name} on {stream.name}, {_who()}"
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                memory = _memory_of(tensor)
                if memory is not None:
                    memory.touch(stream.key, n, stream.vc, _span(_plain(tensor)), is_write, text)
        stream.push(work)


def _host_touches(reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor], name: str) -> None:
    with _LOCK:
        _tick()
        text = f"{name} by the host, {_who()}"
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                memory = _memory_of(tensor)
                if memory is not None:
                    memory.touch(_ME.key, _ME.vc[_ME.key], _ME.vc, _span(_plain(tensor)), is_write, text)


def _refuse_mixed(devices: Iterable[torch.device]) -> None:
    names = " and ".join(sorted({str(d) for d in devices}))
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {names}! (pretended)"
    )


# --------------------------------------------------------------------------------------------------------- tensors


class PinnedTensor(torch.Tensor):
    """Page-locked host memory: a CPU tensor whose bytes take part in the search for races."""

    memory: _Memory
    plain: torch.Tensor

    @staticmethod
    def around(plain: torch.Tensor, memory: _Memory | None = None) -> "PinnedTensor":
        result: PinnedTensor = torch.Tensor._make_subclass(PinnedTensor, plain)
        result.plain, result.memory = plain, _Memory(None) if memory is None else memory
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "is_pinned":
            return True
        if name == "pin_memory":
            return args[0]
        if name in ("copy_", "to", "cuda") and name in _TENSOR_METHODS:
            return _TENSOR_METHODS[name](*args, **(kwargs or {}))
        if name in ("numpy", "tolist", "__array__"):
            _host_touches([args[0]], [], name)
            return func(args[0].plain, *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _tensors((args, kwargs), PretendTensor):
            return _dispatch(func, args, kwargs)
        written = _written(func, args, kwargs)
        ids = {id(x) for x in written}
        result = func(*_inside(args), **_inside(kwargs))
        if getattr(func, "is_view", False) or func is aten.detach.default:
            memory = _tensors(args, PinnedTensor)[0].memory
            return _mapped(lambda o: PinnedTensor.around(o, memory), result)
        ours = _tensors((args, kwargs), PinnedTensor)
        _host_touches([x for x in ours if id(x) not in ids or _reads_too(func)], written, str(func))
        if written and func._schema.returns:
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        _host_touches([self], [], "pickle")
        return self.plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        _host_touches([self], [], "deepcopy")
        return self.plain.clone()


class PretendTensor(torch.Tensor):
    """A tensor that says ``cuda:k`` and keeps its numbers in ``inner``, on the CPU."""

    inner: torch.Tensor
    memory: _Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, memory: _Memory | None = None) -> "PretendTensor":
        self: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=False,
        )
        self.inner = inner
        self.memory = _Memory(current_stream(device)) if memory is None else memory
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor(shape={tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        method = _TENSOR_METHODS.get(getattr(func, "__name__", ""))
        if method is not None:
            return method(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, dict(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a PretendTensor is not pickled; take .cpu() of it first")

    def __deepcopy__(self, memo: Any) -> "PretendTensor":
        return aten.clone.default(self)


def on_device(tensor: torch.Tensor, device: Any) -> PretendTensor:
    """Returns a copy on a pretended device, which no host wait is counted for."""
    return _upload(_plain(tensor).detach(), _device(device), None)


def _upload(value: torch.Tensor, device: torch.device, kind: str | None) -> PretendTensor:
    kept = value.clone()
    result = PretendTensor(torch.empty_like(kept), device)
    stream = current_stream(device)
    _launch(stream, lambda: result.inner.copy_(kept), [], [result], "copy to the device")
    if kind is not None:
        _wait_for_all(stream, kind)
    return result


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """``target.copy_(source)`` where one of them is on a device."""
    if source.shape != target.shape:
        source = source.expand(target.shape)
    to, of = _plain(target), _plain(source)
    if isinstance(target, PretendTensor) and isinstance(source, PretendTensor):
        if target.device != source.device:  # legal in CUDA, never meant here
            _refuse_mixed([target.device, source.device])
        _launch(current_stream(target.device), lambda: to.copy_(of), [source], [target], "copy_")
    elif isinstance(target, PretendTensor):
        stream = current_stream(target.device)
        is_pinned = isinstance(source, PinnedTensor)
        kept = of if is_pinned else of.clone()  # pageable memory is staged at once
        _launch(stream, lambda: to.copy_(kept), [source], [target], "copy_ to the device")
        if not (non_blocking and is_pinned):
            _wait_for_all(stream, "copy_ to the device" if is_pinned else "copy_ of pageable memory to the device")
    else:
        stream = current_stream(source.device)
        _launch(stream, lambda: to.copy_(of), [source], [target], "copy_ to the host")
        if not (non_blocking and isinstance(target, PinnedTensor)):
            _wait_for_all(stream, "copy_ to the host")
    return target


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Returns the arguments that an operator writes, by its schema."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return written


def _reads_too(func: Any) -> bool:
    name = func.__name__.split(".")[0]
    return bool(name.endswith("_")) and name not in ("zero_", "fill_", "copy_")


_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator with an argument on a device: checks, launch on the current stream, results on the device."""
    pretended = _tensors((args, kwargs), PretendTensor)
    device = pretended[0].device
    stream = current_stream(device)

    if func is aten._local_scalar_dense.default:
        _launch(stream, lambda: None, pretended, [], "item")
        _wait_for_all(stream, "item")
        return args[0].inner.item()
    if func is aten._to_copy.default:
        target, non_blocking = kwargs.get("device"), kwargs.pop("non_blocking", False)
        if target is not None and torch.device(target).type == "cpu":
            dtype = kwargs.get("dtype") or args[0].dtype
            result = torch.empty(args[0].shape, dtype=dtype)
            if non_blocking and (dtype == args[0].dtype):  # torch takes pinned memory here
                return _copy(PinnedTensor.around(result), args[0], True)
            return _copy(result, args[0], False)
        kwargs.pop("device", None)
    if func is aten.copy_.default:
        return _copy(args[0], args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False)))
    if func is aten._foreach_copy_.default:
        non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
        for target, source in zip(args[0], args[1], strict=True):
            _copy(target, source, non_blocking)
        return None
    if func is aten._pin_memory.default:
        raise RuntimeError(f"cannot pin '{args[0].type()}' only dense CPU tensors can be pinned")

    others = [x for x in _tensors((args, kwargs)) if not isinstance(x, PretendTensor) and x.dim() > 0]
    devices = {x.device for x in pretended} | {x.device for x in others}
    if len(devices) > 1:
        if not func.__name__.startswith("index"):
            _refuse_mixed(devices)
        _wait_for_all(stream, "index with a CPU tensor")
    if kwargs.get("device") is not None:
        if torch.device(kwargs["device"]).type == "cpu":
            return func(*_inside(args), **_inside(kwargs))
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    inner_args, inner_kwargs = _inside(args), _inside(kwargs)

    if getattr(func, "is_view", False) or func in (aten.detach.default, aten.alias.default):
        views, memory = func(*inner_args, **inner_kwargs), pretended[0].memory
        return _mapped(lambda v: PretendTensor(v, device, memory), views)

    written = _written(func, args, kwargs)
    ids = {id(x) for x in written}
    reads = [x for x in pretended if id(x) not in ids or _reads_too(func)]
    if written:
        _launch(stream, lambda: func(*inner_args, **inner_kwargs), reads, written, str(func))
        if not func._schema.returns:
            return None
        return written[0] if len(func._schema.returns) == 1 else tuple(written)

    def as_meta(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")

    meta_kwargs = {k: torch.device("meta") if k == "device" else v for k, v in _mapped(as_meta, inner_kwargs).items()}
    try:
        shapes = func(*_mapped(as_meta, inner_args), **meta_kwargs)
    except (NotImplementedError, RuntimeError):  # the shape is in the data: the host waits for it
        _wait_for_all(stream, f"{func}, whose result has the shape that the data say")
        shapes = func(*inner_args, **inner_kwargs)
    results = _mapped(lambda m: PretendTensor(torch.empty_strided(m.size(), m.stride(), dtype=m.dtype), device), shapes)
    if func.__name__.split(".")[0] in _EMPTY:
        return results
    inner_results = [o.inner for o in _tensors(results)]  # not the tensors: work that is queued keeps no memory alive

    def work() -> None:
        for target, value in zip(inner_results, _tensors(func(*inner_args, **inner_kwargs)), strict=True):
            target.copy_(value)

    _launch(stream, work, reads, _tensors(results), str(func))
    return results


# What torch's bindings do under a device guard, which a build without CUDA does not have, or with a storage.


def _select(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    parts, dim = index if isinstance(index, tuple) else (index,), 0
    if any(isinstance(i, torch.Tensor | list) for i in parts):
        indices = [torch.tensor(i) if isinstance(i, list) else None if isinstance(i, slice) else i for i in parts]
        if any(isinstance(i, slice) and i != slice(None) for i in parts):
            raise NotImplementedError(f"PretendTensor[{index}]")
        result: torch.Tensor = aten.index.Tensor(tensor, indices)
        return result
    for i in parts:
        if i is None:
            tensor, dim = aten.unsqueeze.default(tensor, dim), dim + 1
        elif i is Ellipsis:
            behind = sum(1 for j in parts[parts.index(Ellipsis) + 1 :] if j is not None)
            dim = tensor.dim() - behind
        elif isinstance(i, slice):
            start, stop, step = i.indices(tensor.shape[dim])
            tensor, dim = aten.slice.Tensor(tensor, dim, start, max(start, stop), step), dim + 1
        else:
            tensor = aten.select.int(tensor, dim, int(i))
    return aten.alias.default(tensor) if not parts else tensor


def _set_item(tensor: torch.Tensor, index: Any, value: Any) -> None:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, torch.Tensor) for i in parts):
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=tensor.dtype)
        aten.index_put_.default(tensor, list(parts), value)
        return
    part = _select(tensor, index)
    if isinstance(value, torch.Tensor):
        _copy_method(part, value)
    else:
        aten.fill_.Scalar(part, value)


def _scalar(convert: Callable[[Any], Any]) -> Callable[[torch.Tensor], Any]:
    return lambda tensor: convert(aten._local_scalar_dense.default(tensor))


def _copy_method(target: torch.Tensor, source: Any, non_blocking: bool = False) -> torch.Tensor:
    if isinstance(target, PretendTensor) or isinstance(source, PretendTensor):
        return _copy(target, source, bool(non_blocking))
    result: torch.Tensor = aten.copy_.default(target, source, bool(non_blocking))
    return result


def _to_method(
    tensor: torch.Tensor,
    *args: Any,
    device: Any = None,
    dtype: torch.dtype | None = None,
    copy: bool = False,
    non_blocking: bool = False,
    **_: Any,
) -> torch.Tensor:
    for a in args:
        if isinstance(a, torch.dtype):
            dtype = a
        elif isinstance(a, str | torch.device):
            device = a
        elif isinstance(a, torch.Tensor):
            device, dtype = a.device, a.dtype
        elif isinstance(a, bool):
            non_blocking = a
    dtype = tensor.dtype if dtype is None else dtype
    target = tensor.device if device is None else torch.device(device)
    if target.type == "cuda":
        target = _device(target)
    if target == tensor.device and dtype == tensor.dtype and not copy:
        return tensor
    if target.type == "cuda" and tensor.device.type == "cuda":
        if target != tensor.device:
            _refuse_mixed([target, tensor.device])
        result: torch.Tensor = aten._to_copy.default(tensor, dtype=dtype)
        return result
    if target.type == "cuda":
        value = tensor.to(dtype) if dtype != tensor.dtype else tensor
        uploaded = PretendTensor(torch.empty_like(_plain(value)), target)
        return _copy(uploaded, value, non_blocking)
    return aten._to_copy.default(tensor, device=target, dtype=dtype, non_blocking=non_blocking)


def _where_function(condition: Any, *values: Any, **_: Any) -> Any:
    if not values:
        return aten.nonzero.default(condition).unbind(1)
    dtype = next(v.dtype for v in values if isinstance(v, torch.Tensor))
    return aten.where.self(
        condition, *(v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=dtype) for v in values)
    )


def _record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    memory = _memory_of(tensor)
    if memory is not None:
        memory.recorded.add(stream.key)


def _is_finite(tensor: torch.Tensor) -> Any:
    is_number = aten.eq.Tensor(tensor, tensor)
    return aten.logical_and.default(is_number, aten.ne.Scalar(aten.abs.default(tensor), float("inf")))


_TENSOR_METHODS: dict[str, Callable[..., Any]] = {
    "__getitem__": _select,
    "__setitem__": _set_item,
    "__len__": lambda t: t.shape[0],
    "__iter__": lambda t: iter(t.unbind(0)),
    "__invert__": lambda t: aten.bitwise_not.default(t),
    "__float__": _scalar(float),
    "__int__": _scalar(int),
    "__index__": _scalar(int),
    "__bool__": _scalar(bool),
    "item": _scalar(lambda v: v),
    "tolist": lambda t: t.cpu().tolist(),
    "numpy": lambda t: _refuse_mixed([t.device, torch.device("cpu")]),
    "data_ptr": lambda t: t.inner.data_ptr(),
    "is_pinned": lambda t, *_: False,
    "copy_": _copy_method,
    "to": _to_method,
    "cpu": lambda t, **_: _to_method(t, "cpu"),
    "cuda": lambda t, device=None, non_blocking=False, **_: _to_method(
        t, torch.device("cuda") if device is None else _device(device), non_blocking=non_blocking
    ),
    "nonzero": lambda t: aten.nonzero.default(t),
    "isfinite": _is_finite,
    "where": _where_function,
    "record_stream": _record_stream,
}


# ------------------------------------------------------------------------------------------------------------ NCCL


class _Operation:
    """One collective on its way, and what every rank has given."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.parts: dict[int, tuple[str, list[torch.Tensor], list[torch.Tensor]]] = {}
        self.before: list[tuple[Stream, int]] = []  # what has to be executed first
        self.compute: Callable[[list[Any]], None] | None = None
        self.launched = threading.Event()  # by all ranks, or given up
        self.is_running = False
        self.results: list[list[torch.Tensor]] | None = None
        self.is_aborted = False
        self.error = ""

    def run(self, rank: int) -> None:
        """Executes it on one rank. Under the lock; raises ``_Blocked`` where a rank has not come.

        All ranks' inputs are read when the first rank needs its outputs; each rank's outputs are written when that
        rank needs them.
        """
        if self.is_aborted:
            return
        if len(self.parts) < self.size:
            raise _Blocked(self)
        if self.is_running:
            raise RuntimeError("deadlock: a collective waits on one rank for another one, which waits for it elsewhere")
        if self.results is None:
            self.is_running = True
            try:
                for stream, position in self.before:
                    stream.run_to(position)
            finally:
                self.is_running = False
            self.before.clear()
            ordered = [self.parts[r] for r in range(self.size)]
            self.results = [[out.clone() for out in part[2]] for part in ordered]
            if not self.error:
                assert self.compute is not None
                self.compute([(kind, given, own) for (kind, given, _), own in zip(ordered, self.results, strict=True)])
        for out, value in zip(self.parts[rank][2], self.results[rank], strict=True):
            out.copy_(value)


class _Communicator:
    def __init__(self) -> None:
        self.operations: dict[int, _Operation] = {}
        self.is_aborted = False


class ProcessGroup:
    """Collectives between threads, as ``ProcessGroupNCCL`` has them."""

    _device_type = "cuda"

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self._timeout = timedelta(minutes=10)
            self.is_high_priority_stream = is_high_priority_stream
            self.config = types.SimpleNamespace()
            self.global_ranks_in_group: list[int] = []
            self.group_name = ""

    def __init__(self, store: dist.Store, rank: int, size: int, options: Any = None) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.options = self.Options() if options is None else options
        self._timeout_s = self.options._timeout.total_seconds()
        self._communicator: _Communicator | None = None
        self._stream: Stream | None = None
        self._name = ""
        self._sequence = 0

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def name(self) -> str:
        return "nccl"

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def eager_connect_single_device(self, device: Any) -> None:
        self._connect(_device(device))

    def _connect(self, device: torch.device) -> None:  # lazily, as ProcessGroupNCCL without device_id
        if self._communicator is not None:
            return
        if self._rank == 0:
            self._name = uuid.uuid4().hex[:8]
            with _LOCK:
                _WORLD.communicators[self._name] = _Communicator()
            self._store.set("0", self._name)
        else:
            self._name = self._store.get("0").decode()
        with _LOCK:
            self._communicator = _WORLD.communicators[self._name]
            self._stream = Stream(device)
            self._stream.name = f"the stream of communicator {self._name}"

    def _check(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device_type or not isinstance(tensor, PretendTensor):
            raise ValueError("Tensors must be CUDA and dense")
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")

    def _note_launch(self, kind: str) -> None:
        """Compares with the last launches on other communicators: is one of the two known to be first?"""
        others = _WORLD.last_launch[_ME.rank]
        for name, by_thread in others.items():
            for thread, (n, text) in by_thread.items():
                if name != self._name and _ME.vc.get(thread, 0) < n:
                    _WORLD.findings.unordered.setdefault(
                        (_ME.rank, *sorted((name, self._name))),
                        f"rank {_ME.rank}: [{text}] and [{kind} on {self._name} by {_who()}]",
                    )
        _tick()
        others[self._name][_ME.key] = (_ME.vc[_ME.key], f"{kind} on {self._name} by {_who()}")
        _WORLD.findings.launches[_ME.rank].append((self._name, self._sequence, kind))

    def _collective(
        self,
        kind: str,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        compute: Callable[[list[Any]], None],
        pieces: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None,
    ) -> "Work":
        """Launches one collective on this rank.

        Args:
            kind: its name; all ranks must mean the same.
            inputs: what is read.
            outputs: what is written.
            compute: called once, with (kind, inputs, outputs) of each rank, all on the CPU.
            pieces: what it gets for inputs and outputs instead.
        """
        for tensor in (*inputs, *outputs):
            self._check(tensor)
        device = (*inputs, *outputs)[0].device
        self._connect(device)
        communicator, stream, current = self._communicator, self._stream, current_stream(device)
        assert communicator is not None
        assert stream is not None
        with _LOCK:
            if communicator.is_aborted:
                raise dist.DistBackendError("NCCL communicator was aborted")
            _touch_context(device.index)
            self._sequence += 1
            self._note_launch(kind)
            operation = communicator.operations.setdefault(self._sequence, _Operation(self._size, self._timeout_s))
            n = stream.advance(current.vc)
            text = f"{kind} on {stream.name}, {_who()}"
            for tensors, is_write in ((inputs, False), (outputs, True)):
                for tensor in tensors:
                    assert isinstance(tensor, PretendTensor)
                    tensor.memory.touch(stream.key, n, stream.vc, _span(tensor.inner), is_write, text)
            given, taken = pieces or ([_plain(t) for t in inputs], [_plain(t) for t in outputs])
            operation.parts[self._rank] = (kind, given, taken)
            operation.before += [(current, current.position), (stream, stream.position)]
            operation.compute = compute
            work = Work(operation, stream, dict(stream.vc), [*inputs, *outputs])
            if len(operation.parts) == self._size:
                kinds = {part[0] for part in operation.parts.values()}
                sizes = {tuple(t.numel() for t in part[1]) for part in operation.parts.values()}
                if len(kinds) > 1 or (len(sizes) > 1 and kind != "alltoall"):
                    operation.error = f"the ranks' collectives differ: {sorted(kinds)} of {sorted(sizes)} numbers"
                del communicator.operations[self._sequence]
                _event_set(operation.launched)
            stream.push(partial(operation.run, self._rank))
            work.position = stream.position
            if _event_is_set(operation.launched):
                for other in [s for s in _WORLD.streams if not s.lazy]:
                    other.try_on()
        return work

    def allreduce(self, tensors: Any, options: Any = None) -> "Work":
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        op = getattr(options, "reduceOp", options)

        def compute(parts: list[Any]) -> None:
            for i in range(len(tensors)):
                total = _reduced([part[1][i] for part in parts], op)
                for part in parts:
                    part[2][i].copy_(total)

        return self._collective("allreduce", tensors, tensors, compute)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, root: int = 0, options: Any = None) -> "Work":
        def compute(parts: list[Any]) -> None:
            parts[root][2][0].copy_(_reduced([part[1][0] for part in parts], None))

        return self._collective("reduce", [tensors[0]], [tensors[0]], compute)

    def broadcast(self, tensors: Any, root: Any = 0, *_: Any) -> "Work":
        [tensor] = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        root = getattr(root, "rootRank", root)

        def compute(parts: list[Any]) -> None:
            for r, part in enumerate(parts):
                if r != root:
                    part[2][0].copy_(parts[root][1][0])

        return self._collective("broadcast", [tensor], [tensor], compute)

    def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> "Work":
        def compute(parts: list[Any]) -> None:
            for part in parts:
                for r, out in enumerate(part[2]):
                    out.copy_(parts[r][1][0])

        return self._collective("allgather", inputs, outputs[0], compute)

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, options: Any = None) -> "Work":
        def compute(parts: list[Any]) -> None:
            for part in parts:
                part[2][0].view(-1).copy_(torch.cat([other[1][0].view(-1) for other in parts]))

        if output.numel() != self._size * input.numel():
            raise ValueError("output tensor size must be equal to world_size times input tensor size")
        return self._collective("_allgather_base", [input], [output], compute)

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, options: Any = None) -> "Work":
        def compute(parts: list[Any]) -> None:
            total = _reduced([part[1][0].view(-1) for part in parts], getattr(options, "reduceOp", None))
            for part, piece in zip(parts, total.chunk(len(parts)), strict=True):
                part[2][0].view(-1).copy_(piece)

        return self._collective("_reduce_scatter_base", [input], [output], compute)

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: list[int], input_sizes: list[int], *_: Any
    ) -> "Work":
        size = self._size
        for tensor, sizes in ((output, output_sizes), (input, input_sizes)):
            if sizes and sum(sizes) != tensor.shape[0]:
                raise ValueError(f"split sizes {sizes} do not sum up to {tensor.shape[0]}")
            if not sizes and tensor.shape[0] % size:
                raise ValueError(f"{tensor.shape[0]} rows are not divisible by {size} ranks")
        sent = list(_plain(input).split(input_sizes or input.shape[0] // size))
        received = list(_plain(output).split(output_sizes or output.shape[0] // size))

        def compute(parts: list[Any]) -> None:
            for r in range(size):
                for s in range(size):
                    parts[r][2][s].copy_(parts[s][1][r])

        return self._collective("alltoall", [input], [output], compute, (sent, received))

    def barrier(self, options: Any = None) -> "Work":
        token = torch.zeros(1, device=_device())
        return self.allreduce([token])

    def abort(self) -> None:
        """Ends what is on its way, unfinished, and starts nothing more."""
        with _LOCK:
            if self._communicator is None:
                return
            self._communicator.is_aborted = True
            for operation in self._communicator.operations.values():
                operation.is_aborted = True
                _event_set(operation.launched)
            for stream in [s for s in _WORLD.streams if not s.lazy]:
                stream.try_on()

    def shutdown(self) -> None:
        self.abort()


def _reduced(values: list[torch.Tensor], op: Any) -> torch.Tensor:
    kind = "sum" if op is None else str(op).rpartition(".")[2].lower().rstrip(">").partition(":")[0]
    total = values[0].clone()
    for value in values[1:]:
        if kind in ("sum", "avg"):
            total += value
        elif kind in ("max", "min"):
            total = torch.maximum(total, value) if kind == "max" else torch.minimum(total, value)
        else:
            raise NotImplementedError(f"reduction {op}")
    return total / len(values) if kind == "avg" else total


class Work:
    """A collective as ``WorkNCCL`` is one: it keeps its tensors until a stream or the host waits for it."""

    def __init__(self, operation: _Operation, stream: Stream, vc: Clock, tensors: list[Any]) -> None:
        self._operation, self._stream, self._vc = operation, stream, vc
        self._tensors: list[Any] | None = tensors
        self.position = 0

    def wait(self, timeout: timedelta | None = None) -> bool:
        operation = self._operation
        if timeout is not None:
            self._stream.host_wait(self.position, self._vc, timeout.total_seconds())
            with _LOCK:
                _note_wait("Work.wait(timeout)")
                if operation.error:
                    raise dist.DistBackendError(operation.error)
        with _LOCK:
            current = current_stream(self._stream.device)
            current.advance(self._vc)  # of other ranks nothing: what they touch is memory of their own
            current.push((self._stream, self.position))
        self._tensors = None
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        with _LOCK:
            done = self._stream.done >= self.position
            if not done:
                with contextlib.suppress(_Blocked):
                    self._stream.run_to(self.position)
            else:
                _join(_ME.vc, self._vc)
            return done

    def is_success(self) -> bool:
        return self.is_completed() and not self._operation.error

    def exception(self) -> Any:
        return RuntimeError(self._operation.error) if self._operation.error else None

    def __del__(self) -> None:
        if self._tensors is not None:  # the watchdog keeps them until it has seen the end
            for tensor in self._tensors:
                tensor.memory.recorded.add(self._stream.key)


# ---------------------------------------------------------------------------------------------------------- patches


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def _factory(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns a factory function of torch that makes pretended and pinned tensors, too."""

    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        if _is_cuda(device):
            kwargs.pop("out", None)
            value = original(*(_inside(args)), **kwargs)
            if name in ("empty", "empty_like", "empty_strided"):
                return PretendTensor(value, _device(device))
            # Numbers that the host has are copied; all else is written by a kernel.
            return _upload(value, _device(device), "copy_ of a new tensor" if name in ("tensor", "as_tensor") else None)
        if device is not None:
            kwargs["device"] = device
            if name.endswith("_like") and torch.device(device).type == "cpu":
                args = tuple(_plain(a) if isinstance(a, torch.Tensor) else a for a in args)
        value = original(*args, **kwargs)
        return PinnedTensor.around(value) if pin_memory else value

    return made


class _Patches:
    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        missing = object()
        before = vars(owner).get(name, missing)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if before is missing else setattr(owner, name, before))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def _patch_torch(patches: _Patches) -> None:
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "device": DeviceContext,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_device": set_device,
        "set_stream": set_stream,
        "current_device": lambda: _ME.device,
        "device_count": lambda: 8,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
    }.items():
        patches.set(torch.cuda, name, value)
    patches.set(dist, "ProcessGroupNCCL", ProcessGroup)
    for name in ("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "linspace", "eye", "empty_strided"):
        patches.set(torch, name, _factory(getattr(torch, name), name))
    for name in ("empty_like", "zeros_like", "ones_like", "full_like"):
        patches.set(torch, name, _factory(getattr(torch, name), name))
    tensor_to, tensor_cuda, tensor_copy = torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.copy_

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device", next((a for a in args if isinstance(a, str | torch.device)), None))
        device = next((a.device for a in args if isinstance(a, torch.Tensor)), device)
        if isinstance(self, PretendTensor) or _is_cuda(device):
            return _to_method(self, *args, **kwargs)
        return tensor_to(self, *args, **kwargs)

    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
        return _to_method(self, _device(device), non_blocking=non_blocking)

    def copy_(self: torch.Tensor, source: Any, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(self, PretendTensor) or isinstance(source, PretendTensor):
            return _copy(self, source, non_blocking)
        return tensor_copy(self, source, non_blocking)

    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        if isinstance(self, PretendTensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        return self if isinstance(self, PinnedTensor) else PinnedTensor.around(self.detach().clone())

    for name, method in {"to": to, "cuda": cuda, "copy_": copy_, "pin_memory": pin_memory}.items():
        patches.set(torch.Tensor, name, method)
    patches.set(torch.Tensor, "record_stream", _record_stream)
    patches.set(torch.Tensor, "is_pinned", lambda self, *_: isinstance(self, PinnedTensor))
    del tensor_cuda


def _patch_threads(patches: _Patches) -> None:
    """Makes the order that threads have by starts, joins, events, conditions and executors known to the clocks."""
    start, join = threading.Thread.start, threading.Thread.join

    def thread_start(self: Any) -> None:
        rank, clock, run = _ME.rank, _publish(), self.run

        def ordered_run() -> None:
            _ME.rank = rank
            _learn(clock)
            try:
                run()
            finally:
                self.pretend_end = _publish()

        self.run = ordered_run
        start(self)

    def thread_join(self: Any, timeout: float | None = None) -> None:
        join(self, timeout)
        if not self.is_alive():
            _learn(getattr(self, "pretend_end", {}))

    patches.set(threading.Thread, "start", thread_start)
    patches.set(threading.Thread, "join", thread_join)

    def event_set(self: Any) -> None:
        clock = _publish()
        with _LOCK:
            _join(self.__dict__.setdefault("pretend_clock", {}), clock)
        _event_set(self)

    def event_wait(self: Any, timeout: float | None = None) -> bool:
        result = _event_wait(self, timeout)
        if result:
            _learn(self.__dict__.get("pretend_clock", {}))
        return result

    def event_is_set(self: Any) -> bool:
        result = _event_is_set(self)
        if result:
            _learn(self.__dict__.get("pretend_clock", {}))
        return result

    patches.set(threading.Event, "set", event_set)
    patches.set(threading.Event, "wait", event_wait)
    patches.set(threading.Event, "is_set", event_is_set)
    notify, condition_wait = threading.Condition.notify, threading.Condition.wait

    def condition_notify(self: Any, n: int = 1) -> None:
        clock = _publish()
        with _LOCK:
            _join(self.__dict__.setdefault("pretend_clock", {}), clock)
        notify(self, n)

    def ordered_wait(self: Any, timeout: float | None = None) -> bool:
        result = condition_wait(self, timeout)
        _learn(self.__dict__.get("pretend_clock", {}))
        return result

    patches.set(threading.Condition, "notify", condition_notify)
    patches.set(threading.Condition, "wait", ordered_wait)
    submit, result = ThreadPoolExecutor.submit, Future.result

    def ordered_submit(self: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        clock, rank = _publish(), _ME.rank
        end: Clock = {}

        def run(*args: Any, **kwargs: Any) -> Any:
            _ME.rank = rank
            _learn(clock)
            try:
                return function(*args, **kwargs)
            finally:
                end.update(_publish())

        future: Any = submit(self, run, *args, **kwargs)
        future.pretend_end = end
        return future

    def ordered_result(self: Any, timeout: float | None = None) -> Any:
        try:
            return result(self, timeout)
        finally:
            if self.done():
                _learn(getattr(self, "pretend_end", {}))

    patches.set(ThreadPoolExecutor, "submit", ordered_submit)
    patches.set(Future, "result", ordered_result)


@contextlib.contextmanager
def pretend_cuda(*, lag: Lag = "none") -> Iterator[Findings]:
    """Within it ``torch.cuda`` and ``torch.distributed.ProcessGroupNCCL`` are pretended. Not reentrant.

    Args:
        lag: whose work is executed as late as the order allows: nobody's, the default streams', or all others'.
    """
    global _WORLD
    _WORLD = _World(lag)
    patches = _Patches()
    _patch_torch(patches)
    _patch_threads(patches)
    try:
        yield _WORLD.findings
    finally:
        patches.undo()


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Calls ``function(rank, store, *args)`` in a thread a rank, whose device is ``cuda:rank``; returns the results."""
    store = dist.HashStore()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []  # the first one is the cause of the others, if any
    finished = threading.Semaphore(0)

    def run(rank: int) -> None:
        _ME.rank = rank
        with _LOCK:
            _WORLD.contexts.add((rank, rank))
        set_device(rank)
        try:
            results[rank] = function(rank, store, *args)
        except BaseException as error:
            errors.append(error)
        finally:
            finished.release()

    threads = [threading.Thread(target=run, args=(r,), daemon=True, name=f"main of rank {r}") for r in range(size)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert errors or finished.acquire(timeout=2 * HANG_S), "ranks hang"
    if errors:
        raise errors[0]
    for thread in threads:
        thread.join(HANG_S)
    return results
