"""Clusters known by name: files of this folder. Each says where a number is from, or that it is a guess."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import as_file, files

from mics_core.errors import ConfigError
from mics_core.planner.cluster import Cluster
from mics_core.planner.this_machine import THIS, this_machine

_FILES = {each.name.removesuffix(".toml"): each for each in files(__name__).iterdir() if each.name.endswith(".toml")}
_NAMES = sorted(_FILES, key=str.swapcase)  # AWS's instances, which have small letters, come first


def find(name: str) -> Cluster:
    """One node of this kind."""
    if name == THIS:
        return this_machine()
    known = [*_NAMES, THIS]
    if name not in known:
        close = get_close_matches(str(name), known, 1, 0.5)
        meant = f", perhaps {close[0]!r}" if close else ""
        raise ConfigError(
            f"cluster: there is no preset {name!r}, only {', '.join(known)}{meant}: take one of them, or a file that "
            "`mics probe cluster.toml` wrote"
        )
    with as_file(_FILES[name]) as path:
        return Cluster.load(path)


def listed() -> list[Cluster]:
    """One node of each kind that needs no look at this machine."""
    return [find(name) for name in _NAMES]
