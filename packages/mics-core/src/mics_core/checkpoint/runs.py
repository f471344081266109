"""Which run a checkpoint is of: what one process makes of a model, so that `keep` removes nothing of another's.

A run that was loaded goes on with those before it: it may remove what they wrote, and they remove nothing of its.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from mics_core.registry import Runtime

_runs: WeakKeyDictionary[Runtime, tuple[str, ...]] = WeakKeyDictionary()


def runs_of(runtime: Runtime) -> tuple[str, ...]:
    """This run, after those that it goes on with; rank 0's is what counts."""
    return _runs.setdefault(runtime, (secrets.token_hex(8),))


def go_on_with(runtime: Runtime, before: Sequence[str]) -> None:
    """The model has been loaded from a checkpoint of these runs."""
    own = runs_of(runtime)[-1]
    _runs[runtime] = (*(run for run in before if run != own), own)
