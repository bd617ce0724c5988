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

__all__ = ["AllReduce", "Completed", "NonFiniteDeltaError", "OpenCenter", "Traffic", "Transport", "TransportError"]
