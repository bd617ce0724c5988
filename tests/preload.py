"""What the server of the test processes imports, once for all of them."""

import gc
import warnings

import pytest  # noqa: F401
import torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks  # noqa: F401  (Lightning does in its first fit)

import tests.callbacks
import tests.helpers
import tests.modules  # noqa: F401

# pytest makes every warning an error in its own process alone; here at least what this package itself does that is
# about to go.
for category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module="lightning_easgd")

# Its forks share what is there: without this each first collection in a fork would look at all of it and copy it.
gc.collect()
gc.freeze()
