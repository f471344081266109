"""A path without a checkpoint to load is told from a damaged one, and the error of that one names a good one."""

import os
import shutil
from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mics_core as mics
from mics_core.checkpoint.finding import find


def saved(folder: Path, *steps: int) -> nn.Module:
    model = mics.shard(nn.Linear(3, 3), mics.Sharding.ddp())
    for step in steps:
        mics.save(folder / f"step-{step}", model, None, step=step)
    return model


def said(path: Path, model: nn.Module) -> str:
    """What the error of a load says, which is not that there is no checkpoint."""
    with pytest.raises(RuntimeError) as caught:
        mics.load(path, model, None)
    assert type(caught.value) is RuntimeError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(*names: str) -> Callable[[Path], None]:
    return lambda step: [(step / name).unlink() for name in names].clear()


def changed(name: str) -> Callable[[Path], None]:
    return lambda step: (step / name).write_bytes((step / name).read_bytes()[:-1] + b"?") and None


def of_a_newer_mics(step: Path) -> None:
    path = step / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))


@pytest.mark.parametrize(
    ("damage", "sentence", "place"),
    [
        (changed("__0_0.distcp"), "has another checksum than when it was written", "before"),
        (changed(".metadata"), "has another checksum than when it was written", "before"),
        (changed("manifest.json"), "manifest.json is damaged", "beside"),
        (without("__0_0.distcp"), "__0_0.distcp, which holds model.bias and 3 others, is missing", "before"),
        (without(".metadata"), ".metadata, which says where all parameters lie, is missing", "before"),
        (without("manifest.json"), "step-3 lacks manifest.json, expected", "beside"),
        (without("manifest.json", ".metadata"), "step-3 lacks manifest.json and .metadata, expected", "beside"),
        (shutil.rmtree, "latest names step-3, which does not exist or is empty", "beside"),
    ],
)
def test_a_damaged_checkpoint_names_the_newest_good_one_and_how_to_load_it(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str, place: str
) -> None:
    """Whether that one is older is known only if the damaged one's manifest can be read."""
    model = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-3")
    error = said(tmp_path, model)
    assert sentence in error
    good, latest = tmp_path / "step-2", tmp_path / "latest"
    assert error.endswith(
        f": load {good}, the newest complete one {place} it, by its path, or write its name into {latest}"
    )
    assert mics.load(good, model, None) == {"step": 2}
    latest.write_text(good.name)
    assert mics.load(tmp_path, model, None) == {"step": 2}
    (good / "__0_0.distcp").unlink()
    assert f": load {tmp_path / 'step-1'}, the newest" in said(tmp_path, model)
    (tmp_path / "step-1" / ".metadata").unlink()
    assert said(tmp_path, model).endswith(": load another checkpoint")


def test_without_latest_the_complete_ones_are_named(tmp_path: Path) -> None:
    model = saved(tmp_path / "checkpoints", 9, 10)
    (tmp_path / "checkpoints" / "latest").unlink()
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "latest"):
        error = said(path, model)
        assert f"{tmp_path / 'checkpoints'} has no file latest, which names the checkpoint to load" in error
        assert "the complete ones step-9, step-10: give the path of one; the newest is" in error
        assert error.endswith(str(tmp_path / "checkpoints" / "step-10"))


def test_a_first_save_that_was_killed_before_latest_was_in_its_place_is_loaded(tmp_path: Path) -> None:
    model = saved(tmp_path, 1)
    (tmp_path / "latest").rename(tmp_path / "step-1" / "latest")
    assert mics.load(tmp_path, model, None) == {"step": 1}
    mics.save(tmp_path / "step-2", model, None, step=2)
    (tmp_path / "latest").unlink()
    assert "step-1, step-2: give the path of one" in said(tmp_path, model)
    model = saved(tmp_path / "run" / "checkpoints", 1)
    (tmp_path / "run" / "checkpoints" / "latest").rename(tmp_path / "run" / "checkpoints" / "step-1" / "latest")
    assert mics.load(tmp_path / "run", model, None) == {"step": 1}


@pytest.mark.parametrize("damage", [changed("manifest.json"), of_a_newer_mics, without("manifest.json", ".metadata")])
@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_whoever_finds_damaged_ones_alone_does_not_begin_anew_over_them(
    tmp_path: Path, damage: Callable[[Path], None], place: str
) -> None:
    folder = tmp_path / place
    model = saved(folder, 1, 2)
    (folder / "latest").unlink()
    for step in (1, 2):
        damage(folder / f"step-{step}")
    assert f"{folder} has no file latest" in (error := said(tmp_path, model))
    assert "and has step-1, step-2, none of them complete: give the path of one" in error


def test_files_that_are_all_too_short_are_damaged_ones(tmp_path: Path) -> None:
    model = saved(tmp_path, 1)
    (tmp_path / "latest").unlink()
    for file in (tmp_path / "step-1").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert "and has step-1, none of them complete: give the path of one" in said(tmp_path, model)


def test_the_damage_of_a_first_save_that_was_killed_is_told(tmp_path: Path) -> None:
    model = saved(tmp_path, 1)
    (tmp_path / "latest").rename(tmp_path / "step-1" / "latest")
    changed("manifest.json")(tmp_path / "step-1")
    assert "step-1/manifest.json is damaged" in said(tmp_path, model)


@pytest.mark.parametrize("name", ["", "latest", "step-3"])
def test_a_manifest_that_the_disk_does_not_give_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, real = saved(tmp_path, 1, 2), Path.read_bytes
    (tmp_path / "latest").unlink()

    def fail(path: Path) -> bytes:
        if path.name == "manifest.json":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "step-1/manifest.json cannot be read: Input/output error" in said(tmp_path / name, model)


@pytest.mark.parametrize("name", ["step-2000", "step-1 "])
def test_whoever_asks_for_one_that_is_not_there_is_told_of_those_that_are(tmp_path: Path, name: str) -> None:
    error = said(tmp_path / name, saved(tmp_path, 1, 3))
    assert error.startswith(f"load: the checkpoint {tmp_path / name} does not exist or is empty, expected")
    assert f": load {tmp_path / 'step-3'}, the newest complete one beside it, by" in error


def test_one_before_is_of_the_same_run_if_there_is_one_and_said_to_be_of_another_if_not(tmp_path: Path) -> None:
    saved(tmp_path, 1000)
    model = saved(tmp_path, 10)
    saved(tmp_path, 1001)
    mics.save(tmp_path / "step-20", model, None)
    for step, good, place in (
        (20, 10, "before it, by its path"),
        (10, 1000, "before it, though of another run, by its path"),
    ):
        without("__0_0.distcp")(tmp_path / f"step-{step}")
        error = said(tmp_path / f"step-{step}", model)
        assert f": load {tmp_path / f'step-{good}'}, the newest complete one {place}" in error


def test_an_own_index_that_is_damaged_too_is_not_said_to_be_of_another_program(tmp_path: Path) -> None:
    """Whose tools would run what is in it."""
    model = saved(tmp_path, 1, 2)
    (tmp_path / "step-2" / ".metadata").write_bytes((tmp_path / "step-2" / ".metadata").read_bytes()[:-3])
    without("manifest.json")(tmp_path / "step-2")
    error = said(tmp_path, model)
    assert "step-2 lacks manifest.json, expected" in error
    assert "dcp_to_torch" not in error


@pytest.mark.parametrize("asked", ["", "step-1"])
def test_a_save_that_replaces_one_while_it_is_looked_for_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """Each of its two renames falls before any of the looks."""
    looks, real = 0, {name: getattr(Path, name) for name in ("is_file", "exists")}
    path, old, new = (tmp_path / name for name in ("step-1", ".step-1.replaced", ".step-1.saving"))
    (tmp_path / "latest").write_text("step-1\n")

    def look(name: str, away: int, back: int) -> Callable[[Path], bool]:
        def then(asked: Path) -> bool:
            nonlocal looks
            if looks == away:
                path.rename(old)
            if looks == back:
                new.rename(path)
            looks += 1
            return bool(real[name](asked))

        return then

    for away, back in combinations_with_replacement(range(12), 2):
        looks = 0
        for each in (path, new):
            each.mkdir()
            (each / "manifest.json").touch()
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, look(name, away, back))
            assert find(tmp_path / asked) in (path, old), (away, back)
        for each in (path, old, new):
            shutil.rmtree(each, ignore_errors=True)


@pytest.mark.parametrize(
    "path", ["", "nowhere", "latest", "runs", "runs/latest", "begun", "begun/step-1", "run", "run/checkpoints", "work"]
)
def test_where_there_is_none_yet_a_script_can_begin(tmp_path: Path, path: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "begun" / ".step-1.saving").mkdir(parents=True)  # by a first save that was killed
    (tmp_path / "begun" / ".step-1.saving" / "__0_0.distcp").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "settings.toml").touch()
    (tmp_path / "work" / "bytes").mkdir(parents=True)
    (tmp_path / "work" / "bytes" / "manifest.json").write_text('{"version": 1, "settings": {}}')  # of prepared tokens
    with pytest.raises(mics.NoCheckpoint, match=r"expected a directory with a manifest.json.*: give another path$"):
        mics.load(tmp_path / path, saved(tmp_path), None)


def test_a_file_is_not_taken_for_a_checkpoint_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    model = saved(tmp_path, 1)
    for name in ("weights.pt", "step-1/manifest.json"):
        assert said(tmp_path / name, model).startswith(f"load: {tmp_path / name} cannot be read: Not a directory")


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_that_cannot_be_read_is_named_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    model, real = saved(tmp_path, 1), getattr(os, call)

    def fail(what: Any, *rest: Any, **how: Any) -> Any:
        if call == "preadv" or what == "__0_0.distcp":
            raise OSError(5, "Input/output error", *([what] if call == "open" else []))
        return real(what, *rest, **how)

    monkeypatch.setattr(os, call, fail)
    assert f"{tmp_path / 'step-1' / '__0_0.distcp'} cannot be read: Input/output error" in said(tmp_path, model)
