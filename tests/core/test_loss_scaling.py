"""The loss scale follows its rule, step by step, whatever comes."""

import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mics_core import LossScale
from mics_core.step.loss_scaling import LossScaling


def by_hand(rule: LossScale, overflows: list[bool]) -> list[float]:
    """The scale after each step."""
    scale, good, seen = rule.initial, 0, []
    for overflow in overflows:
        good = 0 if overflow else good + 1
        if overflow:
            scale = max(scale / 2, 1.0)
        elif good == rule.patience:
            scale, good = min(scale * 2, rule.largest), 0
        seen.append(scale)
    return seen


@pytest.mark.filterwarnings("ignore:LossScale")
@example([False] * 8, 1, 64.0)
@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4), st.sampled_from([1.0, 4.0, 64.0]))
def test_it_halves_at_an_overflow_and_doubles_after_so_many_good_steps_in_a_row(
    overflows: list[bool], patience: int, initial: float
) -> None:
    rule = LossScale(initial, patience, largest=128.0)
    scaling = LossScaling(rule, torch.device("cpu"))
    seen = []
    for overflow in overflows:
        scaling.update(torch.tensor(float(overflow)))
        seen.append(scaling.scale.item())
    assert seen == by_hand(rule, overflows)


def test_it_goes_on_from_what_it_was() -> None:
    rule = LossScale(8.0, patience=3)
    one, other = (LossScaling(rule, torch.device("cpu")) for _ in range(2))
    for overflow in (1.0, 0.0, 0.0):
        one.update(torch.tensor(overflow))
    other.restore(one.state())
    for each in (one, other):
        each.update(torch.tensor(0.0))
    assert one.state() == other.state() == {"scale": 8.0, "good": 0.0}


def test_a_scale_that_falls_to_its_floor_says_so_once() -> None:
    scaling = LossScaling(LossScale(4.0, patience=2), torch.device("cpu"))
    bad, good = torch.tensor(1.0), torch.tensor(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for overflow in (bad, good, good, bad):  # 2, 2, 4, 2
            scaling.update(overflow)
        with pytest.warns(RuntimeWarning, match="the scale has fallen to 1"):
            scaling.update(bad)
        scaling.update(bad)


@pytest.mark.parametrize("rule", [LossScale(1.0, patience=1, largest=1.0), LossScale(1.0, patience=3)])
def test_a_scale_that_begins_at_its_floor_says_nothing_while_steps_are_good(rule: LossScale) -> None:
    scaling = LossScaling(rule, torch.device("cpu"))
    for _ in range(4):
        scaling.update(torch.tensor(0.0))
