"""Which settings are checked: every sharding, and thinned choices of everything else beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from zlib import crc32

from mics_core.spec.topology import Topology, shardings
from training import OPTIMIZERS, PRECISIONS, Setting

Degrees = tuple[int, int, int]


def _chains(world: int, per_node: int) -> list[Degrees]:
    return [(each.params, each.grads, each.optimizer) for each in shardings(Topology(world, per_node))]


ALL = _chains(8, 2)
MAIN: list[Degrees] = [(2, 2, 8), (4, 4, 4), (8, 8, 8), (1, 1, 8)]
LARGE: list[Degrees] = [(8, 8, 64), (8, 8, 8), (16, 16, 64), (64, 64, 64), (1, 8, 64), (8, 32, 64), (1, 1, 1)]
"""Of 64 ranks on nodes of 8."""


def quick_runs(scenario: str) -> Iterator[Setting]:
    """One of the main shardings, and other choices for each scenario."""
    turn = crc32(scenario.encode())
    setting = _walked(MAIN[turn % len(MAIN)], turn // 4, 1 + turn % 3)
    # Where units are taken on one stream and freed on another, all of them should be.
    yield replace(setting, marked=True, prefetch=1 << 20) if scenario == "forward_elsewhere" else setting


def deep_runs(scenario: str, sharding: Degrees) -> Iterator[Setting]:
    """A walk through all choices, in which each two neighbours differ in most of them."""
    turn = ALL.index(sharding) * 7 + crc32(scenario.encode())
    for micro_steps in (1, 2, 3):
        turn += 1
        yield _walked(sharding, turn, micro_steps)


def _walked(sharding: Degrees, turn: int, micro_steps: int) -> Setting:
    return Setting(
        sharding,
        list(PRECISIONS)[turn % len(PRECISIONS)],
        micro_steps,
        marked=turn % 4 != 0,
        clip=turn % 3 != 0,
        optimizer=list(OPTIMIZERS)[(turn // 2) % len(OPTIMIZERS)],
        recomputes=("", "inside", "", "around", "around, reentrant")[(turn // 3) % 5],
        prefetch=(None, 1 << 20, 0)[(turn // 2) % 3],
    )


def large_runs() -> Iterator[tuple[str, Setting]]:
    """Some shardings of 64 ranks, as the ranks at both ends and in the middle see them."""
    for turn, sharding in enumerate(LARGE):
        for rank in (0, 27, 63):
            yield "plain", replace(_walked(sharding, turn + rank, 2), world=64, per_node=8, rank=rank)


def rank_runs() -> list[tuple[str, Setting]]:
    """What is recorded on all ranks of a world."""
    scenarios = ("plain", "evaluating", "changing", "leaving_early", "failing", "writing", "opening")
    return [
        (scenarios[(turn + other) % len(scenarios)], _walked(sharding, turn + other, 1 + (turn + other) % 3))
        for turn, sharding in enumerate(ALL)
        for other in (0, 3)
    ]
