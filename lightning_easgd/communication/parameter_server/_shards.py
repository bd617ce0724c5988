"""A slice of a served center as a replica reaches it, wherever it lies."""

from typing import Protocol

import torch
from torch import Tensor

from lightning_easgd.communication._shared_center import SharedCenter

__all__ = ["LocalShard", "Shard", "write_scaled"]


def write_scaled(out: Tensor, x: Tensor, scale: float) -> Tensor:
    """Writes ``scale * x`` into ``out``, which has another memory, and returns it."""
    return out.copy_(x) if scale == 1 else torch.mul(x, scale, out=out)


class Shard(Protocol):
    """A slice of the center as a ``DistantCenter`` reaches it; ``Session`` says what each name means."""

    clock: int
    staleness: int
    lost: list[int]
    announced: Tensor
    bytes_sent: int
    wait_s: float

    def request(self) -> None: ...

    def receive(self) -> None: ...

    def read_exactly(self) -> None: ...

    def stage(self, delta: Tensor, scale: float) -> None: ...

    def transmit(self, read_at: int, slots: Tensor) -> None: ...

    def abstain(self, slots: Tensor) -> None: ...

    def flush(self) -> None: ...

    def memory(self) -> list[Tensor]: ...

    def write(self, value: Tensor, memory: list[Tensor], clock: int) -> None: ...

    def close(self) -> None: ...

    def cut(self) -> None: ...


class LocalShard:
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

    def stage(self, delta: Tensor, scale: float) -> None:
        write_scaled(self._message, delta, scale)

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
