"""What the runtime asks of a GPU's streams is ordered: rules R1 to R5 of recordings, and plays of them in other orders.

`python tests/order/table.py` tells how much was recorded, and runs as much as one likes.
"""

from __future__ import annotations

import pytest

from checking import check, compare_ranks
from matrix import ALL, MAIN, deep_runs, quick_runs, rank_runs
from planted import FAULTS
from scenarios import SCENARIOS
from training import Setting

REPLAYED = ("plain", "changing")
LONGER = ("compiled", "averaging", "saving", "opening", "twins")
QUICK_FAULTS = (
    "a gather does not wait for the refresh",
    "Megatron-LM#5788: resize_(0) without a word to the stream that took it",
    "the host reads answers before they are there",
)


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=[pytest.mark.deep] * (name in LONGER)) for name in SCENARIOS]
)
def test_accesses_frees_and_host_reads_are_ordered_by_events(scenario: str) -> None:
    told = {str(setting): found.told for setting in quick_runs(scenario) if (found := check(scenario, setting)).told}
    assert not told


@pytest.mark.parametrize(
    ("scenario", "micro_steps"), [("plain", 1), *(pytest.param(name, 3, marks=pytest.mark.deep) for name in REPLAYED)]
)
def test_every_legal_order_gives_the_same_bytes(scenario: str, micro_steps: int) -> None:
    assert not check(scenario, Setting((2, 2, 8), micro_steps=micro_steps), chances=1).told


def test_groups_do_the_same_on_all_their_ranks() -> None:
    assert not compare_ranks("plain", Setting((2, 2, 4), micro_steps=1, world=4))


@pytest.mark.parametrize("fault", QUICK_FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    planted = FAULTS[fault]
    assert check(planted.scenario, planted.setting, fault=fault).broken


@pytest.mark.deep
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("sharding", ALL, ids=str)
def test_every_sharding_keeps_the_rules_in_every_order(sharding: tuple[int, int, int], scenario: str) -> None:
    told = {}
    for number, setting in enumerate(deep_runs(scenario, sharding)):
        found = check(scenario, setting, chances=None if number and sharding not in MAIN else 2)
        if found.told:
            told[str(setting)] = found.told
    assert not told


@pytest.mark.deep
@pytest.mark.parametrize(("scenario", "setting"), rank_runs(), ids=str)
def test_groups_do_the_same_on_all_their_ranks_in_every_sharding(scenario: str, setting: Setting) -> None:
    assert not compare_ranks(scenario, setting)


@pytest.mark.deep
@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_found_and_nothing_without_it(fault: str) -> None:
    planted = FAULTS[fault]
    if planted.between_ranks:
        assert compare_ranks(planted.scenario, planted.setting, fault=fault)
        assert not compare_ranks(planted.scenario, planted.setting)
        return
    found = check(planted.scenario, planted.setting, fault=fault, chances=1)
    assert found.broken
    assert planted.unseen_by_players or found.differ
    assert not check(planted.scenario, planted.setting, chances=1).told
