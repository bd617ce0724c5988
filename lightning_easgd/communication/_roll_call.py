"""Points at which all ranks of a job wait for each other; a rank that does not come is named.

Every wait on a store for what others put there is one loop, ``await_all``. A failure interrupts it. It goes on as long
as somebody moves, where that can be told. It knows who is missing.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._transport import TransportError

__all__ = ["RollCall", "await_all", "gather"]

_SHORTEST_S, _LONGEST_S = 0.001, 0.05  # between two looks at the store
_LOOK_S = 1.0  # between two looks at what else may have happened


def await_all(
    store: Store,
    keys: Sequence[str],
    timeout: timedelta,
    *,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[], object] = lambda: None,
    idle: Callable[[], None] = lambda: None,
) -> list[int]:
    """Waits until all keys are in a store, and returns the places of those that are not. Blocking.

    Args:
        store: where the others set them.
        keys: one for each that is waited for.
        timeout: how long to wait while nobody comes and ``progress`` stays the same.
        check: called now and then; raises ``RuntimeError`` if waiting has become pointless.
        progress: returns what changes as long as one that is still on its way moves.
        idle: called between two looks, and once at the end.

    Returns:
        An empty list where all have come.

    Raises:
        RuntimeError: what ``check`` raises, unless all have come by then, and one has failed over what they brought.
    """
    keys = list(keys)
    seen: object = None
    moved = looked = time.monotonic()
    pause = _SHORTEST_S
    look_s = min(_LOOK_S, timeout.total_seconds() / 4)
    while not store.check(keys):  # not ``wait``, whose short timeouts torch reports on stderr
        idle()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_S)
        now = time.monotonic()
        if now - looked < look_s:
            continue
        looked = now
        try:
            check()
        except RuntimeError:
            if not store.check(keys):
                raise
            break
        missing = [place for place, key in enumerate(keys) if not store.check([key])]
        state = missing, progress()
        if state != seen:
            seen, moved = state, (moved if seen is None else now)
        if missing and now - moved > timeout.total_seconds():
            return missing
    idle()
    return []


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
    missing = await_all(store, keys, timeout)
    if missing:
        raise TransportError(
            f"replica {replica} of {num_replicas} could not {purpose}: {missing} did not come within "
            f"{timeout.total_seconds():.0f} s"
        )
    return [value.decode() for value in store.multi_get(keys)]


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
        missing = await_all(self._store, keys, self._timeout, check=self._check)
        if missing:
            raise TransportError(
                f"rank {self._rank} of {self._world_size}: the ranks could not {purpose}, since {missing} did not come "
                f"within {self._timeout.total_seconds():.0f} s"
            )
        if self._number > 1:  # all have read the call before, or they would not be here
            self._store.delete_key(f"{self._number - 1}/{self._rank}")
        return [value.decode() for value in self._store.multi_get(keys)]
