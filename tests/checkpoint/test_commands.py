"""In one process: export, inspect, and a program that ends before its save has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mics_core as mics
from checkpoint_work import Model
from mics_core.checkpoint.export import export
from mics_core.checkpoint.reading import Stored
from mics_core.cli import main


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A checkpoint of a world of one rank, without process groups."""
    torch.manual_seed(0)
    model = mics.shard(Model(), mics.Sharding.ddp(), precision=mics.Precision.bf16())
    optimizer = mics.AdamW(model.parameters())
    model(torch.ones(2, 6)).float().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    mics.save(tmp_path / "runs" / "step-1", model, optimizer, sampler={"seed": 3})
    return tmp_path / "runs"


@pytest.mark.parametrize("shard_bytes", [None, 300])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_exported_files_are_the_plain_state_dict(
    runs: Path, tmp_path: Path, dtype: torch.dtype | None, shard_bytes: int | None
) -> None:
    torch.manual_seed(0)
    model = mics.shard(Model(), mics.Sharding.ddp(), precision=mics.Precision.bf16())
    mics.load(runs, model, None)
    with mics.full_params(model):
        expected = {name: value.detach().clone() for name, value in model.state_dict().items()}
    paths = export(runs, tmp_path / "out.safetensors", dtype, shard_bytes)
    found = {name: value for path in paths for name, value in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name].to(value.dtype))
        assert value.dtype == dtype or dtype is None
    if shard_bytes is not None:
        assert len(paths) > 1
        index = json.loads((tmp_path / "out.safetensors.index.json").read_text())["weight_map"]
        assert {name: tmp_path / file for name, file in index.items()}.keys() == expected.keys()
        for path in paths:
            tensors = load_file(path)
            assert all(index[name] == path.name for name in tensors)
            assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= shard_bytes
    Model().load_state_dict(found)


def test_export_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mics.shard(nn.Sequential(*(nn.Linear(50, 50) for _ in range(9))), mics.Sharding.ddp())
    mics.save(tmp_path / "step-1", model, None)
    read, alive, most = Stored.whole, [], 0

    def whole(self: Stored, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
        most = max(most, sum(not ref.expired() for ref in alive))
        return tensor

    monkeypatch.setattr(Stored, "whole", whole)
    export(tmp_path, tmp_path / "out.safetensors")
    assert len(alive) == 18
    assert most <= 2  # the next is read while a name still holds the last


def test_the_command_inspects(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(runs), "--verify"]) == 0
    text = capsys.readouterr().out
    for line in (
        "written by 1 ranks",
        "compute bfloat16, master float32",
        "  first.weight  (6, 6)  float32",
        "  blocks.1.0.weight  (3, 1, 3)  bfloat16",
        "optimizer: AdamW",
        "extra: sampler",
        "lengths and checksums are right",
    ):
        assert line in text


def test_the_command_says_what_is_wrong_in_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "step-1" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    for arguments in (["inspect", str(runs)], ["export", str(runs), str(runs / "out.safetensors")]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "__0_0.distcp, which holds model." in error
    assert main(["export", str(runs), "out.bin"]) == 1
    assert not list(runs.glob("*.safetensors"))


ENDS_EARLY = """
import sys, time, torch
import mics_core as mics
from mics_core.checkpoint import saving
real = saving.write
def slow(*arguments):
    time.sleep(0.5)
    if sys.argv[2] == "fail":
        raise OSError(28, "No space left on device")
    return real(*arguments)
saving.write = slow
model = mics.shard(torch.nn.Linear(3, 3), mics.Sharding.ddp())
began = time.monotonic()
mics.save(sys.argv[1], model, None, background=True)
assert time.monotonic() - began < 0.4
"""


@pytest.mark.parametrize("fate", ["work", "fail"])
def test_a_process_ends_after_its_last_save_and_tells_if_it_failed(tmp_path: Path, fate: str) -> None:
    command = [sys.executable, "-c", ENDS_EARLY, str(tmp_path / "step-1"), fate]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, env=os.environ)
    assert (tmp_path / "latest").exists() == (fate == "work")
    assert ("No space left on device" in run.stderr) == (fate == "fail"), run.stderr


def test_a_step_taken_while_a_save_is_under_way_does_not_reach_it(tmp_path: Path) -> None:
    model = mics.shard(nn.Linear(3, 3), mics.Sharding.ddp())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    saving = mics.save(tmp_path / "step-1", model, None, background=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saving.wait()
    mics.load(tmp_path, model, None)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_load_goes_back_to_before_the_first_step_and_drops_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mics.shard(Model(), mics.Sharding.ddp(), precision=mics.Precision.bf16())
    optimizer = mics.AdamW(model.parameters(), lr=0.1)

    def losses() -> list[float]:
        found = []
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            loss = (model(x).float() - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    mics.save(tmp_path / "step-0", model, optimizer)
    first = losses()
    model(torch.ones(1, 6)).float().sum().backward()
    mics.load(tmp_path, model, optimizer)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert losses() == first
