"""The asynchronous center wherever the replicas are: shared memory on one host, a parameter server on several."""

from datetime import timedelta

from torch import Tensor

from lightning_easgd.communication._c10d import PrefixStore, Store
from lightning_easgd.communication._host import host_identity
from lightning_easgd.communication._session import Wire
from lightning_easgd.communication._transport import OpenCenter, Transport, TransportError, check_open
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
        keys = [f"host/{r}" for r in range(num_replicas)]
        store.set(keys[replica], host_identity())
        try:
            store.wait(keys, timeout)
        except RuntimeError as error:
            missing = [r for r, key in enumerate(keys) if not store.check([key])]
            raise TransportError(
                f"replica {replica} of {num_replicas} could not open the center: {missing} did not come within "
                f"{timeout.total_seconds():.0f} s"
            ) from error
        is_one_host = len({store.get(key) for key in keys}) == 1
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
