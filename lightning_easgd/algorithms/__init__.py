"""Algorithms: the loop of one replica, one file a method. They know the center, not where it lives."""

from lightning_easgd.algorithms._elastic import displacement_
from lightning_easgd.algorithms._local_entropy import annealed, nesterov_bound, outer_step_
from lightning_easgd.algorithms._stability import stable_step_sizes
from lightning_easgd.algorithms.adag import ADAG, damping
from lightning_easgd.algorithms.admm import ADMM
from lightning_easgd.algorithms.agn import AGN
from lightning_easgd.algorithms.base import Algorithm
from lightning_easgd.algorithms.downpour import Downpour
from lightning_easgd.algorithms.dynsgd import DynSGD
from lightning_easgd.algorithms.eamsgd import EAMSGD
from lightning_easgd.algorithms.early_exchange import Equilibrium
from lightning_easgd.algorithms.easgd import EASGD
from lightning_easgd.algorithms.elastic_sgd import ElasticSGD
from lightning_easgd.algorithms.entropy_sgd import EntropySGD
from lightning_easgd.algorithms.local_sgd import LocalSGD
from lightning_easgd.algorithms.lsgd import LSGD, elected
from lightning_easgd.algorithms.mdownpour import MDownpour
from lightning_easgd.algorithms.overlap_local_sgd import OverlapLocalSGD
from lightning_easgd.algorithms.parle import Parle
from lightning_easgd.algorithms.streaming_diloco import StreamingDiLoCo
from lightning_easgd.interfaces import Center, Exchange, ProximalTerm, Replica, Snapshot

__all__ = [
    "ADAG",
    "ADMM",
    "AGN",
    "EAMSGD",
    "EASGD",
    "LSGD",
    "Algorithm",
    "Center",
    "Downpour",
    "DynSGD",
    "ElasticSGD",
    "EntropySGD",
    "Equilibrium",
    "Exchange",
    "LocalSGD",
    "MDownpour",
    "OverlapLocalSGD",
    "Parle",
    "ProximalTerm",
    "Replica",
    "Snapshot",
    "StreamingDiLoCo",
    "annealed",
    "damping",
    "displacement_",
    "elected",
    "nesterov_bound",
    "outer_step_",
    "stable_step_sizes",
]
