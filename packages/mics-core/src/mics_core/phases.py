"""What a model is doing, and what its training loop has said of it. The conductor owns the transitions."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """What the model is doing."""

    REST = "rest"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPEN = "full_params"
    LOADING = "load"


class MicroStep(Enum):
    """What `accumulate` said of the present micro-step."""

    UNMARKED = "unmarked"
    MORE_FOLLOW = "more follow"
    LAST = "last"
