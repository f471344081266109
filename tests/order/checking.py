"""One scenario recorded under one setting, and checked: by rules, and by playing it in other orders."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from planted import FAULTS, planted
from player import Player
from recording import Recording
from rules import Fault, disagreements, faults
from scenarios import SCENARIOS
from training import Setting
from watched_world import WatchedWorld


@dataclass
class Found:
    """What was recorded, and what is wrong with it."""

    steps: int = 0
    operators: int = 0
    events: int = 0
    orders: int = 0
    reused: int = 0  # blocks whose memory was another's before
    broken: list[Fault] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)
    raised: str = ""

    @property
    def told(self) -> list[str]:
        return [*map(str, self.broken), *self.differ, *([self.raised] if self.raised else [])]


def check(scenario: str, setting: Setting, *, chances: int | None = None, fault: str | None = None) -> Found:
    """Record, and check the rules; with `chances`, play every stream late and so many random orders, too.

    fault: planted meanwhile, by its name.
    """
    if scenario == "saving":
        setting = replace(setting, rank=0)  # which makes the folder
    world, found = WatchedWorld(setting.world, setting.rank), Found()
    recording = world.recording
    with planted(FAULTS[fault]) if fault else nullcontext():
        try:
            alive = SCENARIOS[scenario](setting, world)
        except Exception as error:
            if fault is None:
                raise
            found.raised = f"{type(error).__name__}: {error}"  # some faults make it fall over
            alive = []
    found.broken = faults(recording)
    found.steps = len(recording.steps)
    found.operators = sum(step.function is not None for step in recording.steps)
    found.events = len(recording.events)
    if chances is not None and not found.raised:
        player = Player(recording)
        found.differ = player.differences(chances, users_write=scenario == "writing")
        found.orders, found.reused = len(recording.streams) + chances, player.reused
    del alive
    return found


def compare_ranks(scenario: str, setting: Setting, *, fault: str | None = None) -> list[str]:
    """Record the scenario on every rank, and tell where their groups do different things."""
    recordings: list[Recording] = []
    with planted(FAULTS[fault]) if fault else nullcontext():
        for rank in range(setting.world):
            world = WatchedWorld(setting.world, rank)
            SCENARIOS[scenario](replace(setting, rank=rank), world)
            recordings.append(world.recording)
    return disagreements(recordings)
