"""When this package's classes are made for a Lightning namespace: as soon as that is there, and not before."""

import os
import subprocess
import sys

from tests.helpers import COMMAND_S, ROOT

LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
APART = """
import sys
import lightning_easgd
import lightning_easgd.algorithms, lightning_easgd.center, lightning_easgd.communication, lightning_easgd.simulation
import lightning_easgd.core

print([name for name in sys.modules if name.split(".")[0] in {lightning!r}])

from lightning.pytorch.strategies import StrategyRegistry

loader = sys.modules["lightning.pytorch"].__spec__.loader
print("easgd" in StrategyRegistry, loader is sys.modules["lightning.pytorch"].__loader__, type(loader).__name__)
print("pytorch_lightning" in sys.modules)

print(lightning_easgd.EASGDStrategy._bound_to.partition(";")[0], hasattr(lightning_easgd, "Nothing"))
from pytorch_lightning.strategies import StrategyRegistry

print("easgd" in StrategyRegistry)
print(lightning_easgd.pytorch.EASGDStrategy._bound_to.partition(";")[0])
"""


def test_a_namespace_is_bound_when_it_is_imported_and_none_is_loaded_before():
    done = subprocess.run(
        [sys.executable, "-c", APART.format(lightning=LIGHTNING)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "True True SourceFileLoader",
        "False",
        "pytorch_lightning False",
        "True",
        "lightning.pytorch",
    ]
