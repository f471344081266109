"""`mics probe` measures ranks and writes a cluster that plans accept; "auto" chooses alike on all ranks."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import mics_core as mics
import probe_work as work
from mics_core import Cluster, ConfigError, Sharding
from mics_core.planner import probe
from mics_core.spec.formula import forecast
from mics_core.spec.topology import Topology, shardings
from mics_core.validate import fitting
from mics_models import gpt
from pool import Pool

pytestmark = pytest.mark.cpu_ranks  # whose links and memory the tests expect


def test_a_quick_probe_writes_a_cluster_that_plan_accepts(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "measured.toml"
    first, *others = pool.run(4, work.quick, path, LOCAL_WORLD_SIZE=2)
    cluster = Cluster.load(path)
    assert cluster == first
    assert all(other == first for other in others)
    assert (cluster.nodes, cluster.ranks_per_node) == (2, 2)
    for link in (cluster.intra, cluster.inter):
        assert set(link.tables) == {("gather", 2), ("reduce", 2), ("all-reduce", 2)}
        assert all(seconds > 0 for table in link.tables.values() for _, seconds in table)
    with torch.device("meta"):
        model = gpt("byte-tiny")
    assert mics.plan(model, cluster, global_batch=16, seq=64).prediction.seconds > 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
def test_no_thread_of_a_group_outlives_the_command(pool: Pool, tmp_path: Path) -> None:
    """One that lets go of a message's memory while Python is taken apart aborts the process."""
    for before, behind in pool.run(2, work.quick_and_leave, tmp_path / "measured.toml"):
        assert behind < before, "the group that was there before had threads, too"


def test_a_probe_of_one_rank_guesses_links_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = work.quick(tmp_path / "alone.toml")
    assert cluster.ranks == 1
    said = capsys.readouterr().out
    assert said.count("GB/s") == said.count("(not measured: ") == 2
    assert "guess" in cluster.sources["inter"]
    with pytest.raises(ConfigError, match=r"expected a name such as cluster\.toml"):
        work.quick(tmp_path / "cluster")


def test_a_probe_that_cannot_write_says_so_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe._Prober, "fastest", lambda *_: pytest.fail("it measures"))
    (tmp_path / "folder.toml").mkdir()
    for path in (tmp_path / "absent" / "cluster.toml", tmp_path / "folder.toml"):
        with pytest.raises(ConfigError, match=r"\.toml cannot be written: .*: name a file"):
            probe.probe(path, quick=True)


def test_no_size_is_measured_twice_however_many_ranks_share_it() -> None:
    for ranks in (1, 2, 64, 1024, 10**5):
        pieces = probe._pieces(probe._WHOLE.sizes, ranks)
        assert all(low < high for low, high in pairwise(pieces)), ranks  # or a plan could not read the table
    assert len(pieces) < len(probe._WHOLE.sizes)


def test_auto_cuts_less_where_there_is_more_memory_and_alike_on_all_ranks(pool: Pool) -> None:
    state = 8 * (64 * 64 + 64) * 4 * 5  # weights, gradients, two moments; as much again for what travels
    plenty, some, little = 10 * state, int(1.8 * state), int(1.2 * state)
    found = [pool.run(4, work.auto, [memory] * 4) for memory in (plenty, some, little)]
    assert all(len(set(each)) == 1 for each in found)
    assert found[0][0] == Sharding(1, 1, 1)
    degrees = [(s.params, s.grads, s.optimizer) for (s, *_) in found]
    assert degrees == sorted(set(degrees))
    mixed = pool.run(4, work.auto, [plenty, plenty, little, plenty])
    assert mixed == found[2]  # the least memory of any rank counts


def test_auto_fails_on_all_ranks_if_it_fails_on_one(pool: Pool) -> None:
    for error in pool.errors(4, work.auto_with_wrong_units, 2):
        assert "Conv2d" in str(error)
    for error in pool.errors(4, work.auto_on, 1):
        assert "ask alike everywhere" in str(error)
    for error in pool.errors(4, work.auto, [1000] * 4):
        assert "use more ranks" in str(error)


def test_auto_takes_the_first_that_fits_of_those_that_cut_least() -> None:
    topology = Topology(8, 2)
    formula = forecast(work.Model(), Sharding.ddp(), ranks=8, ranks_per_node=2)

    def needed(sharding: Sharding) -> int:
        cut = forecast(work.Model(), sharding, ranks=8, ranks_per_node=2)
        return sum(cut.at_rest().values()) + cut.gathered() + sum(cut.working().values())

    for room in sorted({needed(sharding) for sharding in shardings(topology)}):
        first = next(sharding for sharding in shardings(topology) if needed(sharding) <= room)
        assert fitting(formula, room) == first
