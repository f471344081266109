"""In one process: export, inspect, and a program that ends before its save has."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import forks
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
        index = json.loads((tmp_path / "out.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        files = [list(load_file(path)) for path in paths]
        assert index["weight_map"] == {
            name: path.name for path, names in zip(paths, files, strict=True) for name in names
        }
        sizes = [sum(found[name].nbytes for name in names) for names in files]
        assert all(len(names) == 1 or size <= shard_bytes for names, size in zip(files, sizes, strict=True))
        assert all(sum(pair) > shard_bytes for pair in pairwise(sizes))  # else both would be one file
    Model().load_state_dict(found)


@pytest.mark.parametrize("source", ["one.safetensors", "parts", "state.pt"])
def test_what_is_exported_can_be_loaded(runs: Path, tmp_path: Path, source: str) -> None:
    out = tmp_path / "new" / ("model.safetensors" if source == "parts" else source)
    assert main(["export", str(runs), str(out), *(["--shard-bytes", "300"] if source == "parts" else [])]) == 0
    assert out.exists() == (source != "parts")
    expected = mics.shard(Model(), mics.Sharding.ddp(), precision=mics.Precision.bf16())
    mics.load(runs, expected, None)
    model = mics.shard(Model(), mics.Sharding.ddp(), precision=mics.Precision.bf16())
    mics.load_weights(out.parent if source == "parts" else out, model)
    with mics.full_params(expected), mics.full_params(model):
        wanted = expected.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, wanted[name]), name
        if source == "state.pt":
            state = torch.load(out, weights_only=True)
            assert {name: value.tolist() for name, value in state.items()} == {
                name: value.tolist() for name, value in wanted.items()
            }


class Plugin:
    """An entry point that names tensors in capitals, turns matrices and writes a file."""

    name = "loud"

    def load(self) -> object:
        def naming(extra: dict[str, object]) -> tuple[object, dict[str, str]]:
            if "sampler" not in extra:
                raise ValueError("loud: no sampler")
            return rename, {"extra.txt": str(extra)}

        def rename(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
            if tensor.shape == (6, 6):  # two of one
                return {f"{name.upper()} {half}": part for half, part in enumerate(tensor.t().split(3))}
            return {name.upper(): tensor}

        return naming


@pytest.mark.parametrize("out", ["model.safetensors", "model.pt"])
def test_a_plug_in_renames_and_turns_tensors(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr("mics_core.checkpoint.export.entry_points", lambda group: [Plugin()] * (group == "mics.names"))
    assert main(["export", str(runs), str(tmp_path / out), "--names", "loud", "--dtype", "bf16"]) == 0
    assert (tmp_path / "extra.txt").read_text() == "{'sampler': {'seed': 3}}"
    found = load_file(tmp_path / out) if out == "model.safetensors" else torch.load(tmp_path / out)
    export(runs, tmp_path / "plain.safetensors", torch.bfloat16)
    plain = load_file(tmp_path / "plain.safetensors")
    assert torch.equal(torch.cat([found.pop("FIRST.WEIGHT 0"), found.pop("FIRST.WEIGHT 1")]), plain["first.weight"].t())
    assert torch.equal(found["IDLE"], plain["idle"])
    assert found["IDLE"].dtype == torch.bfloat16


def test_names_that_are_not_there_or_do_not_fit_are_told_in_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str, checkpoint: Path = runs, out: str = "out.safetensors") -> str:
        assert main(["export", str(checkpoint), str(tmp_path / out), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / out).exists()
        return error

    assert "the names 'loud' are unknown, expected one of those installed, which are hf: choose one" in said(
        "--names", "loud"
    )
    assert "hf: the checkpoint does not say which model it is of" in said("--names", "hf")
    assert "is one file, expected no shard_bytes" in said("--shard-bytes", "9", out="out.pt")
    assert "expected a name that ends in .safetensors or .pt" in said(out="out.bin")
    monkeypatch.setattr(Plugin, "load", lambda _: lambda _: (lambda _, tensor: {"one": tensor}, {}))
    monkeypatch.setattr("mics_core.checkpoint.export.entry_points", lambda **_: [Plugin()])
    assert "one comes twice, again from model." in said("--names", "loud")
    monkeypatch.setattr(Plugin, "load", lambda _: lambda _: (lambda name, tensor: {name: tensor + 0j}, {}))
    assert "is torch.complex64, which safetensors has not: write a .pt file" in said("--names", "loud")


PEAK = """
import resource, sys
from mics_core.cli import main
main(["export", sys.argv[1], sys.argv[2] + "/small.safetensors"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["export", sys.argv[3], sys.argv[2] + "/large.safetensors"]) == 0
print("grown by", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts KiB, as Linux does")
def test_a_process_that_exports_needs_memory_for_few_of_many_tensors(runs: Path, tmp_path: Path) -> None:
    model = mics.shard(nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(10))), mics.Sharding.ddp())
    mics.save(tmp_path / "large", model, None)
    command = [sys.executable, "-c", PEAK, str(runs), str(tmp_path), str(tmp_path / "large")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment)
    largest = 4 * 1000 * 1000 / 1024
    assert (tmp_path / "large.safetensors").stat().st_size > 10 * 1024 * largest
    assert int(run.stdout.split()[-1]) < 4 * largest  # the whole, and torch reads with two copies of a part beside it


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
    assert not list(runs.glob("*.safetensors"))


def test_weights_with_a_flipped_bit_are_not_exported(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "step-1" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["export", str(runs), str(runs / "out.safetensors")]) == 1
    assert "__0_0.distcp" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not list(runs.glob("*.safetensors"))


def test_an_output_that_cannot_be_written_is_told_in_one_sentence(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs), "/dev/null/model.safetensors"]) == 1
    assert "export: /dev/null cannot be written: " in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert "Errno" not in error


FATES = ("work", "fail")
ENDS_EARLY = """
import threading, torch
import mics_core as mics
from mics_core.checkpoint import saving
real = saving.write
returned = threading.Event()
def slow(*arguments):
    assert returned.wait(600)  # so the save is under way when the process ends
    if fate == "fail":
        raise OSError(28, "No space left on device")
    return real(*arguments)
saving.write = slow
model = mics.shard(torch.nn.Linear(3, 3), mics.Sharding.ddp())
mics.save(path, model, None, background=True)
returned.set()
"""


def test_a_process_ends_after_its_last_save_and_tells_if_it_failed(tmp_path: Path) -> None:
    programs = {fate: f"fate, path = {fate!r}, {str(tmp_path / fate / 'step-1')!r}\n{ENDS_EARLY}" for fate in FATES}
    for fate, done in forks.run(programs, "mics_core").items():
        assert (tmp_path / fate / "latest").exists() == (fate == "work")
        assert ("No space left on device" in done.stderr) == (fate == "fail"), done.stderr


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
