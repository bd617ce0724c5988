"""Names of ``torch.distributed`` that its stubs do not export, and the package's own groups and stores."""

import sys
import weakref
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import AllgatherOptions, PrefixStore, Store, TCPStore
else:
    from torch._C._distributed_c10d import AllgatherOptions
    from torch.distributed import PrefixStore, Store, TCPStore

__all__ = [
    "AllgatherOptions",
    "Group",
    "PrefixStore",
    "Store",
    "TCPStore",
    "Work",
    "broadcast_bytes",
    "close_groups",
    "new_group",
    "new_store_server",
    "set_timeout",
]

_MESSAGE_BYTES = 4 << 20
_GRACE = timedelta(seconds=30)


class Work(Protocol):
    """An operation in flight."""

    def wait(self, timeout: timedelta = ...) -> bool:
        """Blocks until it is complete; ``RuntimeError`` if it fails or takes longer."""
        ...

    def is_completed(self) -> bool:
        """Returns whether it is over, without waiting."""
        ...

    def get_future(self) -> Any:
        """Returns the future that completes with it."""
        ...


class Group(Protocol):
    """The operations of a process group that this package uses."""

    def allreduce(self, tensors: list[Tensor]) -> Work:
        """Starts summing one tensor over all ranks, in place."""
        ...

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: AllgatherOptions) -> Work:
        """Starts copying one tensor of each rank to all ranks: ``outputs[0][r]`` becomes rank r's ``inputs[0]``."""
        ...

    def alltoall_base(self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int]) -> Work:
        """Starts sending part r of ``input`` to rank r and filling part r of ``output`` from it; [] is equal parts."""
        ...

    def broadcast(self, tensor: Tensor, root: int) -> Work:
        """Starts copying one tensor from ``root`` to all ranks, in place."""
        ...

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work:
        """Starts sending one contiguous tensor to ``rank``."""
        ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work:
        """Starts receiving one contiguous tensor from ``rank``; one of another size ends the process."""
        ...


def new_group(store: Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> Group:
    """Returns a process group of its own over ``store``: NCCL for CUDA tensors, else Gloo. Collective, blocking.

    It needs no default group, so several may live in threads of one process. Gloo's interface is chosen by
    ``GLOO_SOCKET_IFNAME`` where that is set.
    """
    c10d: Any = dist
    if device.type == "cuda":
        if not hasattr(c10d, "ProcessGroupNCCL"):
            raise RuntimeError(
                "replicas on CUDA devices exchange through NCCL, and this torch was built without it (on Windows all "
                "are): train on the CPU, or with a build that torch.distributed.is_nccl_available() says yes to"
            )
        options = c10d.ProcessGroupNCCL.Options()
        # NCCL's own watch ends the process; so it comes after ours, which says what was waited for.
        options._timeout = timeout + _GRACE
        group: Any = _OwnGroup(c10d.ProcessGroupNCCL(store, rank, size, options))
    else:
        group = _OwnGroup(c10d.ProcessGroupGloo(store, rank, size, timeout))
    own: Group = group
    return own


class _OwnGroup:
    """A process group that ends with its last reference, or by ``close_groups``: its holders then have nothing.

    torch waits for its threads, and for what they still do, when a group is destroyed.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        _open_groups.add(self)

    def __getattr__(self, name: str) -> Any:
        group = self.__dict__.get("_group")
        if group is None:
            raise RuntimeError(f"{name} of a process group that has been closed")
        return getattr(group, name)

    def close(self) -> None:
        group, self._group = self._group, None
        if hasattr(group, "abort"):  # what a lost peer never answers must not hold us
            group.abort()
        del group


_open_groups: "weakref.WeakSet[_OwnGroup]" = weakref.WeakSet()


def close_groups() -> None:
    """Ends all groups of this process that ``new_group`` has made and that somebody still holds. Not collective."""
    for group in list(_open_groups):
        group.close()
    _open_groups.clear()


def set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Sets the longest wait of a registered group's operations from here on. Local."""
    c10d: Any = dist
    if hasattr(c10d, "set_timeout"):  # torch 2.14 and newer, where the other warns
        c10d.set_timeout(timeout, group)
    else:
        c10d.distributed_c10d._set_pg_timeout(timeout, group)


def new_store_server(host: str, timeout: timedelta, port: int = 0, **options: Any) -> TCPStore:
    """Returns a store that this process serves, on a free port unless told otherwise. Does not wait for clients."""
    # The quicker server, which torch's builds for Windows do not have.
    options["use_libuv"] = sys.platform != "win32"
    return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, **options)


def broadcast_bytes(group: Group, tensors: Iterable[Tensor]) -> None:
    """Replaces contiguous tensors of any dtype by those of rank 0, bit for bit. Collective.

    Small ones go together, in messages of some megabytes; a larger one is a message by itself, without a copy.
    """
    together: list[Tensor] = []
    size = 0
    for part in (t.view(-1).view(torch.uint8) for t in tensors if t.numel()):
        if part.numel() >= _MESSAGE_BYTES:
            group.broadcast(part, 0).wait()
            continue
        together.append(part)
        size += part.numel()
        if size >= _MESSAGE_BYTES:
            _broadcast_together(group, together)
            together, size = [], 0
    if together:
        _broadcast_together(group, together)


def _broadcast_together(group: Group, parts: list[Tensor]) -> None:
    message = torch.cat(parts)
    group.broadcast(message, 0).wait()
    for part, value in zip(parts, message.split_with_sizes([p.numel() for p in parts]), strict=True):
        part.copy_(value)
