"""Processes killed at any moment lose nothing that was saved, and their losses are those of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("mortal.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch")


@pytest.mark.parametrize(("how", "kills"), [("at once", 25), ("behind", 5)])
def test_kill_after_kill_the_losses_are_those_of_an_undisturbed_run(tmp_path: Path, how: str, kills: int) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(kills), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["fates"] == [0, 0, 0, 0], run.stderr
    assert told["lost"] == 0
    assert told["in saves"] >= kills // 5
    for calm, found in zip(told["calm"], told["found"], strict=True):
        assert found.keys() == calm.keys()
        for step, (expected,) in calm.items():
            assert set(found[step]) == {expected}, f"step {step}"
    assert len(set(told["begun"])) > kills // 5  # they got on between the kills
    assert told["there"] == ["latest", "step-158", "step-160"]
