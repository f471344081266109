"""Nothing of an emulated cluster stays: not of a program that fails or hangs, nor of an owner, however that ends."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bench.cluster import Cluster, unavailable
from bench.cluster import cluster as cluster_module
from bench.record import ROOT

PATIENCE = 300.0  # seconds, after which what should have happened counts as never
REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2, 100, 1.0) as running:
        yield running


def marked(mark: str) -> list[str]:
    """Commands of the processes with this mark in their environment, which all that a process starts inherits."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended since
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def namespaces() -> set[int]:
    """Of all processes."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.add((process / "ns" / "net").stat().st_ino)
    return found


def test_a_failure_ends_all_nodes_and_says_what_was_printed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster_module, "GRACE", 0.1)
    mark, slept = uuid.uuid4().hex, tmp_path / "slept"
    programs = [["sh", "-c", f"sleep 60; touch {slept}"], ["sh", "-c", "echo no such luck; exit 3"]]
    with pytest.raises(RuntimeError, match=r"node 1 ended with status 3, expected 0; it printed:\nno such luck"):
        cluster.run(programs, env={"MARK": mark})
    assert not slept.exists(), "the first node was waited for"
    assert not marked(mark)


def test_what_takes_too_long_is_ended(cluster: Cluster) -> None:
    mark = uuid.uuid4().hex
    with pytest.raises(TimeoutError, match=r"nodes \[0\] have not ended"):
        cluster.run([["sh", "-c", "setsid sleep 1000 & sleep 1000"]], env={"MARK": mark}, timeout=0.5)
    assert not marked(mark)


def test_a_cluster_leaves_nothing_in_an_owner_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MARK", mark)
    open_before = os.listdir("/proc/self/fd")
    with Cluster(3, 100, 1.0) as cluster:
        cluster.start(2, ["sh", "-c", "setsid sleep 1000 & sleep 1000"])
        cluster.run([["true"]])
        assert len(marked(mark)) > 1
    assert not marked(mark)
    assert os.listdir("/proc/self/fd") == open_before


OWNER = """
import os, subprocess, sys, time
from bench.cluster import Cluster
with Cluster(2, 100, 1) as cluster:
    program = ["sh", "-c", "setsid sleep 1000 & echo up; exec sleep 1000"]
    assert cluster.start(1, program, stdout=subprocess.PIPE).stdout.readline() == "up\\n"
    with cluster.inside(1):
        print(os.stat("/proc/thread-self/ns/net").st_ino, flush=True)
    if sys.argv[1] == "raises":
        raise KeyError
    if sys.argv[1] != "returns":
        time.sleep(1000)
"""


@pytest.mark.parametrize("end", ["returns", "raises", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_stays(end: str) -> None:
    mark = uuid.uuid4().hex
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, end],
        env=os.environ | {"MARK": mark, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        namespace = int(owner.stdout.readline())
        if end.startswith("SIG"):
            assert namespace in namespaces()
            # A process that is just being replaced by its program shows no environment.
            soon = time.monotonic() + PATIENCE
            while len(marked(mark)) != 6 and time.monotonic() < soon:
                time.sleep(0.05)
            found = marked(mark)  # owner, switch, two of the node, the program and its child
            owner.send_signal(getattr(signal, end))
            assert len(found) == 6, found
        owner.wait(timeout=PATIENCE)
    # The kernel's killing takes a moment; an owner that could do it itself waits.
    deadline = time.monotonic() + PATIENCE
    while end in ("SIGTERM", "SIGKILL") and marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not marked(mark)
    assert namespace not in namespaces()
