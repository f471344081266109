"""The random numbers of a rank: torch's, Python's, and numpy's where it is in use."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Where all generators of this process are."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        states["numpy"] = _without_arrays(sys.modules["numpy"].random.get_state(legacy=False))
    return states


def of_numpy() -> list[Any]:
    """What makes the arrays that the states of numpy held when they were saved as numpy gives them."""
    try:
        import numpy
    except ImportError:
        return []
    make = numpy.empty(0).__reduce__()[0]
    makers = [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*makers, numpy.ndarray, numpy.dtype, numpy.dtypes.UInt32DType]


def restore(states: Mapping[str, Any], device: torch.device) -> None:
    """Let the generators go on from there."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate(states["python"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if "numpy" in states:
        import numpy  # here, because only who used it has it

        numpy.random.set_state(states["numpy"])


def _without_arrays(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _without_arrays(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state
