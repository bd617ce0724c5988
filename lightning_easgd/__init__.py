"""Elastic averaging for PyTorch Lightning.

Importing this package registers the strategy names with every installed Lightning namespace, so that
``Trainer(strategy="easgd")`` trains any LightningModule unchanged. The classes here are for Trainers of
``pytorch_lightning``; ``lightning_easgd.pytorch`` has them for ``lightning.pytorch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_easgd.__about__ import __version__
from lightning_easgd._lightning import bind, installed
from lightning_easgd.algorithms import (
    ADAG,
    ADMM,
    AGN,
    EAMSGD,
    EASGD,
    LSGD,
    Algorithm,
    Downpour,
    DynSGD,
    ElasticSGD,
    EntropySGD,
    LocalSGD,
    MDownpour,
    OverlapLocalSGD,
    Parle,
    StreamingDiLoCo,
)
from lightning_easgd.averages import MovingAverage, PolyakAverage, TailAverage
from lightning_easgd.communication import (
    AllReduce,
    Asynchronous,
    NonFiniteDeltaError,
    ParameterServer,
    SharedMemory,
    Transport,
    TransportError,
)
from lightning_easgd.metrics import ConsensusDistance, TemporalEfficiency, temporal_efficiency

if TYPE_CHECKING:
    from lightning_easgd.callbacks import ElasticMonitor
    from lightning_easgd.strategy import ElasticStrategy as EASGDStrategy
else:
    EASGDStrategy, ElasticMonitor = bind("pytorch_lightning")
    if "lightning.pytorch" in installed():
        import_module("lightning_easgd.pytorch")  # registers the names there too

__all__ = [
    "ADAG",
    "ADMM",
    "AGN",
    "EAMSGD",
    "EASGD",
    "LSGD",
    "Algorithm",
    "AllReduce",
    "Asynchronous",
    "ConsensusDistance",
    "Downpour",
    "DynSGD",
    "EASGDStrategy",
    "ElasticMonitor",
    "ElasticSGD",
    "EntropySGD",
    "LocalSGD",
    "MDownpour",
    "MovingAverage",
    "NonFiniteDeltaError",
    "OverlapLocalSGD",
    "ParameterServer",
    "Parle",
    "PolyakAverage",
    "SharedMemory",
    "StreamingDiLoCo",
    "TailAverage",
    "TemporalEfficiency",
    "Transport",
    "TransportError",
    "__version__",
    "temporal_efficiency",
]
