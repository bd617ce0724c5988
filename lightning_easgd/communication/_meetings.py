"""Points at which replicas wait for each other although they reach them by different numbers of steps."""

from collections.abc import Callable
from datetime import timedelta

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._roll_call import await_all
from lightning_easgd.communication._transport import TransportError

__all__ = ["Meetings"]


class Meetings:
    """A series of meetings over a store, each attended by every replica, which gives its reason.

    Args:
        store: used with the caller's prefix, by this series alone.
        replica: index of the caller.
        num_replicas: how many meet.
        timeout: how long to wait while nothing moves anywhere.
        progress: returns what changes as long as a replica that is still on its way moves.
        check: called while waiting; raises if waiting has become pointless.

    Attributes:
        number: how many meetings this replica has come to.
    """

    def __init__(
        self,
        store: Store,
        *,
        replica: int,
        num_replicas: int,
        timeout: timedelta,
        progress: Callable[[], object],
        check: Callable[[], None],
    ) -> None:
        self._store, self._replica, self._num_replicas = store, replica, num_replicas
        self._timeout, self._progress, self._check = timeout, progress, check
        self.number = 0

    def meet(self, reason: str, idle: Callable[[], None] = lambda: None) -> list[str]:
        """Waits for all replicas and returns their reasons, in the replicas' order. Collective and blocking.

        A replica that is slow but moves is waited for as long as it takes.

        Args:
            reason: why this replica is here.
            idle: called now and then while waiting, and once at the end.

        Raises:
            TransportError: for the whole timeout no replica came and none moved; names the replicas that are missing,
                and where they are.
        """
        self.number += 1
        keys = [f"{self.number}/{replica}" for replica in range(self._num_replicas)]
        self._store.set(keys[self._replica], reason)
        missing = await_all(self._store, keys, self._timeout, check=self._check, progress=self._progress, idle=idle)
        if missing:
            raise TransportError(
                f"replica {self._replica} waits at {reason!r} for the replicas {missing}, which have not moved for "
                f"{self._timeout.total_seconds():.0f} s"
            )
        if self.number > 1:  # all have left the meeting before, or they would not be here
            self._store.delete_key(f"{self.number - 1}/{self._replica}")
        return [value.decode() for value in self._store.multi_get(keys)]
