"""Points at which all ranks of a job tell each other something, once; the error names every rank that does not come."""

import time
from collections.abc import Callable
from datetime import timedelta

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._transport import TransportError

__all__ = ["RollCall", "gather"]

_SHORTEST_S, _LONGEST_S = 0.001, 0.05  # between two looks at the store


def gather(
    store: Store, topic: str, mine: str, *, replica: int, num_replicas: int, timeout: timedelta, purpose: str
) -> list[str]:
    """Waits for all replicas and returns what each has brought, in their order. Collective and blocking.

    Args:
        store: used with the caller's prefix.
        topic: of this one gathering, the same in all replicas.
        mine: what this replica brings.
        replica: this one.
        num_replicas: how many there are.
        timeout: the longest wait.
        purpose: what all do, as in "it could not ...".

    Raises:
        TransportError: not all came within the timeout; names who is missing.
    """
    keys = [f"{topic}/{r}" for r in range(num_replicas)]
    store.set(keys[replica], mine)
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [r for r, key in enumerate(keys) if not store.check([key])]
        raise TransportError(
            f"replica {replica} of {num_replicas} could not {purpose}: {missing} did not come within "
            f"{timeout.total_seconds():.0f} s"
        ) from error
    return [store.get(key).decode() for key in keys]


class RollCall:
    """A series of roll calls over a store. All ranks make the same ones in the same order.

    Args:
        store: used with the caller's prefix, by this series alone.
        rank: index of the caller.
        world_size: how many there are.
        timeout: the longest wait of a call.
        check: called while waiting; raises if waiting has become pointless.
    """

    def __init__(
        self, store: Store, *, rank: int, world_size: int, timeout: timedelta, check: Callable[[], None]
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout, self._check = timeout, check
        self._number = 0

    def gather(self, purpose: str, mine: str) -> list[str]:
        """Waits for all ranks and returns what each has brought, in their order. Collective and blocking.

        Args:
            purpose: what all do, as in "they could not ...".
            mine: what this rank brings.

        Raises:
            TransportError: not all came within the timeout; names who is missing.
        """
        self._number += 1
        keys = [f"{self._number}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], mine)
        began, pause = time.monotonic(), _SHORTEST_S
        while not self._store.check(keys):  # not ``wait``, which asks nobody else while it waits
            try:
                self._check()
            except RuntimeError:
                if not self._store.check(keys):  # else all had come, and one has failed over what they brought
                    raise
                break
            if time.monotonic() - began > self._timeout.total_seconds():
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise TransportError(
                    f"rank {self._rank} of {self._world_size}: the ranks could not {purpose}, since {missing} did not "
                    f"come within {self._timeout.total_seconds():.0f} s"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_S)
        if self._number > 1:  # all have read the call before, or they would not be here
            self._store.delete_key(f"{self._number - 1}/{self._rank}")
        return [value.decode() for value in self._store.multi_get(keys)]
