"""Algorithms: the loop of one replica, one file a method. They know the center, not where it lives."""

from lightning_easgd.algorithms._interfaces import Algorithm, Center, Exchange, Replica, Snapshot
from lightning_easgd.algorithms.easgd import EASGD, elastic_force_, stable_step_sizes

__all__ = ["EASGD", "Algorithm", "Center", "Exchange", "Replica", "Snapshot", "elastic_force_", "stable_step_sizes"]
