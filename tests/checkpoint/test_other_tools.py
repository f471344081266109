"""What we write is a checkpoint that torch's own tools read, in one process, under the user's names."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import damage_work as work
import mics_core as mics
from checkpoint_work import Cluster, Model
from mics_core import ConfigError, Sharding
from pool import Pool

FOUR = Cluster(4, 2, Sharding(2, 2, 2))
ALONE = "ignore:torch.distributed is disabled:UserWarning"


def test_one_file_made_by_torch_holds_the_plain_state_dicts(pool: Pool, tmp_path: Path) -> None:
    held = pool.run(4, work.save_tied, tmp_path, FOUR)[0]
    dcp_to_torch_save(tmp_path / "step-2", tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=False)
    plain = Model()
    plain.load_state_dict(loaded["model"])  # strict: every name, the tied one and buffers, too
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, held[f"weight {name}"])
    state = loaded["optimizer"]["state"]
    assert torch.equal(state["first.weight"]["exp_avg"], held["exp_avg first.weight"])
    assert state["first.weight"]["step"] == 2
    assert loaded["optimizer"]["param_groups"][1]["weight_decay"] == 0.0
    assert loaded["extra"] == {"scheduler": {"last_epoch": 2}}


@pytest.mark.filterwarnings(ALONE)
def test_a_plain_model_loads_the_weights_with_torch(pool: Pool, tmp_path: Path) -> None:
    held = pool.run(4, work.save_tied, tmp_path, FOUR)[0]
    plain = Model()
    dcp.load({"model": plain.state_dict()}, checkpoint_id=tmp_path / "step-2")
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, held[f"weight {name}"])


@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_replicas_share_the_writing(pool: Pool, tmp_path: Path, degrees: tuple[int, int, int]) -> None:
    pool.run(4, work.sizes, tmp_path, Cluster(4, 2, Sharding(*degrees)))
    sizes = [(tmp_path / "step-1" / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    once = 3 * 4 * (300 * 300 + 300 + 300 * 200 + 200)  # weights and two moments, float32
    assert once < sum(sizes) < 1.1 * once
    assert max(sizes) < 1.1 * sum(sizes) / 4


@pytest.mark.filterwarnings(ALONE)
def test_a_checkpoint_of_torchs_own_is_told_for_what_it_is_and_how_to_begin_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Model()
    dcp.save({"model": theirs.state_dict()}, checkpoint_id=tmp_path / "dcp")
    model = mics.shard(Model(), Sharding.ddp())
    remedy = f"dcp_to_torch {tmp_path / 'dcp'} all.pt`, then mics.load_weights(torch.load('all.pt', mmap=True)['model']"
    with pytest.raises(RuntimeError, match=r"is a torch.distributed.checkpoint without the manifest.json") as unloaded:
        mics.load(tmp_path / "dcp", model, None)
    with pytest.raises(ConfigError, match=r"has neither, expected model.safetensors") as unread:
        mics.load_weights(tmp_path / "dcp", model)
    for caught in (unloaded, unread):
        assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "all.pt")
    with pytest.raises(ConfigError, match=r"under 'model', .*: give torch.load\(FILE, mmap=True\)\['model'\]"):
        mics.load_weights(tmp_path / "all.pt", model)
    mics.load_weights(torch.load(tmp_path / "all.pt", mmap=True)["model"], model)
    with mics.full_params(model):
        for name, value in model.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    mics.save(tmp_path / "ours", model, None)
    with pytest.raises(ConfigError, match=r"it is a checkpoint of mics.save, so run `mics export .*ours model.safe"):
        mics.load_weights(tmp_path / "ours", model)
