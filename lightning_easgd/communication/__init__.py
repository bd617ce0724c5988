"""Transports: how a replica reaches the center. They know process groups, not moving rates."""

from lightning_easgd.communication._transport import (
    Completed,
    NonFiniteDeltaError,
    OpenCenter,
    Traffic,
    Transport,
    TransportError,
)
from lightning_easgd.communication.all_reduce import AllReduce
from lightning_easgd.communication.asynchronous import Asynchronous
from lightning_easgd.communication.membership import Membership
from lightning_easgd.communication.parameter_server import ParameterServer
from lightning_easgd.communication.shared_memory import SharedMemory

__all__ = [
    "AllReduce",
    "Asynchronous",
    "Completed",
    "Membership",
    "NonFiniteDeltaError",
    "OpenCenter",
    "ParameterServer",
    "SharedMemory",
    "Traffic",
    "Transport",
    "TransportError",
]
