"""This distribution's name and version; the only place that states the version."""

__version__ = "0.1.0"
__license__ = "Apache-2.0"
