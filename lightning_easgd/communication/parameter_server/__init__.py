"""A center that replicas on several hosts share: one of them serves it, the others add to it when they like.

The center lies in shared memory on the server's host. Replicas there attach to it directly; each of the others has a
session with the server (``_session.py``), a two-rank Gloo group found through the store, and a thread on the server's
side that reads and adds in its name. A replica waits for the server alone, never for another replica.
"""

import contextlib
from datetime import timedelta
from typing import get_args

from torch import Tensor

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._host import host_identity
from lightning_easgd.communication._session import Terms, Wire
from lightning_easgd.communication._transport import OpenCenter, Transport, TransportError, check_open
from lightning_easgd.communication.parameter_server._opening import Opening, connect
from lightning_easgd.communication.parameter_server._rule_text import decode_rule, encode_rule
from lightning_easgd.rules import CenterRule

__all__ = ["ParameterServer", "connect", "decode_rule", "encode_rule"]


class ParameterServer(Transport):
    """Asynchronous transport over any number of hosts, on ``torch.distributed`` alone.

    By default the vector lies on the host of replica 0, which serves it beside its own training. With ``num_shards``
    it is cut into as many slices, the k-th served by the k-th host. With ``address`` none of the replicas serves, but a
    separate process: ``python -m lightning_easgd.center``.

    A replica whose connection breaks counts as lost, and the others go on. When a server is gone, the next operation of
    its clients raises. ``close`` waits for nobody: a replica that serves goes on serving in the background until its
    clients have closed. If the process of that replica ends earlier, it first waits for its clients, 30 seconds at
    most.

    Memory: where a shard is served its slice, what the rule remembers, and for each session two slices (with
    ``wire="bfloat16"`` three and a half); in a remote replica two vectors, one of which it lends to an exchange (with
    bfloat16 three and a half; on a CUDA device two there, and on the host two of pinned memory), and one more from an
    exchange whose drift is measured to the next.

    Args:
        num_shards: number of slices, >= 1, at most the number of hosts.
        wire: what numbers travel as: ``"float32"`` (the center's own dtype) or ``"bfloat16"``, half as many bytes.
            What rounding takes from a delta is added to the next one; what it takes from the center follows with the
            next pull.
        address: ``"host:port"`` of a stand-alone server, which holds one shard.

    Raises:
        ValueError: an argument is out of range.
    """

    synchronous = False

    def __init__(self, *, num_shards: int = 1, wire: Wire = "float32", address: str | None = None) -> None:
        if isinstance(num_shards, bool) or not isinstance(num_shards, int) or num_shards < 1:
            raise ValueError(f"ParameterServer(num_shards={num_shards!r}): must be an integer >= 1")
        if wire not in get_args(Wire):
            raise ValueError(f"ParameterServer(wire={wire!r}): must be one of {', '.join(map(repr, get_args(Wire)))}")
        if address is not None:
            host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
            if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
                raise ValueError(f"ParameterServer(address={address!r}): must be 'host:port', a port from 1 to 65535")
            if num_shards != 1:
                raise ValueError(
                    f"ParameterServer(address={address!r}, num_shards={num_shards}): a stand-alone server holds one "
                    "shard; leave num_shards out"
                )
        self.num_shards, self.wire, self.address = num_shards, wire, address

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
    ) -> OpenCenter:
        """Opens the center; see ``Transport.open``.

        Raises:
            ValueError: there are fewer hosts than shards, or the rule cannot travel to a stand-alone server.
        """
        check_open(self, initial, replica, num_replicas, rule)
        terms = Terms(
            numel=initial.numel(),
            dtype=str(initial.dtype).removeprefix("torch."),
            num_replicas=num_replicas,
            num_slots=num_slots,
            num_vectors=rule.num_vectors,
            wire=self.wire,
            num_shards=self.num_shards,
        )
        opening = Opening(terms, initial, replica, rule, store, timeout)
        with contextlib.ExitStack() as undo:
            undo.callback(opening.undo)
            try:
                center = (
                    opening.among_replicas(self._host(replica)) if self.address is None else opening.at(self.address)
                )
            except TransportError:
                raise
            except RuntimeError as error:  # of the store or of a process group
                raise TransportError(f"{opening.who}: {error}") from error
            undo.pop_all()
        return center

    def _host(self, replica: int) -> str:
        """Returns which host a replica is on; tests put replicas of one machine apart."""
        del replica
        return host_identity()

    def __repr__(self) -> str:
        """Returns the constructor call, without defaults."""
        given = [f"num_shards={self.num_shards}"] if self.num_shards != 1 else []
        given += [f"wire={self.wire!r}"] if self.wire != "float32" else []
        given += [f"address={self.address!r}"] if self.address is not None else []
        return f"{type(self).__name__}({', '.join(given)})"
