"""Algorithms: the loop of one replica, one file a method. They know the center, not where it lives."""

from lightning_easgd.algorithms._interfaces import Algorithm, Center, Exchange, Replica, Snapshot
from lightning_easgd.algorithms.adag import ADAG, damping
from lightning_easgd.algorithms.admm import ADMM
from lightning_easgd.algorithms.agn import AGN
from lightning_easgd.algorithms.downpour import Downpour
from lightning_easgd.algorithms.dynsgd import DynSGD
from lightning_easgd.algorithms.eamsgd import EAMSGD
from lightning_easgd.algorithms.easgd import EASGD, displacement_, stable_step_sizes
from lightning_easgd.algorithms.local_sgd import LocalSGD
from lightning_easgd.algorithms.mdownpour import MDownpour

__all__ = [
    "ADAG",
    "ADMM",
    "AGN",
    "EAMSGD",
    "EASGD",
    "Algorithm",
    "Center",
    "Downpour",
    "DynSGD",
    "Exchange",
    "LocalSGD",
    "MDownpour",
    "Replica",
    "Snapshot",
    "damping",
    "displacement_",
    "stable_step_sizes",
]
