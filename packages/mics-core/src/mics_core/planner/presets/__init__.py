"""Clusters known by name: files of this folder. Each says where a number is from, or that it is a guess."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files

from mics_core.errors import ConfigError

_FILES = {each.name.removesuffix(".toml"): each for each in files(__name__).iterdir() if each.name.endswith(".toml")}
NAMES = tuple(sorted(_FILES, key=str.swapcase))  # AWS's instances, which have small letters, come first


def read(name: str, *others: str) -> str:
    """The file of one node of this kind; `others` are names that are known elsewhere."""
    if name not in NAMES:
        known = [*NAMES, *others]
        close = get_close_matches(str(name), known, 1, 0.5)
        meant = f", perhaps {close[0]!r}" if close else ""
        raise ConfigError(
            f"cluster: there is no preset {name!r}, only {', '.join(known)}{meant}: take one of them, or a file that "
            "`mics probe cluster.toml` wrote"
        )
    return _FILES[name].read_text("utf-8")
