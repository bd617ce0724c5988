"""When this package's classes are made for a Lightning namespace: as soon as that is there, and not before."""

import os
import subprocess
import sys

import pytest

from tests.helpers import COMMAND_S, ROOT

LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
APART = """
import sys
import lightning_easgd
import lightning_easgd.algorithms, lightning_easgd.center, lightning_easgd.communication, lightning_easgd.simulation

print([name for name in sys.modules if name.split(".")[0] in {lightning!r}])

import importlib
for namespace in {namespaces!r}:
    module = importlib.import_module(namespace)
    registry = importlib.import_module(namespace + ".strategies").StrategyRegistry
    print("easgd" in registry, module.__spec__.loader is module.__loader__, type(module.__loader__).__name__)
print("pytorch_lightning" in sys.modules)
print(lightning_easgd.EASGDStrategy._bound_to.partition(";")[0], hasattr(lightning_easgd, "Nothing"))
"""


@pytest.mark.parametrize(
    ("namespaces", "has_both"), [(["lightning.pytorch"], False), (["pytorch_lightning", "lightning.pytorch"], True)]
)
def test_a_namespace_is_bound_when_it_is_imported_and_none_is_loaded_before(namespaces, has_both):
    done = subprocess.run(
        [sys.executable, "-c", APART.format(lightning=LIGHTNING, namespaces=namespaces)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    assert done.returncode == 0, done.stderr
    first, *bound, other, last = done.stdout.splitlines()
    assert first == "[]"
    assert bound == ["True True SourceFileLoader"] * len(namespaces)
    assert other == str(has_both)
    assert last == "pytorch_lightning False"
