"""`keep` removes what the same training wrote, across kills and restarts, and nothing of another one."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import mics_core as mics
from mics_core.checkpoint.manifest import Manifest


def begin() -> nn.Module:
    """What a new process has."""
    return mics.shard(nn.Linear(3, 3), mics.Sharding.ddp())


def names(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/manifest.json")}


def test_two_trainings_in_one_folder_keep_each_its_own(tmp_path: Path) -> None:
    one, other = begin(), begin()
    for step in range(4):
        mics.save(tmp_path / f"one-{step}", one, None, keep=2)
        mics.save(tmp_path / f"other-{step}", other, None, keep=1)
    assert names(tmp_path) == {"one-2", "one-3", "other-3"}


def test_a_training_that_goes_on_removes_what_it_wrote_before_and_one_that_begins_anew_does_not(tmp_path: Path) -> None:
    for step in range(3):  # three lives, each from the checkpoint of the one before
        model = begin()
        if step:
            mics.load(tmp_path, model, None)
        mics.save(tmp_path / f"step-{step}", model, None, keep=2)
    assert names(tmp_path) == {"step-1", "step-2"}
    anew = begin()
    with torch.no_grad():
        mics.save(tmp_path / "anew-1", anew, None, keep=1)
        mics.save(tmp_path / "anew-2", anew, None, keep=1)
    assert names(tmp_path) == {"step-1", "step-2", "anew-2"}


def test_two_that_go_on_from_one_checkpoint_do_not_remove_each_others(tmp_path: Path) -> None:
    mics.save(tmp_path / "step-0", begin(), None)
    one, other = begin(), begin()
    for model in (one, other):
        mics.load(tmp_path / "step-0", model, None)
    for step in range(2):
        mics.save(tmp_path / f"one-{step}", one, None, keep=1)
        mics.save(tmp_path / f"other-{step}", other, None, keep=1)
    assert names(tmp_path) == {"one-1", "other-1"}


def test_checkpoints_that_name_no_run_go_with_a_training_that_was_loaded_from_one(tmp_path: Path) -> None:
    """As they were written before runs had names."""
    writer = begin()
    for step in range(2):
        mics.save(tmp_path / f"step-{step}", writer, None)
        manifest = Manifest.read(tmp_path / f"step-{step}")
        about = {key: value for key, value in manifest.about.items() if key != "runs"}
        (tmp_path / f"step-{step}" / "manifest.json").write_bytes(replace(manifest, about=about).render())
    mics.save(tmp_path / "other", begin(), None, keep=1)
    assert names(tmp_path) == {"step-0", "step-1", "other"}
    loaded = begin()
    mics.load(tmp_path / "step-1", loaded, None)
    mics.save(tmp_path / "step-2", loaded, None, keep=1)
    assert names(tmp_path) == {"step-2", "other"}
