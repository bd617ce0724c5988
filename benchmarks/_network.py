"""Hosts that replicas are put on: network namespaces of this machine, behind links of a given rate."""

import ctypes
import os
import shutil
import subprocess
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

RATES = {"loopback": None, "1gbit": "1gbit", "100mbit": "100mbit"}  # of a link, in each direction, for ``tc``
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """Where a replica runs.

    Attributes:
        namespace: its name; None for the machine itself.
        interface: on which it reaches the others.
        address: at which they reach it.
    """

    namespace: str | None
    interface: str
    address: str

    def enter(self) -> None:
        """Moves this process there. To be called before it has threads."""
        if self.namespace is None:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.namespace}") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                error = ctypes.get_errno()
                raise OSError(error, f"setns({self.namespace}): {os.strerror(error)}")

    def bytes_sent(self) -> int:
        """Returns what the interface's own counter says, the headers of the network's layers included."""
        path = "/proc/net/dev"
        lines = (
            Path(path).read_text() if self.namespace is None else _inside(self.namespace, "cat", path)
        ).splitlines()
        counters = next(line for line in lines if line.strip().startswith(f"{self.interface}:"))
        return int(counters.partition(":")[2].split()[8])


class Network:
    """A context manager that makes the hosts and takes them away.

    Over ``loopback`` all replicas are on one host, in a namespace of its own if there may be one, or else on the
    machine itself, whose counter then has everyone's traffic. Over the other links each replica is on a host of its
    own, at a switch; its port has a token bucket in each direction.

    Args:
        link: a key of ``RATES``.
        num_replicas: at least 1, at most 200.

    Attributes:
        hosts: of replica 0, 1, ...
    """

    def __init__(self, link: str, num_replicas: int) -> None:
        self.hosts: list[Host] = []
        self._rate, self._num_replicas = RATES[link], num_replicas
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        unique = uuid.uuid4().hex[:8]
        with ExitStack() as undo:
            if self._rate is None:
                namespace = None if why_not() else self._add_namespace(undo, f"peers-{unique}")
                self.hosts = [Host(namespace, "lo", "127.0.0.1")] * self._num_replicas
            else:
                switch = self._add_namespace(undo, f"peers-{unique}-switch")
                _inside(switch, "ip", "link", "add", "switch", "type", "bridge")
                _inside(switch, "ip", "link", "set", "switch", "up")
                for replica in range(self._num_replicas):
                    namespace = self._add_namespace(undo, f"peers-{unique}-{replica}")
                    host = Host(namespace, f"ve{unique}", f"10.213.78.{replica + 1}")  # known in there only
                    self._connect(host, switch, f"port{replica}")
                    self.hosts.append(host)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def bytes_sent(self) -> int:
        """Returns how many bytes all hosts have sent so far."""
        return sum(host.bytes_sent() for host in dict.fromkeys(self.hosts))

    @staticmethod
    def _add_namespace(undo: ExitStack, name: str) -> str:
        undo.callback(_remove, name)
        _run("ip", "netns", "add", name)
        _inside(name, "ip", "link", "set", "lo", "up")
        return name

    def _connect(self, host: Host, switch: str, port: str) -> None:
        namespace, end = str(host.namespace), host.interface
        _run(
            "ip", "link", "add", "name", end, "netns", namespace, "type", "veth", "peer", "name", port, "netns", switch
        )
        _inside(namespace, "ip", "address", "add", f"{host.address}/24", "dev", end)
        _inside(switch, "ip", "link", "set", port, "master", "switch")
        for name, device in ((namespace, end), (switch, port)):
            _inside(name, "ip", "link", "set", device, "up")
            shape = ["rate", str(self._rate), "burst", "256kb", "latency", "50ms"]
            _inside(name, "tc", "qdisc", "add", "dev", device, "root", "tbf", *shape)


def why_not() -> str:
    """Returns why there cannot be namespaces here; empty if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2)"
    try:
        with Network("100mbit", 1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def _remove(namespace: str) -> None:
    """Removes it with what is in it, if there is one."""
    if Path(f"/run/netns/{namespace}").exists():
        _run("ip", "netns", "del", namespace)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def _inside(namespace: str, *command: str) -> str:
    return _run("ip", "netns", "exec", namespace, *command)
