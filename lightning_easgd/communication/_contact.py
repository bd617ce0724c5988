"""A TCP connection over which two processes tell each other how they are, without ever waiting.

The kernel closes it when the process ends, however that ends: so a death is heard at once. A child that was forked
does not keep it open: what it inherits is closed there.
"""

import json
import os
import socket
import sys
import weakref
from datetime import timedelta
from typing import Any

__all__ = ["Line", "keep_from_children", "listen"]

# A host that has vanished closes nothing: after so long without an answer the kernel gives its connections up.
_VANISHED_S = 60
# A peer that does not read is told no more than this; each message stands by itself.
_BACKLOG_BYTES = 1 << 16
_LONGEST_BYTES = 1 << 20  # of a message; more than that comes from something else

_open: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def keep_from_children(sock: socket.socket) -> socket.socket:
    """Returns ``sock``, which a process that is forked from this one closes as soon as it begins."""
    _open.add(sock)
    return sock


def _close_inherited() -> None:
    for sock in list(_open):
        sock.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def listen() -> socket.socket:
    """Returns a socket that listens on a free port of all interfaces, as torch's store does. ``OSError`` if none is."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", 0), backlog=1024)
    listener.setblocking(False)
    return keep_from_children(listener)


class Line:
    """JSON objects, one a line, over a connection. Nothing here blocks.

    Args:
        sock: connected.

    Attributes:
        is_closed: whether the other end has closed it, or is out of reach.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            for name, value in (
                (socket.TCP_KEEPIDLE, _VANISHED_S // 4),
                (socket.TCP_KEEPINTVL, _VANISHED_S // 4),
                (socket.TCP_USER_TIMEOUT, 1000 * _VANISHED_S),
            ):
                sock.setsockopt(socket.IPPROTO_TCP, name, value)
        self._sock = keep_from_children(sock)
        self._incoming = self._outgoing = b""
        self.is_closed = False

    @classmethod
    def to(cls, host: str, port: int, timeout: timedelta) -> "Line":
        """Connects. Blocks until the other end is there, ``timeout`` at most; ``OSError`` if it is not."""
        return cls(socket.create_connection((host, port), timeout.total_seconds()))

    def fileno(self) -> int:
        """Returns what ``select`` takes."""
        return self._sock.fileno()

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message. A peer that has not read for long misses it."""
        if len(self._outgoing) < _BACKLOG_BYTES:
            self._outgoing += json.dumps(message).encode() + b"\n"
        self._push()

    def hear(self) -> list[dict[str, Any]]:
        """Returns the messages that are there by now, also those of a peer that has closed the line since."""
        self._push()
        while not self.is_closed:
            try:
                some = self._sock.recv(1 << 16)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.is_closed = True
                break
            self.is_closed = not some or len(self._incoming) > _LONGEST_BYTES
            self._incoming += some
        *lines, self._incoming = self._incoming.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # not one of ours
            self.is_closed = True
            return []
        return [message for message in messages if isinstance(message, dict)]

    def hang_up(self) -> None:
        """Says that nothing more will come. The other end still may speak."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:  # it has gone already
            self.is_closed = True

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self.is_closed = True
        self._sock.close()

    def _push(self) -> None:
        while self._outgoing and not self.is_closed:
            try:
                self._outgoing = self._outgoing[self._sock.send(self._outgoing) :]
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # what the peer has said before it went can still be heard: ``hear`` finds the end
                self._outgoing = b""
