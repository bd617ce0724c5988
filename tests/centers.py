"""How the tests open a center and where its replicas meet; parameter servers as if over several hosts."""

from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_easgd.communication import OpenCenter, ParameterServer, Transport
from lightning_easgd.rules import Addition, CenterRule
from tests.helpers import TIMEOUT


class Apart(ParameterServer):
    """Every replica counts as one on a host of its own."""

    def _host(self, replica: int) -> str:
        return f"host {replica}"


class InPairs(ParameterServer):
    """Replicas 0 and 1 share a host, 2 and 3 another one, and so on."""

    def _host(self, replica: int) -> str:
        return f"host {replica // 2}"


def open_center(
    transport: Transport,
    replica: int,
    store: dist.Store,
    num_replicas: int = 2,
    size: int = 5,
    *,
    initial: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    rule: CenterRule | None = None,
    timeout: timedelta = TIMEOUT,
    num_slots: int = 2,
) -> OpenCenter:
    """Opens a center of the rule ``Addition``; by default of the numbers 0 to ``size - 1``, which are replica 0's."""
    return transport.open(
        torch.arange(size, dtype=dtype) + 10 * replica if initial is None else initial,
        replica=replica,
        num_replicas=num_replicas,
        rule=rule or Addition(),
        store=store,
        timeout=timeout,
        num_slots=num_slots,
    )


def meet(store: dist.Store, name: str, num_replicas: int = 2, timeout: timedelta = TIMEOUT) -> None:
    """Returns when as many replicas have come here; a name is for one meeting."""
    if store.add(f"{name}/came", 1) == num_replicas:
        store.set(f"{name}/all", "")
    store.wait([f"{name}/all"], timeout)
