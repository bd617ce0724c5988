"""The transport that looks where the replicas are, and the parameter server between two hosts."""

import json
import pickle
import time
from datetime import timedelta

import pytest
import torch

from lightning_easgd.communication import Transport, TransportError, asynchronous
from lightning_easgd.communication.asynchronous import Asynchronous
from lightning_easgd.communication.parameter_server import ParameterServer
from lightning_easgd.communication.shared_memory import SharedCenter, SharedMemory
from tests.centers import meet, open_center
from tests.helpers import COMMAND_S, run_threads
from tests.network import TwoHosts, two_hosts, why_not


def test_replicas_on_one_host_share_memory(monkeypatch):
    opened = []
    real = SharedMemory.open

    def spy(self, *args, **kwargs):
        opened.append(kwargs["replica"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SharedMemory, "open", spy)

    def body(replica, store):
        with open_center(Asynchronous(num_shards=2), replica, store) as center:
            return type(center)

    assert run_threads(body, 2) == [SharedCenter, SharedCenter]
    assert sorted(opened) == [0, 1]


def test_one_replica_elsewhere_makes_it_a_parameter_server(monkeypatch):
    identities = iter(["here", "here", "there"])
    monkeypatch.setattr(asynchronous, "host_identity", lambda: next(identities))
    opened = []

    def spy(self, *args, **kwargs):
        opened.append((self.num_shards, self.wire, kwargs["replica"]))

    monkeypatch.setattr(ParameterServer, "open", spy)
    run_threads(lambda replica, store: open_center(Asynchronous(wire="bfloat16"), replica, store, 3), 3)
    assert sorted(opened) == [(1, "bfloat16", replica) for replica in range(3)]


def test_a_replica_that_does_not_come_is_named():
    with pytest.raises(TransportError, match=r"replica 1 of 3 could not open the center: \[0, 2\] did not come"):
        open_center(Asynchronous(), 1, torch.distributed.HashStore(), 3, timeout=timedelta(seconds=0.5))


def test_arguments_are_the_parameter_servers():
    with pytest.raises(ValueError, match=r"num_shards=0\): must be an integer >= 1"):
        Asynchronous(num_shards=0)
    with pytest.raises(ValueError, match=r"Asynchronous.open\(replica=2\): must be at least 0 and below 2"):
        open_center(Asynchronous(), 2, torch.distributed.HashStore())
    for text in ("Asynchronous()", "Asynchronous(num_shards=2, wire='bfloat16')"):
        transport: Transport = eval(text)
        assert repr(transport) == repr(pickle.loads(pickle.dumps(transport))) == text
        assert not transport.synchronous


# --- two hosts ------------------------------------------------------------------------------------------------------

# Each host runs two replicas, as threads. They say what they have seen in a line of JSON.
REPLICAS = """
import json, os, sys, threading, time
from datetime import timedelta
import torch, torch.distributed as dist
from lightning_easgd.communication.asynchronous import Asynchronous
from lightning_easgd.rules import Addition
from tests.communication.test_asynchronous import converse

host, wires, numel, exchanges = int(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])
address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if host == 0:
    server = dist.TCPStore(address, port, is_master=True, wait_for_workers=False)
seen = {wire: {} for wire in wires}
def run(replica):
    store = dist.TCPStore(address, port, is_master=False)
    for wire in wires:
        seen[wire][replica] = converse(replica, dist.PrefixStore(wire, store), wire, numel, exchanges)
threads = [threading.Thread(target=run, args=(2 * host + k,)) for k in range(2)]
[t.start() for t in threads]
[t.join(240) for t in threads]
print(json.dumps(seen), flush=True)
if host == 0:
    server.wait(["over"], timedelta(seconds=60))
else:
    dist.TCPStore(address, port, is_master=False).set("over", "")
"""


def converse(replica, store, wire, numel, exchanges):
    """Exchanges, and says what came of it; replica 2 tells when it is in the middle."""
    with open_center(Asynchronous(wire=wire), replica, store, 4, numel) as center:
        longest = 0.0
        for n in range(exchanges):
            if replica == 2 and n == exchanges // 2:
                print("in the middle", flush=True)
            began = time.perf_counter()
            center.exchange(torch.zeros(numel), lambda x, c: x.fill_(1.0)).wait()
            longest = max(longest, time.perf_counter() - began)
        center.drain()
        meet(store, "done", 4)
        value = center.pull().value
        off = float((value - torch.arange(float(numel)) - 4 * exchanges).abs().max())
        return {
            "kind": type(center).__name__,
            "off": off,
            "clock": center.clock,
            "longest": longest,
            "bytes_sent": center.traffic.bytes_sent,
        }


def start_both(hosts: TwoHosts, wires: list[str], numel: int, exchanges: int):
    return [
        hosts.start(host, ["-c", REPLICAS, str(host), ",".join(wires), str(numel), str(exchanges)], MASTER_PORT="29400")
        for host in range(2)
    ]


def results(processes) -> dict[str, list[dict]]:
    """Returns, for each wire, what the four replicas have seen."""
    outputs = [process.communicate(timeout=COMMAND_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # Older versions of Gloo write to the same stream, where it ends too.
    lines = ([line for line in output.splitlines() if line.startswith("{")][-1] for output in outputs)
    first, second = map(json.loads, lines)
    return {wire: [(first[wire] | second[wire])[str(r)] for r in range(4)] for wire in first}


on_two_hosts = pytest.mark.skipif(bool(why_not()), reason=f"two network namespaces: {why_not()}")


@on_two_hosts
@pytest.mark.slow
def test_two_hosts_share_a_center():
    """On either wire, one after the other: starting the processes costs more than what they do."""
    numel, exchanges, itemsizes = 200_000, 10, {"float32": 4, "bfloat16": 2}
    with two_hosts() as hosts:
        seen = results(start_both(hosts, [*itemsizes], numel, exchanges))
        on_the_link = hosts.bytes_sent(1)
    total = 0
    for wire, replicas in seen.items():
        assert [one["kind"] for one in replicas] == 2 * ["AttachedCenter"] + 2 * ["DistantCenter"]
        for one in replicas:
            assert one["clock"] == 4 * exchanges
            assert one["off"] == 0 if wire == "float32" else one["off"] < 4
        counted = sum(one["bytes_sent"] for one in replicas[2:])
        payload = 2 * exchanges * numel * itemsizes[wire]
        assert payload < counted < 1.01 * payload
        total += counted
    assert total < on_the_link < 1.15 * total + 100_000  # packets' headers, and what the store says


@on_two_hosts
@pytest.mark.slow
def test_a_link_that_is_cut_delays_an_exchange_and_does_not_break_it():
    with two_hosts() as hosts:
        processes = start_both(hosts, ["float32"], 500_000, 12)
        assert "in the middle\n" in iter(processes[1].stdout.readline, ""), "host 1 ended before"
        with hosts.cut():
            time.sleep(2)  # how long the link is away
        seen = results(processes)["float32"]
    for one in seen:
        assert one["clock"] == 48
        assert one["off"] == 0
    assert seen[2]["longest"] > 2
