"""What can go wrong, in two words: a wrong request, or a right request at the wrong moment."""

from __future__ import annotations


class ConfigError(ValueError):
    """A request that cannot be met: wrong degrees, models that differ between ranks, a dtype that does not fit."""


class LifecycleError(RuntimeError):
    """A request at the wrong moment: a step inside a backward, a forward before `shard`, a gather without a rank."""
