"""What this distribution is; the only place that states its version."""

__version__ = "0.1.0"
__license__ = "Apache-2.0"
