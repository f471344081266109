"""Processes killed at any moment lose nothing that was saved, and their losses are those of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("mortal.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch")


def lives(folder: Path, *how: str) -> dict[str, Any]:
    """What became of ranks that were killed, where nothing was lost."""
    command = [sys.executable, str(PROGRAM), str(folder), *how]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, env=environment)
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads(run.stdout)
    assert told["fates"] == [0, 0, 0, 0], run.stderr
    assert told["lost"] == 0
    for calm, found in zip(told["calm"], told["found"], strict=True):
        assert found.keys() == calm.keys()
        for step, (expected,) in calm.items():
            assert set(found[step]) == {expected}, f"step {step}"
    assert told["there"] == ["latest", f"step-{told['steps'] - 2}", f"step-{told['steps']}"]
    return told


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.deep)])
def test_a_rank_that_dies_at_any_step_of_a_save_loses_nothing(tmp_path: Path, every: int) -> None:
    told = lives(tmp_path, "steps", str(every))
    assert told["lives"] > 10 // every  # a save asks so much of the disk


@pytest.mark.deep
@pytest.mark.parametrize(("how", "kills"), [("at-once", 25), ("behind", 10)])
def test_kill_after_kill_the_losses_are_those_of_an_undisturbed_run(tmp_path: Path, how: str, kills: int) -> None:
    told = lives(tmp_path, how, str(kills))
    assert len(set(told["begun"])) > kills // 5  # every second life ends behind a save
