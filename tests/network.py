"""Two hosts on one machine: network namespaces joined by a slow link. Needs Linux, root, ``ip`` and ``tc``."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import TracebackType

RATE = "100mbit"


class TwoHosts:
    """Two namespaces, each with a loopback and one end of a link of 100 Mbit/s; made by ``two_hosts``.

    Attributes:
        names: of the namespaces.
        addresses: of the hosts on the link.
        interfaces: the link's ends.
    """

    def __init__(self) -> None:
        unique = uuid.uuid4().hex[:8]
        self.names = [f"easgd-{unique}-{host}" for host in range(2)]
        self.interfaces = [f"ve{unique}{host}" for host in range(2)]  # 15 characters at most
        self.addresses = ["10.213.77.1", "10.213.77.2"]  # known in these namespaces only
        self._undo = ExitStack()

    def __enter__(self) -> "TwoHosts":
        with ExitStack() as undo:
            for name in self.names:
                _run("ip", "netns", "add", name)
                undo.callback(_run, "ip", "netns", "del", name)  # with what is in it
            ends = [["name", self.interfaces[host], "netns", self.names[host]] for host in range(2)]
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for host, interface in enumerate(self.interfaces):
                self.run(host, "ip", "address", "add", f"{self.addresses[host]}/24", "dev", interface)
                self.run(host, "ip", "link", "set", "lo", "up")
                self.run(host, "ip", "link", "set", interface, "up")
                shape = ["rate", RATE, "burst", "256kb", "latency", "50ms"]
                self.run(host, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *shape)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def run(self, host: int, *command: str) -> str:
        """Runs a command on a host and returns its output; ``CalledProcessError`` if it fails."""
        return _run("ip", "netns", "exec", self.names[host], *command)

    def start(self, host: int, arguments: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
        """Starts ``python *arguments`` on a host, its output piped; killed at the end.

        Args:
            host: 0 or 1.
            arguments: after ``python``.
            environment: in addition to this process's, ``MASTER_ADDR`` (host 0) and Gloo's interface.
        """
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": self.interfaces[host],
            "MASTER_ADDR": self.addresses[0],
            **environment,
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for end in (process.stdout.close, process.wait, process.kill):  # called in the opposite order
            self._undo.callback(end)
        return process

    def bytes_sent(self, host: int) -> int:
        """Returns how many bytes a host has put on the link, the network's headers included."""
        return int(self.run(host, "cat", f"/sys/class/net/{self.interfaces[host]}/statistics/tx_bytes"))

    @contextmanager
    def cut(self) -> Iterator[None]:
        """The link is down within: what is sent is lost, and sent again later."""
        self.run(1, "ip", "link", "set", self.interfaces[1], "down")
        try:
            yield
        finally:
            self.run(1, "ip", "link", "set", self.interfaces[1], "up")


def two_hosts() -> TwoHosts:
    """Returns two hosts, to be used as a context manager."""
    return TwoHosts()


@lru_cache
def why_not() -> str:
    """Returns why there cannot be two hosts here; empty if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2)"
    try:
        with two_hosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
