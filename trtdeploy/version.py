"""The version of this package, for everything below the root."""

__version__ = "0.1.0"
