"""Scenes end to end on two nodes, and what is made of their records."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench.cluster import unavailable
from bench.record import plain, stamp
from bench.scenes import __main__ as scenes
from bench.scenes import plots, runtimes
from bench.scenes.figures import GOALS, WEAK, goals_table, peers_note, scene_table, weak_note, weak_table
from bench.scenes.model import StandIn
from bench.scenes.table import PEERS, SCENES, Scene


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests, collected in the same session, set it


needs_nodes = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

EVERYONE = Scene(
    "everyone",
    "Does it all run?",
    (
        *[name for name in PEERS if name not in ("ZeRO-3", "HSDP 4")],
        *["mics 2,2,4", "mics 4,4,4 flat", "mics 4,4,4", "mics 2,2,4 no-prefetch", "mics 2,2,4 no-overlap"],
    ),
    budget=15,
    nodes=2,
    rate_mbit=400.0,
    micro_steps=(1, 3),
    stand_in=StandIn(0.001, 0.001),
    width=128,
    blocks=2,
    steps=2,
    rounds=1,
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    told: dict[str, Any] = plain(scenes.play(EVERYONE))
    return told


@needs_nodes
def test_two_nodes_train_under_every_runtime_and_agree(found: dict[str, Any]) -> None:
    first, second = found["cases"]
    assert (first["micro_steps"], second["micro_steps"]) == (1, 3)
    for case in found["cases"]:
        assert list(case["variants"]) == list(EVERYONE.variants)
        losses = [each["losses"] for each in case["variants"].values()]
        assert losses[0][0] > 0
        assert all(loss == pytest.approx(losses[0], rel=1e-4) for loss in losses)
    assert found["switch"]["dropped"] == 0


@needs_nodes
def test_wires_carry_the_bytes_of_the_formula_and_hardly_more(found: dict[str, Any]) -> None:
    for case in found["cases"]:
        for name, figures in case["variants"].items():
            if name.startswith("mics"):
                assert 1.0 < figures["sent"][0] / figures["expected"]["sent"] < 1.1, name


@needs_nodes
def test_every_variant_of_ours_has_a_limit_and_no_peer_has(found: dict[str, Any]) -> None:
    for case in found["cases"]:
        for name, figures in case["variants"].items():
            assert (figures["expected"] is not None) == name.startswith("mics"), name
            assert figures["expected"] is None or figures["expected"]["limit"] > 0, name


@needs_nodes
def test_ranks_hold_what_their_sharding_says(found: dict[str, Any]) -> None:
    held = {name: figures["held"] for name, figures in found["cases"][0]["variants"].items()}
    whole = 4 * EVERYONE.parameters
    assert held["mics 2,2,4"] == pytest.approx(whole * (1 / 2 + 1 / 2 + 2 / 4), rel=0.01)
    assert held["mics 4,4,4"] == held["mics 4,4,4 flat"] == pytest.approx(whole, rel=0.01)
    assert held["FSDP2 full"] == pytest.approx(whole, rel=0.01)
    assert held["HSDP 2"] == pytest.approx(2 * whole, rel=0.01)
    assert held["DDP"] == pytest.approx(4 * whole, rel=0.01)


@needs_nodes
def test_a_record_becomes_a_table_and_a_picture(found: dict[str, Any], tmp_path: Path) -> None:
    lines = scene_table(found).splitlines()
    assert len(lines) == 2 + 2 * len(EVERYONE.variants)
    plots.bars(stamp([], "cpu") | found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@needs_nodes
def test_the_command_writes_a_record_of_each_scene(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = []
    monkeypatch.setattr(scenes, "play", lambda scene: played.append(scene) or found)
    assert scenes.main(["weak-1", "--small", "--out", str(tmp_path)]) == 0
    assert [(scene.name, scene.width) for scene in played] == [("weak-1", 64)]
    told = json.loads((tmp_path / "weak-1.json").read_text())
    assert told["command"].startswith("python -m bench.scenes weak-1 --small")
    assert {"commit", "machine", "load", "took", "left_out"} <= set(told)
    assert not (tmp_path / "weak-1.png").exists(), "the three scenes of weak scaling have one picture together"
    assert "scene 1 of 1, weak-1" in capsys.readouterr().err


def test_a_machine_that_cannot_emulate_leaves_the_scenes_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert scenes.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("scenes: left out: emulated nodes need")
    assert not list(tmp_path.iterdir())


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda _: None)
    assert runtimes.left_out("ZeRO-3") == "deepspeed is not installed"
    assert runtimes.left_out("DDP") is None
    assert EVERYONE.without({"DDP"}).variants == tuple(name for name in EVERYONE.variants if name != "DDP")


@pytest.mark.parametrize("name", ["mics 2,2,4 hierarchical", "HSDP", "ZeRO-4", "FSDP2"])
def test_unknown_runtimes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name such as 'HSDP 4' or 'mics 2,2,4 flat'"):
        runtimes.runtime(name, lambda: pytest.fail("it was made"))


def test_variants_that_disagree_on_the_loss_are_refused() -> None:
    scenes.check_losses({"a": {"losses": [1.0, 0.5]}, "b": {"losses": [1.0, 0.50001]}})
    for wrong in (0.51, float("nan")):
        with pytest.raises(AssertionError, match="disagree on the loss"):
            scenes.check_losses({"a": {"losses": [1.0, 0.5]}, "b": {"losses": [1.0, wrong]}})


def test_a_scene_travels_to_the_ranks_unchanged() -> None:
    assert len({scene.name for scene in SCENES}) == len(SCENES)
    for scene in SCENES:
        assert Scene.read(scene.write()) == scene


def test_all_scenes_together_stay_within_their_time() -> None:
    assert sum(scene.budget for scene in SCENES) <= 16 * 60


# What is made of records, on figures that are made up.


def pretended(seconds: dict[str, float], nodes: int = 4, limit: float = 1.0, *, scene: str = "") -> dict[str, Any]:
    variants = {
        name: {
            "seconds": [0.75 * median, median, 1.25 * median],
            "spread": {"median": median},
            "times_as_fast": {"value": 1.0, "low": 0.9, "high": 1.1},
            "expected": {"limit": limit, "sent": 1.0} if name.startswith("mics") else None,
            "sent": [1],
            "held": 8_000_000 if name == "DDP" else 3_000_000,
            "busy": [0.25, 0.5, 0.75],
        }
        for name, median in seconds.items()
    }
    return {
        "cases": [{"micro_steps": 4, "variants": variants}],
        "scene": {"name": scene, "nodes": nodes, "rate_mbit": 100.0, "question": "How long?", "rounds": 3},
        "commit": {"hash": "0123456789", "dirty": True},
        "machine": {"device": "a core", "cores": 1},
        "load": 0.5,
    }


def test_goals_are_judged_on_medians() -> None:
    records = {"hierarchy": pretended({"mics 4,4,4 flat": 1.6, "mics 4,4,4": 1.0})}
    rows = goals_table(records).splitlines()
    assert len(rows) == 2 + len(GOALS)
    assert [cell.strip() for cell in rows[-1].split("|")[2:6]] == [">= 1.45", "1.60", "kept", "0123456 with changes"]
    records["hierarchy"] = pretended({"mics 4,4,4 flat": 1.4, "mics 4,4,4": 1.0})
    assert "missed" in goals_table(records).splitlines()[-1]
    assert "not measured" in goals_table({}).splitlines()[-1]


def test_a_goal_at_most_is_kept_below() -> None:
    names = [f"mics {degrees}" for degrees in ("2,2,4", "4,4,4", "2,2,8", "2,2,2", "1,1,1")]
    records = {"stand-in": pretended(dict.fromkeys(names, 1.1) | {"mics 4,4,4": 1.2})}
    judged = [line for line in goals_table(records).splitlines() if "stand-in" in line]
    assert [line.split("|")[-3].strip() for line in judged] == ["kept", "missed", "kept", "kept", "kept"]


def test_a_step_is_told_with_its_shortest_and_longest_and_a_ratio_with_its_interval() -> None:
    (row,) = scene_table(pretended({"DDP": 2.0})).splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["DDP", "2.000 (1.500-2.500)", "1.00 (0.90-1.10)"]


def test_what_peers_hold_is_told_from_the_record() -> None:
    note = peers_note(pretended({"DDP": 1.0, "mics 2,2,4": 1.1}))
    assert "DDP keeps everything on every rank, 8.0 MB where mics 2,2,4 holds 3.0 MB, so" in note


def test_weak_scaling_is_what_eight_nodes_keep_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = dict(zip(WEAK, (1.0, 1.0, 2.0), strict=True))
    records = {
        n: pretended({"FSDP2 full": s, "mics 2,2,-1": 1.0}, nodes=(1, 2, 8)[i])
        for i, (n, s) in enumerate(steps.items())
    }
    header, _, full, ours = weak_table(records).splitlines()
    assert "1 node " in header
    assert "8 nodes" in header
    assert [cell.strip() for cell in full.split("|")[-4:-1]] == ["0.500", "", "50%"]
    assert [cell.strip() for cell in ours.split("|")[-4:-1]] == ["1.000", "1.000", "50%"]
    # 262 kB at 50 Mbit/s; 2 blocks of 0.8 and 1.6 s
    scene = plain(next(scene for scene in SCENES if scene.name == "weak-8"))
    assert "needs 0.009 of a micro-step's 4.8 s" in weak_note({"weak-8": {"scene": scene}})
    drawn = _drawn(monkeypatch, lambda: plots.weak(records, tmp_path / "weak.png"))
    assert drawn == [[1.0, 1.0, 0.5], [1.0, 1.0, 1.0]], "1 node is there, and each line has its own speed on 2 for 1"
    assert (tmp_path / "weak.png").read_bytes().startswith(b"\x89PNG")


def _drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], None]) -> list[list[float]]:
    """The heights of lines, without the ends of their error bars."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    draw()
    lines = [line for line in figures[0].axes[0].lines if line.get_linestyle() != "None"]
    return [[float(y) for y in line.get_ydata()] for line in lines]


def test_a_picture_says_whence_it_is_and_has_the_shortest_bar_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plots.bars(pretended({"DDP": 2.0, "mics 2,2,4": 1.0, "HSDP 4": 3.0}), tmp_path / "bars.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mics 2,2,4", "DDP", "HSDP 4"]
    assert "commit 0123456 with changes, a core, 1 cores, 3 rounds, load 0.5" in figures[0].get_supxlabel()
