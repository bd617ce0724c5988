"""Which host this is: processes that get the same answer can share memory."""

import os
import socket
from pathlib import Path

__all__ = ["host_identity"]


def host_identity() -> str:
    """Returns a name that is the same for all processes that see the same memory, files and network, and no others.

    That is the kernel's boot id, else the host name; and the namespaces of network and mounts, where there are such:
    containers on one machine count as separate hosts.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [boot.read_text().strip() if boot.exists() else socket.gethostname()]
    parts += [os.readlink(link) for kind in ("net", "mnt") if os.path.islink(link := f"/proc/self/ns/{kind}")]
    return " ".join(parts)
