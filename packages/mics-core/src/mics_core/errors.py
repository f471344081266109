"""What can go wrong: a wrong request, a right request at the wrong moment, a lost rank, or no checkpoint yet."""

from __future__ import annotations


class ConfigError(ValueError):
    """A request that cannot be met: wrong degrees, models that differ between ranks, a dtype that does not fit."""


class LifecycleError(RuntimeError):
    """A request at the wrong moment: a step inside a backward, a forward before `shard`, a gather without a rank."""


class LostRank(LifecycleError):
    """Another rank is gone, or the network to it has failed. Ranks hear of it in different words, and can agree on
    nothing any more: save nothing, and end the process.
    """


class NoCheckpoint(RuntimeError):
    """Nothing to load there, on any rank: begin anew. A checkpoint that is damaged, of another format, or seen by some
    ranks alone, or complete ones beside a path that is not there, are a plain RuntimeError.
    """
