"""One process's replica, free of Lightning: ``Elastic`` ties a module's optimizers to the centers of all replicas.

For a loop of one's own, or for Lightning Fabric; ``EASGDStrategy`` is built on it.
"""

from lightning_easgd.core.company import Company
from lightning_easgd.core.elastic import Elastic
from lightning_easgd.core.formation import Agreement, Formation, Occasion, Phase, Stopped
from lightning_easgd.core.formations import FORMATIONS
from lightning_easgd.core.members import Layout
from lightning_easgd.core.plan import Plan
from lightning_easgd.core.report import Report

__all__ = [
    "FORMATIONS",
    "Agreement",
    "Company",
    "Elastic",
    "Formation",
    "Layout",
    "Occasion",
    "Phase",
    "Plan",
    "Report",
    "Stopped",
]
