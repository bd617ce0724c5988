"""How the processes of a job learn where rank 0's rendezvous is, when all that they share is an address.

torch makes its default group over a store at that address, and if a process dies in there, or before, nobody notices
for minutes. So rank 0 serves that store earlier, with the rendezvous's port in it. The other ranks then have their line
to rank 0 when torch makes the default group, and the watcher hears of any process that dies from then on.
"""

import itertools
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

from lightning_easgd.communication._c10d import TCPStore, new_store_server

__all__ = ["Notice"]

_KNOCK_S = 0.2  # between two tries to find rank 0; torch's own store waits longer and longer, past its limit

_numbers: Iterator[int] = itertools.count()  # all ranks make their default groups one after the other, alike


class Notice:
    """A number that rank 0 posts at the job's address, and the others read there.

    In one process torch's ``env://`` uses the server that is there: this one must be held until it has.

    Args:
        host: the job's address, where rank 0 is.
        port: on which torch will make its store.
        rank: this process.
        timeout: the longest wait for rank 0.

    Raises:
        RuntimeError: rank 0 did not come, or the port is taken.
    """

    def __init__(self, host: str, port: int, *, rank: int, timeout: timedelta) -> None:
        # An agent's store outlives the processes that it has started again.
        self._key = f"lightning_easgd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_numbers)}"
        self._rank, self._timeout = rank, timeout
        is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)  # as torch asks
        if rank == 0 and not is_agents:
            self._store = new_store_server(host, timeout, port, multi_tenant=True)
            return
        try:
            _knock(host, port, timeout.total_seconds())
            self._store = TCPStore(host, port, is_master=False, timeout=timeout)
        except (OSError, RuntimeError) as error:
            raise self._missing(error) from error

    def post(self, number: int) -> None:
        """Posts it. Rank 0 alone, once; does not block."""
        self._store.set(self._key, str(number))

    def read(self) -> int:
        """Returns it. Blocks until rank 0 has posted it, ``timeout`` at most; ``RuntimeError`` if it does not."""
        try:
            return int(self._store.get(self._key))
        except RuntimeError as error:
            raise self._missing(error) from error

    def _missing(self, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"rank {self._rank}: rank 0 did not come within {self._timeout.total_seconds():.0f} s, or is gone ({error})"
        )


def _knock(host: str, port: int, timeout_s: float) -> None:
    """Returns as soon as somebody listens there; ``OSError`` if nobody does within the time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), max(0.1, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() + _KNOCK_S > deadline:
                raise
        time.sleep(_KNOCK_S)
