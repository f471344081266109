"""The runtime of mics. Empty so far."""

__version__ = "0.1.0"
