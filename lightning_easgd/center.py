"""A center in a separate process: ``python -m lightning_easgd.center --port 29400 --num-replicas 4``.

None of the replicas serves then; they reach the server by ``ParameterServer(address="host:port")``, those on its host
included. The first replica sends the center's size, dtype, slots, rule and rounding, as data: no code travels. Every
process that reaches the port is trusted, as everywhere in ``torch.distributed``; keep it inside the job's network.
"""

import argparse
import json
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch

from lightning_easgd.communication import TransportError
from lightning_easgd.communication._c10d import PrefixStore, Store, new_store_server
from lightning_easgd.communication._session import SessionServer, Terms
from lightning_easgd.communication._shared_center import SharedCenter
from lightning_easgd.communication.parameter_server import connect, decode_rule

__all__ = ["main", "serve"]

log = logging.getLogger(__name__)

_POLL_S = 0.2
_FAREWELL = timedelta(seconds=5)  # for replica 0 to read a refusal


def serve(host: str, port: int, num_replicas: int, timeout: timedelta) -> list[int]:
    """Serves one job's centers, one for each of its optimizers, and returns when all replicas have closed them.

    Args:
        host: the interface to listen on; "0.0.0.0" for all. The sessions' is ``GLOO_SOCKET_IFNAME``, if that is set.
        port: the port to listen on; 0 for any free one, which the log names.
        num_replicas: how many replicas each center waits for.
        timeout: the longest wait for the first replica, and of every operation after that.

    Returns:
        The replicas that were lost on the way.

    Raises:
        OSError: the port cannot be had.
        TransportError: no replica came in time, or not all.
    """
    with socket.create_server((host, port), reuse_port=False) as listening:
        port = listening.getsockname()[1]
        reachable = "localhost" if host in ("", "0.0.0.0") else host
        # The store closes the descriptor that it listens on.
        store = new_store_server(reachable, timeout, port, master_listen_fd=listening.detach())
    log.info("serving a center for %d replicas at %s:%d", num_replicas, host, port)
    began = time.monotonic()
    servers: list[SessionServer] = []
    while True:
        if store.check([_request_key(len(servers) + 1)]):
            servers.append(_open(store, len(servers) + 1, num_replicas, timeout))
        elif servers and all(server.join(0) for server in servers):
            break
        elif not servers and time.monotonic() - began > timeout.total_seconds():
            raise TransportError(f"no replica came within {timeout.total_seconds():g} s")
        else:
            time.sleep(_POLL_S)  # between two looks
    lost = sorted({replica for server in servers for replica in server.lost()})
    log.info("all replicas have left after %.1f s%s", time.monotonic() - began, f"; lost: {lost}" if lost else "")
    return lost


def _request_key(number: int) -> str:
    return f"opening/{number}/request"


def _open(store: Store, number: int, num_replicas: int, timeout: timedelta) -> SessionServer:
    """Opens the center that replica 0 asks for, with all replicas."""
    request = json.loads(store.get(_request_key(number)))
    ours = PrefixStore(f"opening/{number}", store)
    try:
        terms, rule = Terms.from_json(request["terms"]), decode_rule(request["rule"])
        if terms.num_replicas != num_replicas:
            raise ValueError(f"it was started for {num_replicas} replicas, and {terms.num_replicas} come")
    except (TypeError, ValueError) as error:
        ours.set("answer", str(error))
        with suppress(RuntimeError):  # the refusal stands, read or not
            ours.wait(["read"], _FAREWELL)
        raise TransportError(f"a center was asked for that cannot be: {error}") from error
    ours.set("answer", "")
    try:
        first = connect(ours, 0, 0, 0, timeout)
        value = first.receive_vector(torch.empty(terms.numel, dtype=terms.torch_dtype))
        path = SharedCenter.create(value, num_replicas=num_replicas, num_slots=terms.num_slots, rule=rule)
        server = SessionServer(path, terms, terms.numel, rule, timeout)
        server.accept(0, first)
        for replica in range(1, num_replicas):
            server.accept(replica, connect(ours, 0, replica, 0, timeout))
    except RuntimeError as error:
        raise TransportError(f"not all of {num_replicas} replicas came: {error}") from error
    return server


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Returns what reads an argument that must be at least ``low`` and below ``high``."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(-1)
        if not low <= number < high:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} must be {what} of at least {low} and below {high}")
        return number

    return read


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 when all replicas have closed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_easgd.center",
        description="Serve the center of an asynchronous run to replicas on any host. They use "
        "ParameterServer(address='HOST:PORT'). Ends when all of them have closed the center.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    port, count, seconds = _number(int, 0, 1 << 16), _number(int, 1, 1 << 20), _number(float, 0.001, 1e9)
    parser.add_argument("--host", default="0.0.0.0", help="interface to listen on; 0.0.0.0 is every one")
    parser.add_argument("--port", type=port, default=29400, help="port to listen on; 0 is any free one")
    parser.add_argument(
        "--num-replicas", type=count, required=True, default=argparse.SUPPRESS, help="how many replicas will come"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=1800.0,
        help="longest wait in seconds: for the first replica to come, and of every operation",
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        lost = serve(given.host, given.port, given.num_replicas, timedelta(seconds=given.timeout))
    except (OSError, TransportError) as error:
        log.error("%s", error)
        return 1
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
