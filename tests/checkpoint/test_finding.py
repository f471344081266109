"""A path without a checkpoint to load is told from a damaged one, and the error of that one names a good one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mics_core as mics


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


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (changed("__0_0.distcp"), "has another checksum than when it was written"),
        (changed(".metadata"), "has another checksum than when it was written"),
        (changed("manifest.json"), "manifest.json is damaged"),
        (without("__0_0.distcp"), "__0_0.distcp, which holds model.bias and 3 others, is missing"),
        (without(".metadata"), ".metadata, which says where all parameters lie, is missing"),
        (without("manifest.json"), "step-3 lacks manifest.json, expected"),
        (without("manifest.json", ".metadata"), "step-3 lacks manifest.json and .metadata, expected"),
        (shutil.rmtree, "latest names step-3, which does not exist or is empty"),
    ],
)
def test_a_damaged_checkpoint_names_the_newest_good_one_and_how_to_load_it(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    model = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-3")
    error = said(tmp_path, model)
    assert sentence in error
    good, latest = tmp_path / "step-2", tmp_path / "latest"
    assert error.endswith(
        f": load {good}, the newest complete one before it, by its path, or write its name into {latest}"
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


@pytest.mark.parametrize(
    "path", ["", "nowhere", "latest", "runs", "runs/latest", "begun", "begun/step-1", "run", "run/checkpoints"]
)
def test_where_there_is_none_yet_a_script_can_begin(tmp_path: Path, path: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "begun" / ".step-1.saving").mkdir(parents=True)  # by a first save that was killed
    (tmp_path / "begun" / ".step-1.saving" / "__0_0.distcp").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "settings.toml").touch()
    with pytest.raises(mics.NoCheckpoint, match=r"expected a directory with a manifest.json.*: give another path$"):
        mics.load(tmp_path / path, saved(tmp_path), None)


def test_a_file_is_not_taken_for_a_checkpoint_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    assert "weights.pt cannot be read: Not a directory" in said(tmp_path / "weights.pt", saved(tmp_path))


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
