"""64 ranks on nodes of 8, three of them pretended, one after another, by one process."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from depth import is_deep

PROGRAM = Path(__file__).with_name("pretended_ranks.py")
DEGREES = [
    *[(1, 1, 1), (8, 8, 8), (64, 64, 64)],  # DDP, MiCS within a node, ZeRO-3
    *[(1, 1, 64), (2, 8, 64), (8, 8, 64), (16, 16, 16), (16, 32, 64), (4, 4, 8), (1, 8, 32)],
]
Case = tuple[int, tuple[int, int, int], int, bool]
ALL: list[Case] = [(rank, degrees, 3, marked) for degrees, rank, marked in product(DEGREES, (0, 17, 63), (True, False))]
CASES = [case for case in ALL if is_deep() or case[3] == (case[0] != 17) or case[1] == (8, 8, 64)]


@pytest.fixture(scope="module")
def accounts() -> dict[Case, Any]:
    # A process of its own: this one may have Triton's interpreter, or a GPU, which messages to nowhere do not suit.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(CASES)],
        env=env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(CASES, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_calls_and_bytes_on_every_level_equal_the_formula(
    accounts: dict[Case, Any], degrees: tuple[int, int, int]
) -> None:
    found = {case: account for case, account in accounts.items() if case[1] == degrees}
    assert len(found) >= 3
    for counted, predicted in found.values():
        assert counted
        assert counted == predicted


def test_what_stays_in_a_node_does_and_what_leaves_it_goes_once_a_step(accounts: dict[Case, Any]) -> None:
    for rank in (0, 17, 63):
        counted, _ = accounts[rank, (8, 8, 64), 3, True]
        assert set(counted) == {
            "gather, 1-8 inside nodes",
            "hop 1, 1-8 inside nodes",
            "hop 2, 8-64 between nodes",
            "refresh, 8-64 between nodes",
        }
        units = 5
        assert counted["hop 1, 1-8 inside nodes"][0] == 3 * units
        assert counted["hop 2, 8-64 between nodes"][0] == counted["refresh, 8-64 between nodes"][0] == units
