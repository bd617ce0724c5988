"""The formats in which an all-reduce sends numbers, and one chunk of an all-reduce under way.

A vector is summed chunk by chunk, a few of them under way at once; each of these has a *lane*: messages and scratch
memory that are used again for a later chunk. Two kinds:

* ``ExactLane``: the group's own all-reduce of the center's dtype.
* ``RoundingLane``: numbers travel rounded, but are summed in the center's dtype, and no rounding error is lost. Were
  rounded numbers summed on the way, each hop would round again, and nobody would know by how much. So each replica
  sends its rounded numbers to the replica that sums them, and keeps the error for its own next delta. With two replicas
  both sum all. With more, each sums one part of the chunk, rounds the *sum*, keeps that error for the next sum of the
  part, and sends it to all: a reduce-scatter and an all-gather, as many bytes as a ring's all-reduce of the rounded
  numbers.

All replicas get bit-identical sums, also on different hardware: no operation on it is one that could be fused.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import Work

__all__ = [
    "BLOCK",
    "Chunk",
    "Codec",
    "Collectives",
    "Errors",
    "ExactLane",
    "Lane",
    "Layout",
    "RoundingLane",
    "Wire",
    "block_size",
    "blocks",
    "bytes_of_ring",
    "codec_of",
]

Wire = Literal["float32", "bfloat16", "int8"]
Chunk = tuple[int, int, int]  # start, stop, and how many numbers make a part; see ``Layout``

# Arithmetic goes by so many numbers at a time: they stay in the cache from one operation to the next, and torch starts
# no threads for so few, which would take the cores from the compute that the exchange hides behind. Where it has only
# one, more at a time are better, as far as the cache goes: each call has its price, too.
BLOCK = 1 << 15
_BLOCK_OF_ONE_THREAD = 1 << 17


def block_size() -> int:
    """Returns how many numbers to work on at a time, on the CPU."""
    return _BLOCK_OF_ONE_THREAD if torch.get_num_threads() == 1 else BLOCK


def blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields vectors of one length, (m,), block by block; whole on a device that is not the CPU."""
    if vectors[0].device.type != "cpu":
        yield vectors
    else:
        size = block_size()
        yield from zip(*(torch.split(vector, size) for vector in vectors), strict=True)


class Codec(ABC):
    """A rounded form of numbers.

    Attributes:
        align: it is defined for multiples of so many numbers.
    """

    align: ClassVar[int]

    @abstractmethod
    def size(self, numel: int) -> int:
        """Returns the bytes of ``numel`` numbers, a multiple of ``align``. Zero bytes stand for zeros."""

    @abstractmethod
    def encode_(self, values: Tensor, code: Tensor) -> None:
        """Writes ``values`` (m,), rounded, into ``code`` (size(m),) uint8; leaves the rounding error in ``values``."""

    @abstractmethod
    def decode(self, code: Tensor, out: Tensor) -> None:
        """Writes what ``code`` (size(m),) stands for into ``out`` (m,)."""


class _BFloat16(Codec):
    """The upper half of a float32, rounded to nearest."""

    align = 4  # so that any dtype may follow

    def __init__(self, like: Tensor) -> None:
        self._scratch = like.new_empty(BLOCK)

    def size(self, numel: int) -> int:
        return 2 * numel

    def encode_(self, values: Tensor, code: Tensor) -> None:
        for part, rounded in blocks(values, code.view(torch.bfloat16)):
            rounded.copy_(part)
            if part.numel() > self._scratch.numel():
                self._scratch = part.new_empty(part.numel())
            part.sub_(self._scratch[: part.numel()].copy_(rounded))

    def decode(self, code: Tensor, out: Tensor) -> None:
        for rounded, part in blocks(code.view(torch.bfloat16), out):
            part.copy_(rounded)


class _Int8(Codec):
    """A multiple from -127 to 127 of one unit for every 256 numbers, the largest of them over 127.

    All multiples come first, then the units, in the values' dtype. The unit is 0 where all are, or where it would be
    subnormal: those numbers are wholly rounding error.
    """

    align = 256

    def __init__(self, like: Tensor) -> None:
        self._dtype = like.dtype
        self._scratch = like.new_empty(BLOCK)

    def size(self, numel: int) -> int:
        return numel + numel // self.align * self._dtype.itemsize

    def _views(self, code: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        numel = values.numel()
        multiples, units = code[:numel].view(torch.int8), code[numel:].view(self._dtype)
        size = block_size() if values.device.type == "cpu" else max(numel, 1)
        for start in range(0, numel, size):
            stop = start + size
            yield (
                values[start:stop].view(-1, self.align),
                multiples[start:stop].view(-1, self.align),
                units[start // self.align : stop // self.align].unsqueeze(1),
            )

    def encode_(self, values: Tensor, code: Tensor) -> None:
        for rows, multiples, units in self._views(code, values):
            if rows.numel() > self._scratch.numel():
                self._scratch = rows.new_empty(rows.numel())
            steps = self._scratch[: rows.numel()].view_as(rows)
            torch.amax(torch.abs(rows, out=steps), 1, keepdim=True, out=units)
            units.div_(127).masked_fill_(units < torch.finfo(self._dtype).tiny, 0)
            torch.mul(rows, units.reciprocal().masked_fill_(units == 0, 0), out=steps).round_()
            multiples.copy_(steps)
            rows.sub_(steps.mul_(units))

    def decode(self, code: Tensor, out: Tensor) -> None:
        for rows, multiples, units in self._views(code, out):
            rows.copy_(multiples).mul_(units)


def codec_of(wire: Wire, like: Tensor) -> Codec | None:
    """Returns the codec of a wire for numbers of a tensor's dtype and device; None where they travel as they are."""
    if wire == "float32":
        return None
    return _BFloat16(like) if wire == "bfloat16" else _Int8(like)


class Layout:
    """How a vector of ``numel`` numbers is cut into chunks of equal parts, one part for each of ``size`` ranks.

    Args:
        numel: d.
        size: number of ranks.
        chunk: about how many numbers make a chunk.
        align: a part is a multiple of so many.

    Attributes:
        chunks: (start, stop, part) of each: its numbers, and how many of them, or of the padding, make a part.
        padded: numbers in all, the last chunk's padding included.
    """

    def __init__(self, numel: int, size: int, chunk: int, align: int) -> None:
        unit = size * align
        whole = max(chunk // unit, 1) * unit
        self.chunks: list[Chunk] = []
        for start in range(0, numel, whole):
            stop = min(start + whole, numel)
            self.chunks.append((start, stop, math.ceil((stop - start) / unit) * align))
        self.padded = size * sum(part for _, _, part in self.chunks)

    @property
    def largest(self) -> int:
        """Numbers of the largest part."""
        return max((part for _, _, part in self.chunks), default=0)


class Errors:
    """The rounding errors that this replica has not yet sent to the center.

    Attributes:
        own: (padded,) of this replica's deltas.
        summed: of the sums that this replica rounds: one part of each chunk; with two replicas nobody rounds a sum.
    """

    def __init__(self, layout: Layout, size: int, like: Tensor) -> None:
        self.own = like.new_zeros(layout.padded)
        self.summed = like.new_zeros(layout.padded // size if size > 2 else 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies, on the CPU."""
        return {name: kept.to("cpu", copy=True) for name, kept in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor] | None) -> None:
        """Restores what ``state_dict`` returned; zeros where it has other sizes, as with other parameters."""
        for name, kept in vars(self).items():
            saved = None if state is None else state[name]
            if saved is not None and saved.shape == kept.shape:
                kept.copy_(saved)
            else:
                kept.zero_()


class Collectives(Protocol):
    """What lanes use of a process group."""

    def allreduce(self, tensors: list[Tensor]) -> Work:
        """See ``Group.allreduce``."""
        ...

    def alltoall_base(self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int]) -> Work:
        """See ``Group.alltoall_base``."""
        ...


class Lane(ABC):
    """The way of one chunk at a time: ``launch``, ``relay``, ``finish``, in this order and on all ranks alike.

    The timeout that a lane is made with bounds each wait; None on a device, where its stream waits and not the host.
    """

    @abstractmethod
    def launch(self, chunk: Chunk, delta: Tensor | None, scale: float, *, in_place: bool) -> None:
        """Starts summing ``scale * delta`` over the ranks; returns at once. None adds nothing.

        Args:
            chunk: of the layout.
            delta: (stop - start,).
            scale: factor.
            in_place: whether ``delta``'s memory may be used for the sum.
        """

    @abstractmethod
    def relay(self) -> None:
        """Waits for the first half of the way and starts the second, where there are two; on all ranks alike."""

    @abstractmethod
    def finish(self) -> Tensor:
        """Waits, and returns the sum, (stop - start,): the lane's memory, or the delta's. ``RuntimeError`` if not."""


class ExactLane(Lane):
    """The group's all-reduce, in the center's dtype."""

    def __init__(self, group: Collectives, largest: int, like: Tensor, timeout: timedelta | None) -> None:
        self._group, self._timeout = group, timeout
        self._memory = like.new_empty(largest)
        self._message = self._memory
        self._work: Work | None = None

    def launch(self, chunk: Chunk, delta: Tensor | None, scale: float, *, in_place: bool) -> None:
        start, stop, _ = chunk
        self._message = self._memory[: stop - start]
        if delta is None:
            self._message.zero_()
        else:
            if in_place:
                self._message = delta
            if scale != 1 or not in_place:
                for part, target in blocks(delta, self._message):
                    torch.mul(part, scale, out=target)
        self._work = self._group.allreduce([self._message])

    def relay(self) -> None:
        pass

    def finish(self) -> Tensor:
        _wait(self._work, self._timeout)
        return self._message


class RoundingLane(Lane):
    """Numbers travel as a codec's, their sums are made in the center's dtype.

    The first half of the way is each part's to the rank that sums it, the second the rounded sum's to all. With two
    ranks the first half takes all parts to both, and there is no second.
    """

    def __init__(
        self,
        group: Collectives,
        rank: int,
        size: int,
        layout: Layout,
        codec: Codec,
        errors: Errors,
        timeout: timedelta | None,
    ) -> None:
        self._group, self._rank, self._size, self._timeout = group, rank, size, timeout
        self._layout, self._codec, self._errors = layout, codec, errors
        whole, like = size * layout.largest, errors.own
        self._sum = like.new_empty(whole)
        self._term = like.new_empty(whole if size == 2 else layout.largest)
        self._sent = torch.empty(codec.size(whole), dtype=torch.uint8, device=like.device)
        self._received = torch.empty_like(self._sent)
        self._chunk = (0, 0, 0)
        self._work: Work | None = None

    def launch(self, chunk: Chunk, delta: Tensor | None, scale: float, *, in_place: bool) -> None:
        del in_place  # a message is bytes of another format
        self._chunk = start, stop, part = chunk
        sent, received = self._messages()
        if delta is None:
            sent.zero_()
        else:
            for error, addend in blocks(self._errors.own[start:stop], delta):
                error.add_(addend, alpha=scale)
            for rank, code in enumerate(sent):
                first = start + rank * part
                self._codec.encode_(self._errors.own[first : first + part], code)
        if self._size == 2:
            sizes = [0, 0]
            sizes[1 - self._rank] = sent.numel()
            self._work = self._group.alltoall_base(received.view(-1), sent.view(-1), sizes, sizes)
        else:
            self._work = self._group.alltoall_base(received.view(-1), sent.view(-1), [], [])

    def relay(self) -> None:
        if self._size == 2:
            return
        _wait(self._work, self._timeout)
        start, _, part = self._chunk
        sent, received = self._messages()
        total = self._errors.summed[start // self._size :][:part]
        term = self._term[:part]
        for code in received:
            self._codec.decode(code, term)
            _add(total, term)
        self._codec.encode_(total, sent[0])
        sent[1:] = sent[0]
        self._work = self._group.alltoall_base(received.view(-1), sent.view(-1), [], [])

    def finish(self) -> Tensor:
        _wait(self._work, self._timeout)
        start, stop, part = self._chunk
        sent, received = self._messages()
        total = self._sum[: self._size * part]
        if self._size == 2:
            term = self._term[: total.numel()]
            self._decode(sent, total)
            self._decode(received, term)
            _add(total, term)
        else:
            self._decode(received, total)
        return total[: stop - start]

    def _messages(self) -> tuple[Tensor, Tensor]:
        """Returns what this chunk takes of the memory for messages: a row for each rank."""
        row = self._codec.size(self._chunk[2])
        used = self._size * row
        return self._sent[:used].view(self._size, row), self._received[:used].view(self._size, row)

    def _decode(self, codes: Tensor, out: Tensor) -> None:
        for code, part in zip(codes, out.view(self._size, -1), strict=True):
            self._codec.decode(code, part)


def bytes_of_ring(size: int, num_bytes: int) -> int:
    """Returns what each of ``size`` ranks sends for an all-reduce of a message: all its parts but one, twice."""
    return 2 * (size - 1) * num_bytes // size


def _add(total: Tensor, term: Tensor) -> None:
    for a, b in blocks(total, term):
        a.add_(b)


def _wait(work: Work | None, timeout: timedelta | None) -> None:
    assert work is not None
    if timeout is None:
        work.wait()
    else:
        work.wait(timeout)
