"""The packages that only prepared data needs: they are imported when they are used, and not before."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def extra(name: str) -> ModuleType:
    """The module `name` of a package that need not be installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data: {name} cannot be imported because {error.name} is not installed, and prepared data needs it: "
            'run pip install "mics-models[data]"',
            name=error.name,
        ) from error
