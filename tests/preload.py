"""What the server of the test processes imports, once for all of them."""

import gc

import pytest  # noqa: F401

import tests.helpers
import tests.modules  # noqa: F401

# Its forks share what is there: without this each first collection in a fork would look at all of it and copy it.
gc.collect()
gc.freeze()
