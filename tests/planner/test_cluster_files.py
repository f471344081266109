from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mics_core.errors import ConfigError
from mics_core.planner.cluster import Cluster, Link, Transport
from mics_core.planner.collectives import Collectives, interpolate

PRESETS = ("p3dn.24xlarge", "p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge", "DGX-H100")


def measured() -> Cluster:
    """One with all that a file can hold."""
    tables = {("gather", 4): ((1e3, 1e-4), (1e6, 2.5e-3)), ("reduce", 2): ((64.0, 1e-5),)}
    cluster = Cluster.preset("p4d.24xlarge", nodes=3)
    return replace(
        cluster,
        name='two "quoted" words \\ and a backslash\r\n\x00',
        inter=Link(1.25e10, 3e-5, tables),
        transport=Transport.GLOO,
        host={"FSDP2": 1e-3},
    )


@pytest.mark.parametrize("cluster", [*map(Cluster.preset, PRESETS), measured()], ids=lambda cluster: cluster.name[:5])
def test_a_file_gives_back_the_cluster_it_was_written_from(cluster: Cluster, tmp_path: Path) -> None:
    cluster.save(tmp_path / "cluster.toml")
    assert Cluster.load(tmp_path / "cluster.toml") == cluster


def test_every_number_of_a_preset_has_a_source() -> None:
    for name in PRESETS:
        cluster = Cluster.preset(name)
        numbers = {"memory", "flops", "memory_bandwidth", "efficiency"}
        numbers |= {f"{link}.{each}" for link in ("intra", "inter") for each in ("bandwidth", "latency")}
        assert numbers == set(cluster.sources)


def test_text_of_a_command_names_a_preset_or_a_file_with_nodes(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    measured().save(path)
    assert Cluster.parse("p4d.24xlarge:64") == Cluster.preset("p4d.24xlarge", nodes=64)
    assert Cluster.parse("p4d.24xlarge").nodes == 1
    assert Cluster.parse(str(path)) == measured()
    assert Cluster.parse(f"{path}:8") == measured().with_nodes(8)
    assert Cluster.parse("p4d.24xlarge:64").ranks == 512


def test_this_machine_has_what_a_plan_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cluster = Cluster.preset("this machine")
    assert cluster.ranks == cluster.ranks_per_node == 2
    assert cluster.memory > 10**8
    assert min(*cluster.flops.values(), cluster.memory_bandwidth) > 0  # how fast a busy machine is proves nothing
    assert "guess" in cluster.sources["inter"]


REQUIRED = [
    field.name
    for field in fields(Cluster)
    if field.name not in ("sources", "transport", "host")  # they have defaults
]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_told_with_its_name_and_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    Cluster.preset("p4d.24xlarge").save(path)
    kept, skipping = [], False
    for line in path.read_text().splitlines():
        if line.startswith("["):
            skipping = line == f"[{name}]"
        if not skipping and not line.startswith(f"{name} ="):
            kept.append(line)
    path.write_text("\n".join(kept))
    with pytest.raises(ConfigError, match=rf"cluster.toml has no {name}, expected .*: add it, or let `mics probe`"):
        Cluster.load(path)


def table(collective: str = "gather", counts: str = "[1, 2]", seconds: str = "[1, 2]") -> str:
    fields = f'collective = "{collective}"\nranks = 2\nbytes = {counts}\nseconds = {seconds}'
    return f"[[inter.tables]]\n{fields}\n[sources]"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("latency = 2e-05", "latncy = 2e-05", "has a field inter.latncy, expected only bandwidth, latency, tables"),
        ("nodes = 1", 'nodes = "one"', "nodes is 'one', expected a whole number"),
        ("nodes = 1", "nodes = 0", "nodes is 0, expected more than 0"),
        ("nodes = 1", "nodes = 1\nracks = 2", "has a field racks, expected only name, nodes"),
        ("bandwidth = 235000000000.0", f"bandwidth = {'9' * 400}", "intra.bandwidth has more than the 64 bits of TOML"),
        ("nodes = 1", f"nodes = {1 << 63}", "nodes has more than the 64 bits of TOML"),
        ("nodes = 1", f"nodes = {-1 << 64}", "nodes has more than the 64 bits of TOML"),
        ("[sources]", table(seconds=f"[1, {'9' * 400}]"), "expected numbers above 0"),
        ("nodes = 1", "nodes = ", "is no TOML"),
        ('transport = "nccl"', 'transport = "mpi"', "has transport 'mpi', expected one of"),
        ("bandwidth = 235000000000.0", "bandwidth = true", "intra.bandwidth is True, expected a number"),
        ("bandwidth = 235000000000.0", "bandwidth = -1.0", "expected bytes a second above 0"),
        ("efficiency = 0.548", "efficiency = nan", "efficiency is nan, expected more than 0"),
        ("efficiency = 0.548", "efficiency = 55", "efficiency is 55.0, expected a share of the peak"),
        ("312000000000000.0", "-1", "expected more than 0 for at least one dtype"),
        ("[intra]", '[host]\n"fsdp" = 1\n[intra]', "expected seconds from 0 up for some of ['mics', 'DDP'"),
        ("[inter]", "[inter]\ntables = [1]", "inter.tables has 1, expected"),
        ("[sources]", table(collective="scatter"), "has inter.tables.collective 'scatter', expected one of"),
        ("[sources]", table(counts="[2, 1]"), "the bytes in increasing order"),
        ("[sources]", table(counts='["many", 1]'), "inter.tables.bytes has 'many', expected numbers above 0"),
        ("[sources]", table(seconds="[1, nan]"), "inter.tables.seconds has nan, expected numbers above 0"),
        ("[sources]", table(seconds="[1]"), "has 2 bytes and 1 seconds in inter.tables"),
    ],
)
def test_a_wrong_field_is_told_in_one_sentence(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    Cluster.preset("p4d.24xlarge").save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        Cluster.load(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith("cluster: ")
    assert "cluster.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cluster\.toml is no text"):
        Cluster.load(tmp_path / "cluster.toml")


def test_unknown_names_are_answered_with_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no preset 'p4d.24large', only .*perhaps 'p4d.24xlarge'"):
        Cluster.preset("p4d.24large")
    with pytest.raises(ConfigError, match="expected a number of nodes behind the colon"):
        Cluster.parse("p4d.24xlarge:many")
    with pytest.raises(ConfigError, match="expected a number of nodes behind the colon"):
        Cluster.parse("p4d.24xlarge:" + "9" * 5000)
    with pytest.raises(ConfigError, match=r"there is no file .*absent.toml: `mics probe"):
        Cluster.load(tmp_path / "absent.toml")


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-6, 1.0)), min_size=2, max_size=6, unique_by=lambda r: r[0]))
def test_a_table_is_met_at_its_rows_and_monotone_between_increasing_ones(rows: list[tuple[float, float]]) -> None:
    table = tuple(zip(sorted(row[0] for row in rows), sorted(row[1] for row in rows), strict=True))
    for count, seconds in table:
        assert interpolate(table, count) == pytest.approx(seconds)
    for (x0, y0), (x1, y1) in pairwise(table):
        assert y0 * (1 - 1e-9) <= interpolate(table, (x0 + x1) / 2) <= y1 * (1 + 1e-9)
    assert interpolate(table, 0.5) == table[0][1]


def test_ranks_of_a_node_share_its_link_to_others() -> None:
    cluster = replace(
        Cluster.preset("p4d.24xlarge", nodes=4), inter=Link(1e9, 0.0), intra=Link(1e11, 0.0), ranks_per_node=8
    )
    costs = Collectives(cluster)
    # Each of a node's 8 ranks is in a group of its own that meets on 4 nodes: 8 rings side by side.
    assert costs.ring("gather", costs.strided(8), 4e6).busy == pytest.approx(8 * 3e6 / 1e9)
    # One ring through all 32 ranks passes each node's link once.
    assert costs.ring("gather", costs.contiguous(32), 32e6).busy == pytest.approx(31e6 / 1e9)
    assert costs.ring("all-reduce", costs.contiguous(32), 32e6).busy == pytest.approx(2 * 31e6 / 1e9)


def test_gloos_reduce_scatter_costs_an_all_reduce() -> None:
    nccl = Cluster.preset("p4d.24xlarge", nodes=4)
    gloo = replace(nccl, transport=Transport.GLOO)
    everyone = Collectives(gloo).contiguous(32)
    assert Collectives(gloo).ring("reduce", everyone, 1e9) == Collectives(gloo).ring("all-reduce", everyone, 1e9)
    assert Collectives(nccl).ring("reduce", everyone, 1e9) == Collectives(nccl).ring("gather", everyone, 1e9)


def test_measured_tables_replace_the_formula() -> None:
    link = Link(1e9, 0.0, {("gather", 4): ((3e6, 0.5),)})
    cluster = replace(Cluster.preset("p4d.24xlarge", nodes=4), inter=link)
    costs = Collectives(cluster)
    assert costs.ring("gather", costs.strided(8), 4e6).busy == pytest.approx(0.5)
    assert costs.ring("reduce", costs.strided(8), 4e6).busy == pytest.approx(8 * 3e6 / 1e9)
