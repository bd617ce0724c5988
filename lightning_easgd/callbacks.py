"""``ElasticMonitor``, which Lightning's namespaces are given a class of; see ``lightning_easgd.trainer.monitor``."""

from lightning_easgd.trainer.monitor import ElasticMonitor

__all__ = ["ElasticMonitor"]
