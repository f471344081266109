"""A load beside saves gives one checkpoint, whole, or a sentence and nothing: never a part of each."""

from pathlib import Path

import pytest
import torch
from torch import nn

import beside_work as work
import mics_core as mics
from beside_work import after
from mics_core.checkpoint import loading
from mics_core.checkpoint.reading import Stored
from pool import Pool


@pytest.mark.parametrize("moment", ["verified", "read"])
def test_all_ranks_read_what_they_have_verified_whatever_takes_its_name(
    pool: Pool, tmp_path: Path, moment: str
) -> None:
    assert pool.run(2, work.load_beside, tmp_path, moment) == [("1.0", {1.0})] * 2


def test_ranks_that_find_different_checkpoints_load_none(pool: Pool, tmp_path: Path) -> None:
    for said, values in pool.run(2, work.load_beside, tmp_path, "found"):
        assert "ranks [1] find another checkpoint than rank 0" in said
        assert values == {-1.0}


@pytest.mark.parametrize("name", ["step-1", "step-2"])
@pytest.mark.parametrize("moment", ["found", "verified", "read"])
def test_a_save_that_removes_what_is_being_loaded_mixes_nothing(tmp_path: Path, name: str, moment: str) -> None:
    """Under the same name, or under a new one of which one is kept."""
    writer = mics.shard(nn.Linear(8, 8), mics.Sharding.ddp())

    def save(name: str, value: float) -> None:
        with torch.no_grad():
            for parameter in writer.parameters():
                parameter.fill_(value)
        mics.save(tmp_path / name, writer, None, keep=1, value=value)

    save("step-1", 1.0)
    model = mics.shard(nn.Linear(8, 8), mics.Sharding.ddp())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    hooks = {
        "found": after(Stored, "__init__", lambda: save(name, 2.0)),
        "verified": after(Stored, "verify", lambda: save(name, 2.0)),
        "read": after(loading._Job, "read", lambda: save(name, 2.0), first=True),
    }
    with hooks[moment]:
        try:
            said = str(mics.load(tmp_path, model, None)["value"])
        except RuntimeError as error:
            said = str(error)
    found = {value for parameter in model.parameters() for value in parameter.flatten().tolist()}
    if moment == "read":
        assert (said, found) == ("1.0", {1.0})
    else:
        assert "was there and is gone" in said or "is missing" in said
        assert found == {-1.0}
