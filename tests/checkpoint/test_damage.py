"""What is damaged, does not fit or cannot be written is one sentence on every rank, and nothing is lost."""

from pathlib import Path

import pytest

import damage_work as work
from mics_core import ConfigError, LifecycleError, NoCheckpoint
from pool import Pool


def test_every_damage_of_every_file_is_found_on_every_rank_before_memory_is_touched(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, work.load_damaged, tmp_path)
    assert {name for name, *_ in first} == {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"}
    for found in (first, second):
        for name, damage, said, changed in found:
            assert name in said, (name, damage, said)
            assert "\n" not in said
            assert not changed
            if name.endswith(".distcp"):
                assert "which holds model." in said


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("Wider", "first.weight has the shape (6, 6) in"),
        ("Longer", "more is missing in"),
        ("Shorter", "idle is in"),
        ("SGD", "the checkpoint's optimizer is AdamW, got SGD"),
        ("one optimizer", "load: ranks [1] passed an optimizer and the others none, expected one from all"),
        ("one verifies", "load: ranks [0] passed verify=True and the others False, expected the same: ask alike"),
        ("fewer", "belongs to the checkpoint's optimizer alone"),
    ],
)
def test_a_checkpoint_of_another_model_or_optimizer(pool: Pool, tmp_path: Path, kind: str, sentence: str) -> None:
    for error in pool.errors(2, work.load_into_another, tmp_path, kind):
        assert type(error) is ConfigError
        assert sentence in str(error)


@pytest.mark.parametrize("kind", ["nowhere", "one rank"])
def test_a_path_without_a_checkpoint_on_any_rank(pool: Pool, tmp_path: Path, kind: str) -> None:
    for error in pool.errors(2, work.load_into_another, tmp_path, kind):
        assert "does not exist or is empty, expected a directory with a manifest.json" in str(error)
        # Whoever begins anew for want of any must not lose what other ranks see.
        assert type(error) is (NoCheckpoint if kind == "nowhere" else RuntimeError)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("not a directory", "/latest is a file, expected a folder to save in: choose another path"),
        ("below a file", "/latest is a file, expected a folder to save in: choose another path"),
        ("no place", "/proc/.lock cannot be written: No such file or directory, expected a folder in which all ranks"),
        ("full", "/.step-2.saving/__1_0.distcp cannot be written: File too large, expected a disk with room"),
        ("full behind", "/.step-2.saving/__1_0.distcp cannot be written: File too large"),
        ("keep", "keep is 0, expected a count from 1 up"),
        ("optimizer", "save: ranks [1] passed an optimizer and the others none, expected one from all"),
        ("paths", "ask alike everywhere"),
        ("extra", 'extra["function"] is a function, expected tensors, numbers'),
        ("gradients", "has gradients that no step has used"),
        ("no memory", "save: MemoryError: for the random numbers of rank 1"),
    ],
)
def test_a_save_that_fails_leaves_the_one_before(pool: Pool, tmp_path: Path, how: str, sentence: str) -> None:
    for said, there, loaded in pool.run(2, work.fail_to_save, tmp_path, how):
        assert sentence in said
        assert "\n" not in said
        assert there == ["latest", "step-1"]
        assert loaded


def test_a_save_inside_a_forward(pool: Pool, tmp_path: Path) -> None:
    for error in pool.errors(2, work.save_inside, tmp_path):
        assert type(error) is LifecycleError
        assert "save: called inside the model's forward" in str(error)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_failure_in_the_background_is_raised_by_the_next_save_once(pool: Pool, tmp_path: Path, odd: int) -> None:
    for first, second in pool.run(2, work.fail_behind, tmp_path, odd):
        assert "No space left on device" in first
        assert first.count("on rank ") <= 1
        assert second == "saved"


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, work.fail_to_remove, tmp_path)
    assert not second[0]
    assert ".step-1.saving, which is old, cannot be removed while" in first[0][0]
    assert "Device or resource busy" in first[0][0]
    for _, there, extra in (first, second):
        assert there == [".lock", "latest", "step-2", "step-3"]
        assert extra == {"step": 2}


def test_what_differs_between_ranks_is_not_saved_as_rank_0s(pool: Pool, tmp_path: Path) -> None:
    for rank, (said, there, loaded) in enumerate(pool.run(2, work.save_slices, tmp_path)):
        assert "save: ema is not the same on rank 1 as on rank 0, which alone is saved" in said
        assert said.startswith("save: ")
        assert there == []
        assert loaded == {"elapsed": 1.5, "absent": None, "every": [0, 1]}, rank


def test_two_trainings_do_not_save_in_one_folder_at_once(pool: Pool, tmp_path: Path) -> None:
    for first, second in pool.run(2, work.save_beside_another, tmp_path):
        assert f"another process is saving in {tmp_path}, expected a folder of this training's own" in first
        assert second == "saved"


def test_the_newest_are_kept_and_what_killed_saves_left_is_removed(pool: Pool, tmp_path: Path) -> None:
    for there in pool.run(2, work.keep_two, tmp_path):
        assert there == [
            ["latest", "notes", "step-1", "step-2"],
            ["latest", "notes", "step-2", "step-3"],
            ["latest", "notes", "step-3", "step-4"],
            ["latest", "notes", "step-3", "step-4"],
        ]
