"""Reference models in plain torch, one file each. Empty so far."""

__version__ = "0.1.0"
