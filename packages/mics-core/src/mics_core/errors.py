"""What can go wrong: a wrong request, a right request at the wrong moment, or no checkpoint yet."""

from __future__ import annotations


class ConfigError(ValueError):
    """A request that cannot be met: wrong degrees, models that differ between ranks, a dtype that does not fit."""


class LifecycleError(RuntimeError):
    """A request at the wrong moment: a step inside a backward, a forward before `shard`, a gather without a rank."""


class NoCheckpoint(RuntimeError):
    """Nothing to load there, on any rank: begin anew. A checkpoint that is damaged, of another format, or seen by some
    ranks alone, or complete ones beside a path that is not there, are a plain RuntimeError.
    """
