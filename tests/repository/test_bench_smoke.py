"""The benchmarks still run against the runtime: the smallest scene on two emulated nodes, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cluster import unavailable
from bench.scenes import plots

ROOT = Path(__file__).parents[2]
REASON = unavailable()
HANGS = 900  # seconds


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_a_scene_trains_on_two_emulated_nodes_and_all_runtimes_agree(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "bench.scenes", "weak-2", "--small", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "weak-2.json").read_text())
    assert found["scene"]["nodes"] == 2
    (case,) = found["cases"]
    assert {"FSDP2 full", "mics 2,2,-1"} <= set(case["variants"])
    first, *others = [each["losses"] for each in case["variants"].values()]
    assert all(loss > 0 for loss in first)
    assert all(losses == pytest.approx(first, rel=1e-4) for losses in others)
    assert all(each["sent"][0] > 0 for each in case["variants"].values()), "nothing crossed the wires"
    plots.bars(found, tmp_path / "weak-2.png")  # as of scenes with a picture of their own
    assert (tmp_path / "weak-2.png").read_bytes().startswith(b"\x89PNG")
