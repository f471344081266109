"""A folder of checkpoints whatever moment a save was killed at."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mics_core as mics
from mics_core import ConfigError
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


def test_a_checkpoint_that_made_room_for_one_that_never_came_is_loaded(tmp_path: Path) -> None:
    model = saved(tmp_path, 1.0)
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
