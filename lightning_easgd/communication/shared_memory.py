"""A center in memory that the processes of one host share: each adds to it when it likes, nobody waits for another.

The vector is cut into chunks of a cache's size. A replica goes once around all chunks and does its work on each under
a lock of the kernel's, so that what it reads of a chunk is never half of somebody's addition. The replicas begin at
different chunks, and where one meets another it goes on with a chunk that is free and comes back.
"""

from datetime import timedelta

from torch import Tensor

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._shared_center import CHUNK_BYTES, SharedCenter, await_keys
from lightning_easgd.communication._transport import Transport, TransportError, check_open
from lightning_easgd.rules import CenterRule

__all__ = ["CHUNK_BYTES", "SharedCenter", "SharedMemory"]


class SharedMemory(Transport):
    """Asynchronous transport for replicas on one host: the center in memory that their processes share.

    An addition is atomic chunk by chunk. It never waits for a replica, only for the lock on a chunk; a replica that
    dies gives its locks back, and what it had added stays. The memory is a file in ``/dev/shm``, or in the folder for
    temporary files where there is no room for it. It goes when the last replica closes or, should that one be killed,
    when the next center is opened. Needs POSIX. Memory: the center and what the rule remembers, once for all replicas,
    and a private copy of the center in each replica that pulls. For a replica on a CUDA device it is two vectors there
    and two of pinned memory on the host, in each process.

    Args:
        chunk_bytes: bytes of a vector under one lock, >= 8. Default 256 KiB.

    Raises:
        ValueError: ``chunk_bytes`` is out of range.
    """

    synchronous = False

    def __init__(self, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 8:
            raise ValueError(f"SharedMemory(chunk_bytes={chunk_bytes!r}): must be an integer >= 8")
        self.chunk_bytes = chunk_bytes

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
    ) -> "SharedCenter":
        """Opens the center; see ``Transport.open``.

        Raises:
            ValueError: an argument is out of range.
            TransportError: not all replicas came in time, one is on another host or has another vector, or there is no
                room. Raised on every replica that came.
        """
        check_open(self, initial, replica, num_replicas, rule)
        who = f"replica {replica} of {num_replicas} could not open the center in shared memory"
        center: SharedCenter | None = None
        failure = path = ""
        try:
            if replica == 0:
                path = SharedCenter.create(
                    initial, num_replicas=num_replicas, num_slots=num_slots, rule=rule, chunk_bytes=self.chunk_bytes
                )
            else:
                await_keys(store, ["path"], timeout, f"{who}: replica 0 has not come")
                path = store.get("path").decode()
            if path:
                center = SharedCenter(
                    path,
                    replica=replica,
                    num_replicas=num_replicas,
                    num_slots=num_slots,
                    rule=rule,
                    timeout=timeout,
                    device=initial.device,
                    store=store,
                )
                center.check_like(initial)
        except TransportError as error:
            failure = str(error)
        try:
            if replica == 0:
                store.set("path", path)
            store.set(f"opened/{replica}", failure)
            keys = [f"opened/{r}" for r in range(num_replicas)]
            await_keys(store, keys, timeout, f"{who}: not all replicas came")
            failures = [text for text in (store.get(key).decode() for key in keys) if text]
            if failures or center is None:
                raise TransportError(f"{who}: {'; '.join(failures)}")
        except BaseException:
            if center is not None:
                center.close()
            raise
        return center

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return "SharedMemory()" if self.chunk_bytes == CHUNK_BYTES else f"SharedMemory(chunk_bytes={self.chunk_bytes})"
