from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from math import isnan
from pathlib import Path

import pytest

from mics_core.errors import ConfigError
from mics_core.planner import Candidate, Cluster, Link, System, Transport, curve_picture, simulate
from mics_core.planner.collectives import Collectives, Move
from mics_core.planner.engine import COMPUTE, TaskGraph
from mics_core.planner.playing import Mics
from mics_core.planner.scaling import Point, Scaling, curves, peer, table
from mics_core.planner.simulator import mean_seconds
from mics_core.planner.timeline import draw, write_trace
from mics_core.spec.formula import Formula
from mics_core.spec.sharding import Precision, Sharding
from mics_core.spec.topology import Rungs, Topology
from workloads_by_hand import workload

BF16 = Precision.bf16()
NODES, PER_NODE = 4, 2
RANKS = NODES * PER_NODE


def cluster(nodes: int = NODES, inter: float = 1e9, latency: float = 0.0) -> Cluster:
    return Cluster(
        name="made up",
        nodes=nodes,
        ranks_per_node=PER_NODE,
        memory=10**9,
        flops={"bfloat16": 1e12, "float32": 1e12},
        memory_bandwidth=1e15,
        intra=Link(2e10, latency),
        inter=Link(inter, latency),
        efficiency=1.0,
    )


def candidate(*degrees: int, micro_steps: int = 4, **options: int) -> Candidate:
    return Candidate(Sharding(*degrees), BF16, 1, micro_steps, **options)


SHARDINGS = [(1, 1, 1), (1, 1, 8), (2, 2, 2), (2, 2, 4), (2, 2, 8), (4, 4, 4), (2, 8, 8), (4, 4, 8), (8, 8, 8)]
WORK = workload(5, 10**6, 1e9, RANKS, root=(10**6, 2e8))


# ---- the engine


def test_a_link_carries_one_transfer_at_a_time_and_latency_keeps_only_its_lane() -> None:
    graph = TaskGraph()
    first = graph.send("a", "first", [Move("net", 2.0, 5.0)])
    second = graph.send("b", "second", [Move("net", 3.0)])
    behind = graph.send("a", "behind", [Move(None, 1.0)])
    assert graph.run() == 8.0
    assert (first.end, second.end, behind.begin) == (7.0, 5.0, 7.0)


def test_a_job_waits_for_what_was_computed_before_it_was_handed_out() -> None:
    graph = TaskGraph()
    graph.compute("early", 1.0)
    job = graph.send("a", "job", [Move("net", 1.0)])
    graph.compute("meanwhile", 3.0)
    last = graph.compute("last", 1.0, [job])
    graph.run()
    assert (job.begin, job.end, last.begin) == (1.0, 2.0, 4.0)


# ---- our schedule


@pytest.mark.parametrize("degrees", SHARDINGS)
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_a_step_puts_the_formulas_bytes_on_every_link(degrees: tuple[int, int, int], micro_steps: int) -> None:
    one, choice = cluster(), candidate(*degrees, micro_steps=micro_steps)
    graph = TaskGraph()
    schedule = Mics(graph, WORK, Collectives(one), choice)
    schedule.step(micro_steps)
    before = len(graph.tasks)
    schedule.step(micro_steps)
    busy = {"intra": 0.0, "inter": 0.0}
    for task in graph.tasks[before:]:
        for move in task.moves:
            if move.link is not None and not task.name.startswith("norm"):
                busy[move.link] += move.busy
    rungs = Rungs.of(choice.sharding, Topology(RANKS, PER_NODE))
    formula = Formula(choice.sharding, BF16, rungs, WORK.root.size, tuple(unit.size for unit in WORK.units))
    sent = {"intra": 0, "inter": 0}
    for (_, level), traffic in formula.step(micro_steps).items():
        sent["inter" if "between" in level else "intra"] += traffic.bytes
    assert busy["intra"] * one.intra.bandwidth == pytest.approx(sent["intra"])
    assert busy["inter"] * one.inter.bandwidth == pytest.approx(PER_NODE * sent["inter"])


@pytest.mark.parametrize("degrees", SHARDINGS)
def test_no_step_is_shorter_than_its_computation_or_its_bytes(degrees: tuple[int, int, int]) -> None:
    told = simulate(WORK, cluster(inter=1e8), candidate(*degrees))
    assert told.compute == pytest.approx(4 * WORK.flops_per_sample / 1e12, rel=0.01)
    assert told.seconds == pytest.approx(told.compute + told.exposed)
    rungs = Rungs.of(Sharding(*degrees), Topology(RANKS, PER_NODE))
    formula = Formula(Sharding(*degrees), BF16, rungs, WORK.root.size, tuple(unit.size for unit in WORK.units))
    between = sum(traffic.bytes for (_, level), traffic in formula.step(4).items() if "between" in level)
    assert told.seconds >= PER_NODE * between / 1e8 * (1 - 1e-9)


def test_one_rank_only_computes() -> None:
    alone = replace(cluster(nodes=1), ranks_per_node=1)
    told = simulate(WORK, alone, candidate(1, 1, 1))
    assert told.exposed == pytest.approx(0.0, abs=1e-12)
    assert told.seconds == pytest.approx(4 * WORK.flops_per_sample / 1e12, rel=1e-3)
    assert told.tflops == pytest.approx(1.0, rel=1e-3)


def test_computing_again_costs_a_forward_of_the_units() -> None:
    alone = replace(cluster(nodes=1), ranks_per_node=1)
    plain = simulate(WORK, alone, candidate(1, 1, 1))
    again = simulate(WORK, alone, replace(candidate(1, 1, 1), recompute=True))
    assert again.seconds - plain.seconds == pytest.approx(4 * 5 * 1e9 / 1e12, rel=1e-3)
    assert again.performed == pytest.approx(1.0, rel=1e-3)
    assert again.tflops < plain.tflops


def test_a_long_accumulation_takes_what_all_its_micro_steps_take() -> None:
    for degrees in SHARDINGS:
        choice = candidate(*degrees, micro_steps=9)
        slow = cluster(inter=5e8, latency=1e-4)
        full = 4 * mean_seconds(WORK, slow, choice, steps=4) - 3 * mean_seconds(WORK, slow, choice, steps=3)
        assert simulate(WORK, slow, choice).seconds == pytest.approx(full, rel=2e-3)


def test_the_steady_state_is_reached() -> None:
    for degrees in SHARDINGS:
        slow, choice = cluster(inter=3e8, latency=1e-4), candidate(*degrees, micro_steps=2)
        later = 6 * mean_seconds(WORK, slow, choice, steps=6) - 5 * mean_seconds(WORK, slow, choice, steps=5)
        assert simulate(WORK, slow, choice).seconds == pytest.approx(later, rel=1e-3)


def test_each_mechanism_helps_where_it_should() -> None:
    slow = cluster(inter=4e8, latency=1e-4)
    whole = simulate(WORK, slow, candidate(4, 4, 4)).seconds
    assert whole < simulate(WORK, slow, candidate(4, 4, 4, ranks_per_node=1)).seconds  # gathers that know the nodes
    assert whole < simulate(WORK, slow, candidate(4, 4, 4, prefetch_units=0)).seconds
    assert simulate(WORK, slow, candidate(2, 2, 8)).seconds < simulate(WORK, slow, candidate(2, 8, 8)).seconds


def test_gathers_run_ahead_of_their_use_on_a_lane_that_is_in_order() -> None:
    told = simulate(WORK, cluster(), candidate(4, 4, 4))
    for lane in {event.lane for event in told.events}:
        mine = sorted((event.begin, event.end) for event in told.events if event.lane == lane)
        assert all(end <= begin + 1e-12 for (_, end), (begin, _) in pairwise(mine)), lane
    gather = next(event for event in told.events if event.name == "gather of block 2")
    use = next(event for event in told.events if event.name == "forward block 2")
    assert gather.begin < use.begin
    assert gather.end <= use.begin + 1e-12


def test_a_gather_waits_for_its_units_refresh() -> None:
    told = simulate(WORK, cluster(inter=1e8), candidate(2, 2, 8))
    for block in range(5):
        refreshed = min(event.end for event in told.events if event.name == f"refresh of block {block}")
        assert min(event.begin for event in told.events if event.name == f"gather of block {block}") >= refreshed


def test_a_way_that_leaves_nodes_has_a_lane_inside_and_one_between_them() -> None:
    told = simulate(WORK, cluster(inter=2e9), candidate(1, 1, 1, micro_steps=1))
    inside, between = (
        [(event.begin, event.end) for event in told.events if event.lane.endswith(where) and "hop 2" in event.name]
        for where in ("inside nodes", "between nodes")
    )
    assert any(begin < other_end and other < end for begin, end in inside for other, other_end in between)


def test_16384_ranks_are_simulated() -> None:
    units = workload(96, 1_812_000_000, 7.6e12, 16384, root=(618_000_000, 2.5e12), tokens=2048)
    huge = Cluster.preset("p4de.24xlarge", nodes=2048)
    told = simulate(units, huge, Candidate(Sharding(128, 128, 16384), BF16, 2, 8, recompute=True))
    assert 50 < told.tflops < 312


def test_a_dtype_the_cluster_does_not_compute_in_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"p3dn.24xlarge has no flops.bfloat16, .* only float16, float32"):
        simulate(WORK, Cluster.preset("p3dn.24xlarge"), candidate(8, 8, 8))
    with pytest.raises(ConfigError, match=r"expected three degrees: call its resolve\(8\)"):
        simulate(WORK, cluster(), candidate(2, 2, -1))


# ---- peers


def test_peers_are_ranked_by_what_crosses_nodes() -> None:
    slow, choice = cluster(inter=1e8), candidate(2, 2, 2, micro_steps=4)
    seconds = {system: simulate(WORK, slow, peer(choice, system, slow), system).seconds for system in System}
    assert seconds[System.MICS] < seconds[System.FSDP2]
    assert seconds[System.HSDP] < seconds[System.FSDP2]
    assert seconds[System.DDP] < seconds[System.FSDP2]
    assert seconds[System.ZERO3] == pytest.approx(seconds[System.FSDP2])


def test_on_cpus_a_blocking_peer_is_slower_than_one_that_fetches_ahead() -> None:
    slow = replace(cluster(inter=1e9), transport=Transport.GLOO)
    choice = peer(candidate(8, 8, 8), System.FSDP2, slow)
    fetching = simulate(WORK, slow, choice, System.FSDP2).seconds
    assert fetching < simulate(WORK, slow, choice, System.ZERO3).seconds
    assert simulate(WORK, replace(slow, transport=Transport.NCCL), choice, System.FSDP2).seconds < fetching


def test_ddp_sends_behind_its_last_backward_alone() -> None:
    fast, slow = cluster(inter=1e12), cluster(inter=1e8)
    added = [
        simulate(WORK, each, candidate(1, 1, 1, micro_steps=count), System.DDP).seconds
        for each in (fast, slow)
        for count in (2, 6)
    ]
    assert added[1] - added[0] == pytest.approx(added[3] - added[2])


# ---- pictures and curves


def test_a_trace_has_a_thread_for_each_lane_and_the_steps_length(tmp_path: Path) -> None:
    told = simulate(WORK, cluster(), candidate(2, 2, 4))
    write_trace(told, tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in content if event["ph"] == "M"}
    assert lanes[0] == COMPUTE
    assert set(lanes.values()) == {"compute", "gather, inside nodes", "hop 1, inside nodes", "slow, between nodes"}
    ends = [event["ts"] + event["dur"] for event in content if event["ph"] == "X" and event["tid"] == 0]
    assert max(ends) == pytest.approx(1e6 * told.seconds)


def test_pictures_are_drawn_or_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib.figure")
    told = simulate(WORK, cluster(), candidate(2, 2, 4))
    draw(told, tmp_path / "step.png")
    curve_picture.draw(curves(WORK, cluster(), candidate(2, 2, 2), [2, 4]), tmp_path / "weak.png")
    for name in ("step.png", "weak.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        draw(told, tmp_path / "none.png")


def partly_fitting() -> list[Point]:
    """ZeRO-3 fits from 4 nodes on, DDP nowhere, mics everywhere."""
    points = curves(WORK, cluster(), candidate(4, 4, 4), [2, 4, 8])
    needed = {(point.system, point.nodes): point.memory for point in points}
    room = needed[System.ZERO3, 4]
    assert needed[System.ZERO3, 2] > room > needed[System.ZERO3, 8]
    assert all(needed[System.DDP, nodes] > 2 * needed[System.MICS, nodes] > room for nodes in (2, 4, 8))
    return [replace(point, available=2 * room if point.system is System.MICS else room) for point in points]


def test_what_does_not_fit_is_told_beside_what_was_played() -> None:
    whole = replace(cluster(), memory=10**12)
    assert all(point.fits for point in curves(WORK, whole, candidate(2, 2, 2), [2, 4]))
    lines = [re.split(" {2,}", line) for line in table(partly_fitting()).splitlines()]
    said = {(line[0], line[-1]) for line in lines[1:]}
    assert said == {("mics", "yes"), ("ZeRO-3", "NO"), ("ZeRO-3", "yes"), ("HSDP", "NO"), ("DDP", "NO")}
    played = {line[0]: [each[1] for each in lines if each[0] == line[0]] for line in lines}
    assert played["ZeRO-3"] == ["4, 4, 4", "8, 8, 8", "16, 16, 16"]
    assert set(played["DDP"]) == {"1, 1, 1"}
    assert set(played["HSDP"]) == {"2, 2, 2"}


def test_curves_of_what_does_not_fit_are_grey_and_no_two_look_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    monkeypatch.setattr(curve_picture, "new_figure", lambda *_: figure)
    curve_picture.draw(partly_fitting(), tmp_path / "weak.png", "a model on a cluster")
    (axes,) = figure.axes
    assert "a model on a cluster\npredicted, not measured" in axes.get_title(loc="left")
    lines = {line.get_label().split(" ")[0]: line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"mics", "ZeRO-3", "HSDP", "DDP"}
    assert {name for name, line in lines.items() if line.get_color() == curve_picture._GREY} == {"HSDP", "DDP"}
    assert len({(line.get_linestyle(), line.get_marker(), line.get_markersize()) for line in lines.values()}) == 4
    assert [isnan(speed) for speed in lines["ZeRO-3"].get_ydata()] == [True, False, False]
    assert lines["ZeRO-3"].get_label().startswith("ZeRO-3 (W, W, W)\ndoes not fit on 2 nodes:")
    assert lines["mics"].get_label() == "mics (4, 4, 4)"


def test_curves_keep_a_ranks_work_or_everyones() -> None:
    weak = curves(WORK, cluster(), candidate(2, 2, -1), [2, 4, 8])
    assert [point.samples for point in weak if point.system is System.MICS] == [16, 32, 64]
    assert all(point.kept == 1.0 for point in weak if point.nodes == 2)
    strong = curves(WORK, cluster(), candidate(2, 2, -1), [2, 4, 8], Scaling.STRONG)
    assert {point.samples for point in strong} == {16}
    lines = table(strong).splitlines()
    assert len(lines) == 1 + 4 * 3
    assert max(map(len, lines)) <= 80
    with pytest.raises(ConfigError, match="cannot be shared evenly on 16"):
        curves(WORK, cluster(), candidate(2, 2, 2), [2, 16], Scaling.STRONG)
    with pytest.raises(ConfigError, match="in increasing order"):
        curves(WORK, cluster(), candidate(2, 2, 2), [4, 2])


def test_our_weak_scaling_is_level_where_zero3s_falls_with_latency() -> None:
    slow = cluster(inter=5e9, latency=1e-4)
    points = curves(WORK, slow, candidate(2, 2, 2), [2, 64])
    kept = {point.system: point.kept for point in points if point.nodes == 64}
    assert kept[System.ZERO3] < 0.7 * kept[System.MICS]
