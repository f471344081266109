"""A folder of checkpoints whatever moment a save was killed at."""

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mics_core as mics
from mics_core import ConfigError
from mics_core.checkpoint import saving
from mics_core.checkpoint.folder import Place


def saved(folder: Path, value: float) -> nn.Module:
    """A model whose weights are this value, saved as step-1."""
    model = mics.shard(nn.Linear(3, 3), mics.Sharding.ddp())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    mics.save(folder / "step-1", model, None, value=value)
    return model


def replacing(folder: Path) -> Place:
    """What a save of step-1 leaves that is killed when the old one has made room and the new one is not there yet."""
    place = Place(folder / "step-1")
    place.path.rename(place.replaced)
    place.temporary.mkdir()
    return place


@pytest.mark.parametrize("killed", ["once", "by the first save, too"])
def test_a_checkpoint_that_made_room_for_one_that_never_came_is_loaded(tmp_path: Path, killed: str) -> None:
    model = saved(tmp_path, 1.0)
    if killed != "once":  # before it moved that file
        (tmp_path / "latest").rename(tmp_path / "step-1" / "latest")
    replacing(tmp_path)
    for path in (tmp_path, tmp_path / "step-1"):
        assert mics.load(path, model, None) == {"value": 1.0}


def test_the_next_save_gives_it_its_name_back(tmp_path: Path) -> None:
    model = saved(tmp_path, 1.0)
    place = replacing(tmp_path)
    mics.save(tmp_path / "step-2", model, None, value=2.0)
    assert not place.replaced.exists()
    assert not place.temporary.exists()
    assert mics.load(tmp_path / "step-1", model, None) == {"value": 1.0}
    assert mics.load(tmp_path, model, None) == {"value": 2.0}


def test_what_was_replaced_goes_once_the_new_one_is_there(tmp_path: Path) -> None:
    saved(tmp_path, 1.0)
    model = saved(tmp_path, 2.0)
    assert mics.load(tmp_path, model, None) == {"value": 2.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "latest", "step-1"]


def test_one_process_saves_in_a_folder_at_a_time(tmp_path: Path) -> None:
    one, other = Place(tmp_path / "step-1").claimed(), Place(tmp_path / "step-2").claimed()
    with one, pytest.raises(ConfigError, match="another process is saving in"), other:
        pass
    with Place(tmp_path / "step-2").claimed():
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_that_locks_nothing_is_saved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    model = saved(tmp_path, 1.0)
    mics.save(tmp_path / "step-2", model, None, keep=1, value=2.0)
    assert mics.load(tmp_path, model, None) == {"value": 2.0}


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "expected a folder in which all ranks may make files: choose another path"),
        (errno.EIO, "expected no error of the system: mend its cause, and save again"),
        (errno.EMFILE, "expected no error of the system: mend its cause, and save again"),
    ],
)
def test_another_path_is_advised_where_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "a file")

    monkeypatch.setattr(saving, "write", refuse)
    with pytest.raises(RuntimeError) as caught:
        saved(tmp_path, 1.0)
    told = f"save: a file cannot be written: {os.strerror(number)}, {advice}; older checkpoints are as they were"
    assert str(caught.value) == told


@contextmanager
def refusing(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, old: str) -> Iterator[list[str]]:
    """A disk that does not do this to what is called so; what is warned of."""
    real: Callable[..., Any] = getattr(kind, name)

    def refuse(path: Path, *rest: Any, **how: Any) -> Any:
        if old in path.name:
            raise PermissionError(1, "Operation not permitted", "__0_0.distcp" if name == "rmtree" else str(path))
        return real(path, *rest, **how)

    said: list[str] = []
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # which prints the same text once
        patch.setattr(kind, name, refuse)
        yield said
    said += [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("kind", "name"), [(shutil, "rmtree"), (Path, "rename")])
def test_saves_go_on_beside_one_that_cannot_be_removed_and_warn_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, name: str
) -> None:
    model = saved(tmp_path, 1.0)
    with refusing(monkeypatch, kind, name, "step-1") as said:
        for step in (2, 3, 4):
            mics.save(tmp_path / f"step-{step}", model, None, keep=1, value=step)
            assert mics.load(tmp_path, model, None) == {"value": step}
    # A directory that was renamed already is tried twice: by the next save, when it begins.
    for step in (2, 3, 4):
        assert any(f"cannot be removed while {tmp_path / f'step-{step}'} is saved" in text for text in said)
    for text in said:
        assert str(tmp_path / (".step-1.saving" if name == "rmtree" else "step-1")) in text
        assert "Operation not permitted); the next save tries again" in text
        assert "__0_0.distcp" in text or name == "rename"
    mics.save(tmp_path / "step-5", model, None, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "latest", "step-5"]


def test_what_cannot_be_removed_is_not_in_the_way_of_the_next_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path, 1.0)
    Place(tmp_path / "step-1").temporary.mkdir()
    with refusing(monkeypatch, shutil, "rmtree", "step-1") as said:
        for value in (2, 3, 4):
            mics.save(tmp_path / "step-1", model, None, value=value)
            assert mics.load(tmp_path, model, None) == {"value": value}
    assert len(said) >= 3
    mics.save(tmp_path / "step-1", model, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "latest", "step-1"]


@pytest.mark.parametrize("name", ["x ", " x", "x\n", "x\ty", "manifest.json", "latest", ".x"], ids=repr)
def test_a_name_that_could_not_be_loaded_is_refused(tmp_path: Path, name: str) -> None:
    model = mics.shard(nn.Linear(3, 3), mics.Sharding.ddp())
    with pytest.raises(ConfigError, match=r"^save: the path ends in .*, expected a directory of the checkpoint's own"):
        mics.save(tmp_path / name, model, None)
    assert not list(tmp_path.iterdir())


def test_what_others_keep_beside_checkpoints_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "odd" / "manifest.json").mkdir(parents=True)
    assert mics.load(tmp_path, saved(tmp_path, 1.0), None) == {"value": 1.0}
