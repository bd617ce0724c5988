"""The registered names: each is a description and the arguments of ``EASGDStrategy``. A new method is one line here."""

from typing import Any

from lightning_easgd.algorithms import (
    ADAG,
    ADMM,
    AGN,
    EAMSGD,
    LSGD,
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
from lightning_easgd.communication import AllReduce, Asynchronous

__all__ = ["presets", "register"]


def presets() -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns what every name stands for."""
    apart, together = {"transport": Asynchronous()}, {"transport": AllReduce()}
    return {
        "easgd": ("Synchronous elastic averaging SGD", together),
        "easgd_async": ("Asynchronous elastic averaging SGD", apart),
        "eamsgd": ("Synchronous EAMSGD", {"algorithm": EAMSGD(), **together}),
        "eamsgd_async": ("Asynchronous EAMSGD", {"algorithm": EAMSGD(), **apart}),
        "downpour": ("DOWNPOUR", {"algorithm": Downpour(), **apart}),
        "mdownpour": ("MDOWNPOUR", {"algorithm": MDownpour(), **apart}),
        "agn": ("Accumulated gradient normalization", {"algorithm": AGN(), **apart}),
        "adag": ("ADAG", {"algorithm": ADAG(), **apart}),
        "dynsgd": ("DynSGD", {"algorithm": DynSGD(), **apart}),
        "ssp": ("Stale synchronous parallel SGD", {"algorithm": Downpour(), "slack": 3, **apart}),
        "ssp_layerwise": (
            "Layerwise stale synchronous parallel SGD",
            {"algorithm": Downpour(), "slack": 3, "layerwise": True, **apart},
        ),
        "local_sgd": ("Local SGD", {"algorithm": LocalSGD(), **together}),
        "bmuf": ("BMUF", {"algorithm": LocalSGD.bmuf(), **together}),
        "slowmo": ("SlowMo", {"algorithm": LocalSGD.slowmo(), **together}),
        "diloco": ("DiLoCo", {"algorithm": LocalSGD.diloco(), **together}),
        "streaming_diloco": ("Streaming DiLoCo", {"algorithm": StreamingDiLoCo(), "fragments": 4, **together}),
        "overlap_local_sgd": ("Overlap Local-SGD", {"algorithm": OverlapLocalSGD(), **together}),
        "lsgd": ("Leader SGD", {"algorithm": LSGD(), **together}),
        "admm": ("Linearized ADMM", {"algorithm": ADMM(), **together}),
        "parle": ("Parle", {"algorithm": Parle(), **together}),
        "entropy_sgd": ("Entropy-SGD", {"algorithm": EntropySGD(), **together}),
        "elastic_sgd": ("Elastic-SGD", {"algorithm": ElasticSGD(), **together}),
    }


def register(strategy: type, registry: Any) -> None:
    """Registers each name with a Lightning namespace and, as for DDP's names, its forms by start method.

    Args:
        strategy: the class that is bound to the namespace.
        registry: its StrategyRegistry.
    """
    for name, (description, arguments) in presets().items():
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            registry.register(
                f"{name}{suffix}",
                strategy,
                description=f"{description} with start_method {start_method!r}",
                override=True,
                start_method=start_method,
                **arguments,
            )
