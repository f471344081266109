"""Ranks that are forked by one process: their environment, and how they end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import ranks
from bench.cluster import Cluster, unavailable

WORK = """
import os, sys, time

def main(words):
    what, rank = words[0], os.environ["RANK"]
    if what == "fails" and rank == "1":
        raise KeyError("no such luck")
    if what == "dies":
        os.kill(os.getpid(), 9)
    if what in ("fails", "hangs"):
        time.sleep(100)
    if what == "tells" and rank == "0":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")
        from bench.ranks import report
        print("something else")
        report([os.environ[name] for name in names])
    if what == "network":
        sys.stdout.write(f"network {rank} {os.environ['GROUP_RANK']} {os.readlink('/proc/self/ns/net')}\\n")
"""


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank_cases.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ranks.ROOT}")


def test_ranks_have_the_environment_of_torchrun_and_rank_0_reports() -> None:
    assert ranks.run(2, ["rank_cases", "tells"], timeout=20) == ["0", "0", "2", "2", "0", "127.0.0.1"]


def test_a_rank_that_fails_ends_the_others_and_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="rank_cases ended with status 1, expected 0"):
        ranks.run(3, ["rank_cases", "fails"], timeout=60)
    assert time.monotonic() - begun < 20
    assert "KeyError: 'no such luck'" in capfd.readouterr().err


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError, match="rank_cases took longer than 1 s"):
        ranks.run(2, ["rank_cases", "hangs"], timeout=1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends with its parent")
def test_ranks_end_with_whoever_started_them() -> None:
    command = [sys.executable, "-m", "bench.ranks", "--ranks", "2", "rank_cases", "hangs"]
    with subprocess.Popen(command, cwd=ranks.ROOT) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        deadline = time.monotonic() + 20
        while len(found := children.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # they tell the kernel first of all
        running.kill()
    assert len(found) == 2
    while any(alive(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in found)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_ranks_of_a_cluster_are_in_the_networks_of_their_nodes() -> None:
    with Cluster(2, 100, 1.0) as cluster:
        (output,) = cluster.ranks(["rank_cases", "network"], ranks_per_node=2, timeout=30).outputs
        with pytest.raises(RuntimeError, match="node 0 ended with status 137, expected 0"):
            cluster.ranks(["rank_cases", "dies"], timeout=30)
    told = sorted(line.split()[1:] for line in output.splitlines() if line.startswith("network"))
    assert [(rank, node) for rank, node, _ in told] == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")]
    first, second, third, fourth = (network for _, _, network in told)
    assert first == second != third == fourth
