"""Checkpoints that any sharding can load, and that survive whoever is killed while writing them."""

from mics_core.checkpoint.loading import load
from mics_core.checkpoint.saving import Saving, save
from mics_core.checkpoint.whole import read_weights

__all__ = ["Saving", "load", "read_weights", "save"]
