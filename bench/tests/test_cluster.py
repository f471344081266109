"""The emulated cluster as programs see it: counters and torchrun. `bench.wires` measures rates and delays."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.cluster import Cluster, Link, unavailable
from bench.wires import connection, settle

RATE = 100.0  # Mbit/s
REASON = unavailable()
real = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def test_nodes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="0 nodes, expected 1 to 250"):
        Cluster(0, RATE, 1)
    with pytest.raises(ValueError, match=r"links of nodes \[2\], expected nodes 0 to 1"):
        Cluster(2, RATE, 1, links={2: Link(1, 1, 1)})
    with pytest.raises(RuntimeError, match="not running"):
        Cluster(2, RATE, 1).bytes()


def test_a_machine_that_cannot_emulate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert unavailable() == "emulated nodes need root"
    with pytest.raises(RuntimeError, match="need root"), Cluster(2, RATE, 1):
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(4, RATE, 1.0, links={3: Link(20, 50, 3.5)}) as running:
        yield running


@real
def test_counters_hold_what_was_sent(cluster: Cluster) -> None:
    size = 5_000_000
    settle(cluster)
    before = cluster.bytes()
    with ExitStack() as stack:
        out, into = connection(cluster, 1, 2, stack)
        thread = threading.Thread(target=out.sendall, args=[bytes(size)])
        thread.start()
        left = size
        while left:
            left -= len(into.recv(left))
        thread.join()
    settle(cluster)  # the last acknowledgement
    moved = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, cluster.bytes(), strict=True)]
    assert size < moved[1][0] < 1.03 * size
    assert moved[1] == moved[2][::-1]
    assert moved[2][0] < 0.03 * size
    assert moved[0] == moved[3] == (0, 0)
    assert cluster.fidelity().dropped == 0


@real
def test_torchrun_runs_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "reduce.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "numbers = torch.full((250_000,), float(dist.get_rank()))\n"
        "dist.all_reduce(numbers)\n"
        "print('sum', numbers.unique().tolist(), flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    run = cluster.torchrun([str(script)], timeout=600)
    assert all("sum [6.0]" in output for output in run.outputs), run.outputs
    assert all(1.5e6 < traffic.sent < 2.5e6 for traffic in run.traffic), run.traffic  # 2 x 3/4 of a million bytes


@real
def test_programs_have_the_environment_and_a_node_of_their_own(cluster: Cluster) -> None:
    own = (
        "import os; from bench.cluster import traffic; traffic(); print(os.readlink('/proc/self') == str(os.getpid()))"
    )
    programs = [["sh", "-c", "echo $GLOO_SOCKET_IFNAME $OMP_NUM_THREADS $MORE"], [sys.executable, "-c", own]]
    assert cluster.run(programs, env={"MORE": "more"}).outputs == ["wire 1 more\n", "True\n"]
