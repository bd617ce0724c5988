"""The asynchronous center wherever the replicas are: shared memory on one host, a parameter server on several."""

from datetime import timedelta

from torch import Tensor

from lightning_easgd.communication._c10d import PrefixStore, Store
from lightning_easgd.communication._host import host_identity
from lightning_easgd.communication._roll_call import gather
from lightning_easgd.communication._session import Wire
from lightning_easgd.communication._transport import OpenCenter, Transport, check_open
from lightning_easgd.communication.parameter_server import ParameterServer
from lightning_easgd.communication.shared_memory import SharedMemory
from lightning_easgd.rules import CenterRule

__all__ = ["Asynchronous"]


class Asynchronous(Transport):
    """Asynchronous transport that looks where the replicas are, and opens what fits.

    All on one host: ``SharedMemory``, and the arguments do not matter. Else ``ParameterServer``.

    Args:
        num_shards: see ``ParameterServer``; more than one needs as many hosts.
        wire: see ``ParameterServer``.

    Raises:
        ValueError: an argument is out of range.
    """

    synchronous = False

    def __init__(self, *, num_shards: int = 1, wire: Wire = "float32") -> None:
        self._server = ParameterServer(num_shards=num_shards, wire=wire)

    @property
    def num_shards(self) -> int:
        """The server's number of slices."""
        return self._server.num_shards

    @property
    def wire(self) -> Wire:
        """What numbers travel as between hosts."""
        return self._server.wire

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
        """Opens the center; see ``Transport.open``."""
        check_open(self, initial, replica, num_replicas, rule)
        hosts = gather(
            store,
            "host",
            host_identity(),
            replica=replica,
            num_replicas=num_replicas,
            timeout=timeout,
            purpose="open the center",
        )
        is_one_host = len(set(hosts)) == 1
        transport: Transport = SharedMemory() if is_one_host else self._server
        return transport.open(
            initial,
            replica=replica,
            num_replicas=num_replicas,
            rule=rule,
            store=PrefixStore("center", store),
            timeout=timeout,
            num_slots=num_slots,
        )

    def __repr__(self) -> str:
        """Returns the constructor call, without defaults."""
        return repr(self._server).replace("ParameterServer", "Asynchronous", 1)
