"""Each benchmark of the runtime runs from end to end, small, and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import links
from bench.cluster import unavailable
from bench.record import ROOT


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests, collected in the same session, set it


needs_nodes = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def test_host_cost_is_compared_with_plain_pytorch_and_fsdp2(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    # In a process of its own: it starts a process group, and FSDP2 leaves its streams and hooks behind.
    subprocess.run([sys.executable, "-m", "bench.host", "--seconds", "0.1", "--out", str(out)], check=True, cwd=ROOT)
    found = json.loads(out.read_text())
    assert set(found["microseconds"]) == {"plain PyTorch", "mics", "FSDP2"}
    assert found["mics_over_fsdp2"] > 0


def test_a_training_step_is_compared_with_plain_pytorch(tmp_path: Path) -> None:
    small = ["--seconds", "0.1", "--samples", "1", "--seq", "16", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "bench.training", *small], check=True, cwd=ROOT)
    found = json.loads((tmp_path / "cpu" / "training.json").read_text())
    assert set(found["variants"]) == {"plain PyTorch", "mics"}
    assert 0 < found["mics_over_plain"]["low"] <= found["mics_over_plain"]["high"]


@needs_nodes
def test_transfers_between_nodes_are_set_against_their_link(tmp_path: Path) -> None:
    out = tmp_path / "links.json"
    assert links.main(["--rates", "1000", "--sizes", "1", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert all(0 < share <= 1.02 for share in row["share"].values()), row
