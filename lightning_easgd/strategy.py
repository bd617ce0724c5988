"""``ElasticStrategy``, which Lightning's namespaces are given a class of; see ``lightning_easgd.trainer.strategy``."""

from lightning_easgd.trainer.strategy import ElasticStrategy

__all__ = ["ElasticStrategy"]
