"""Where all replicas of a served center meet, and the center of those on the server's host."""

from datetime import timedelta
from typing import Any

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._roll_call import await_all
from lightning_easgd.communication._session import SessionServer
from lightning_easgd.communication._shared_center import SharedCenter
from lightning_easgd.communication._transport import TransportError

__all__ = ["Assembly", "AttachedCenter"]


class Assembly:
    """Where all replicas of a center meet: rare, collective and blocking, each wait bounded by the timeout."""

    def __init__(self, store: Store, replica: int, num_replicas: int, timeout: timedelta) -> None:
        self._store, self._replica, self._num_replicas, self._timeout = store, replica, num_replicas, timeout
        self._number = 0

    def get(self, key: str) -> str:
        """Waits for a key and returns its value. ``TransportError`` if nobody sets it."""
        if await_all(self._store, [key], self._timeout):
            raise self._alone("open", f"there is no {key!r} in the store")
        return self._store.get(key).decode()

    def gather(self, purpose: str, mine: str) -> list[str]:
        """Waits for all replicas and returns what each has brought. ``TransportError`` if not all come."""
        self._number += 1
        keys = [f"assembly/{self._number}/{replica}" for replica in range(self._num_replicas)]
        self._store.set(keys[self._replica], mine)
        missing = await_all(self._store, keys, self._timeout)
        if missing:
            raise self._alone(purpose, f"no sign of the replicas {missing}")
        return [self._store.get(key).decode() for key in keys]

    def _alone(self, purpose: str, why: str) -> TransportError:
        return TransportError(
            f"replica {self._replica} of {self._num_replicas} could not {purpose} the center: {why} for "
            f"{self._timeout.total_seconds():g} s"
        )


class AttachedCenter(SharedCenter):
    """The center in a replica on the server's host. The replicas meet elsewhere than those of ``SharedMemory``."""

    def __init__(self, path: str, *, assembly: Assembly, server: SessionServer | None, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self._assembly, self._server = assembly, server

    def _begin_operation(self) -> None:
        super()._begin_operation()
        if self._server is not None:
            self.traffic.bytes_sent += self._server.take_bytes_sent()

    def _meet(self, where: str) -> None:
        del where
        self._assembly.gather("restore", "")
