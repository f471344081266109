"""Checkpoints that any sharding can load, and that survive whoever is killed while writing them."""

from mics_core.checkpoint.loading import load
from mics_core.checkpoint.saving import Saving, save

__all__ = ["Saving", "load", "save"]
