"""A replica's way to an open center: which replica serves which shard, and which attaches or has a session."""

import json
import socket
from datetime import timedelta

import torch
from torch import Tensor

from lightning_easgd.communication._c10d import PrefixStore, Store, TCPStore, new_group
from lightning_easgd.communication._session import Channel, Session, SessionServer, Terms
from lightning_easgd.communication._shared_center import SharedCenter
from lightning_easgd.communication._transport import OpenCenter, TransportError
from lightning_easgd.communication.parameter_server._assembly import Assembly, AttachedCenter
from lightning_easgd.communication.parameter_server._distant_center import DistantCenter
from lightning_easgd.communication.parameter_server._rule_text import encode_rule
from lightning_easgd.communication.parameter_server._shards import LocalShard, Shard
from lightning_easgd.rules import CenterRule

__all__ = ["Opening", "connect"]

_CPU = torch.device("cpu")


def connect(store: Store, shard: int, replica: int, rank: int, timeout: timedelta) -> Channel:
    """Opens a replica's session with a shard; rank 0 is the server, 1 the replica. Blocks until both have come."""
    group = new_group(PrefixStore(f"session/{shard}/{replica}", store), rank, 2, _CPU, timeout)
    return Channel(group, 1 - rank, timeout)


class Opening:
    """One replica's way to an open center."""

    def __init__(
        self, terms: Terms, initial: Tensor, replica: int, rule: CenterRule, store: Store, timeout: timedelta
    ) -> None:
        self.who = f"replica {replica} of {terms.num_replicas} could not open the center"
        self._terms, self._initial, self._replica, self._rule = terms, initial, replica, rule
        self._timeout = timeout
        self._store = store
        self._assembly = Assembly(store, replica, terms.num_replicas, timeout)
        self._vector = torch.empty(initial.shape, dtype=initial.dtype, pin_memory=initial.is_cuda)
        self._server: SessionServer | None = None
        self._attached: SharedCenter | None = None
        self._shards: list[Shard] = []

    def among_replicas(self, host: str) -> OpenCenter:
        """Opens a center that some of the replicas serve. Collective."""
        terms, replica = self._terms, self._replica
        mine = {"host": host, "name": socket.gethostname(), "terms": terms.to_json()}
        all_of_them = [json.loads(text) for text in self._assembly.gather("open", json.dumps(mine))]
        for other, theirs in enumerate(all_of_them):
            if theirs["terms"] != all_of_them[0]["terms"]:
                raise TransportError(
                    f"{self.who}: replica {other} opens with {theirs['terms']}, replica 0 with "
                    f"{all_of_them[0]['terms']}"
                )
        hosts = [each["host"] for each in all_of_them]
        first_on = {h: hosts.index(h) for h in hosts}  # in the order of these replicas
        if terms.num_shards > len(first_on):
            raise ValueError(
                f"ParameterServer(num_shards={terms.num_shards}): each shard needs a host of its own, and there are "
                f"{len(first_on)}"
            )
        # All replicas go through the pairs of shard and replica in one order. No two replicas wait for each other then.
        for shard, server in enumerate(list(first_on.values())[: terms.num_shards]):
            if replica == server:
                self._serve(shard, [r for r, h in enumerate(hosts) if h != host])
            elif hosts[server] == host:
                self._attach(shard, self._assembly.get(f"path/{shard}"))
            else:
                channel = connect(self._store, shard, replica, 1, self._timeout)
                self._join(channel, shard, f"{all_of_them[server]['name']} (replica {server})", brings=shard > 0)
        return self._center()

    def at(self, address: str) -> OpenCenter:
        """Opens a center that a separate process serves. Collective."""
        host, _, port = address.rpartition(":")
        try:
            server = TCPStore(host, int(port), is_master=False, timeout=self._timeout)
        except RuntimeError as error:
            raise TransportError(
                f"{self.who}: no server at {address} (python -m lightning_easgd.center): {error}"
            ) from error
        if self._replica == 0:
            rule = encode_rule(self._rule)
            number = server.add("openings", 1)
            server.set(f"opening/{number}/request", json.dumps({"terms": self._terms.to_json(), "rule": rule}))
            # Replica 0 alone reads a refusal, after which the server ends, and passes it on.
            ours = PrefixStore(f"opening/{number}", server)
            ours.wait(["answer"], self._timeout)
            refusal = ours.get("answer").decode()
            if refusal:
                ours.add("read", 1)
            self._store.set("refusal", refusal)
            self._store.set("opening", str(number))
        number = int(self._assembly.get("opening"))
        ours = PrefixStore(f"opening/{number}", server)
        refusal = self._assembly.get("refusal")
        if refusal:
            raise TransportError(f"{self.who}: the server at {address} refuses: {refusal}")
        self._join(connect(ours, 0, self._replica, 1, self._timeout), 0, address, brings=True)
        return self._center()

    def undo(self) -> None:
        """Gives up what was opened."""
        for shard in self._shards:
            shard.cut()
        if self._server is not None:
            self._server.stop()
        if self._attached is not None:
            self._attached.close()

    def _serve(self, shard: int, clients: list[int]) -> None:
        part = self._initial[self._terms.shard(shard)].cpu()
        channels = {}
        if shard > 0:  # then replica 0 is on another host
            channels[0] = connect(self._store, shard, 0, 0, self._timeout)
            part = channels[0].receive_vector(torch.empty_like(part))
        terms = self._terms
        path = SharedCenter.create(part, num_replicas=terms.num_replicas, num_slots=terms.num_slots, rule=self._rule)
        self._server = SessionServer(path, terms, part.numel(), self._rule, self._timeout)
        self._attach(shard, path)
        self._store.set(f"path/{shard}", path)
        for client in clients:
            channel = channels.get(client) or connect(self._store, shard, client, 0, self._timeout)
            self._server.accept(client, channel)

    def _attach(self, shard: int, path: str) -> None:
        terms, whole = self._terms, self._terms.num_shards == 1
        self._attached = AttachedCenter(
            path,
            replica=self._replica,
            num_replicas=terms.num_replicas,
            num_slots=terms.num_slots,
            rule=self._rule,
            timeout=self._timeout,
            device=self._initial.device if whole else _CPU,
            store=self._store if whole else None,
            assembly=self._assembly,
            server=self._server if whole else None,
        )
        if not whole:
            self._shards.append(LocalShard(self._attached, self._vector[terms.shard(shard)]))

    def _join(self, channel: Channel, shard: int, server: str, *, brings: bool) -> None:
        part = self._terms.shard(shard)
        if brings and self._replica == 0:
            channel.send_vector(self._initial[part].cpu())
        session = Session(channel, self._terms, self._vector[part], replica=self._replica, server=server)
        self._shards.append(session)

    def _center(self) -> OpenCenter:
        center: OpenCenter
        if self._attached is not None and not self._shards:
            center = self._attached
        else:
            for shard in self._shards:
                shard.read_exactly()
            center = DistantCenter(
                self._shards,
                self._terms,
                self._vector,
                replica=self._replica,
                rule=self._rule,
                device=self._initial.device,
                timeout=self._timeout,
                assembly=self._assembly,
                server=self._server,
            )
        self._assembly.gather("open", "")
        return center
