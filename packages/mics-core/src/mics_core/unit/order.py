"""The order in which units are used: written down in one pass, and from then on known in advance.

A pass is a forward and its backward, or a forward alone where nothing is differentiated. Nothing relies on the order:
a pass that takes another way is written down again, and meanwhile nothing is fetched ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

log = logging.getLogger("mics_core")


class Direction(Enum):
    """Which part of a pass uses a unit."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Use(NamedTuple):
    """A use of the unit with this number."""

    unit: int
    direction: Direction


class Order:
    """What was used in this pass so far, and what was used after that in the pass before."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._known: list[Use] = []
        self._seen: list[Use] = []
        self._on_track = False

    def reach(self, use: Use) -> bool:
        """A use takes place; False if another one was expected, so that what was fetched ahead may not be needed."""
        place = len(self._seen)
        self._seen.append(use)
        if not self._on_track or (place < len(self._known) and self._known[place] == use):
            return True
        if use == self._known[0]:  # a forward that no backward followed
            self._seen = [use]
            return False
        self._on_track = False
        expected = self._called(self._known[place]) if place < len(self._known) else "the end"
        log.info(
            "mics: the order of units changed: %s came, expected %s; it is recorded anew", self._called(use), expected
        )
        return False

    def upcoming(self, *, again: bool) -> Iterator[Use]:
        """What follows in this pass as far as is known; if such a pass comes `again`, its beginning after that."""
        if self._on_track:
            yield from self._known[len(self._seen) :]
            if again:
                yield from self._known

    def end(self) -> None:
        """The pass is over: the next one is expected to be like it."""
        if not self._on_track or len(self._seen) != len(self._known):
            self._known = self._seen
        self.restart()

    def restart(self) -> None:
        """The pass was given up: what follows begins anew."""
        self._seen = []
        self._on_track = bool(self._known)

    def _called(self, use: Use) -> str:
        return f"the {use.direction.value} of {self._names[use.unit]}"
