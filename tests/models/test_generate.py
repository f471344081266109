"""Text from a run: its checkpoint is one that anybody may have sent."""

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mics_core as mics
from mics_core.checkpoint import read_weights
from mics_core.checkpoint.manifest import Manifest, measure
from mics_core.cli import main as inspect
from mics_models.generate import load_model, main
from mics_models.gpt import GPT, GPTConfig
from mics_models.training.batches import configure
from mics_models.training.settings import ModelSettings, Settings, to_toml

SMALL = ModelSettings("byte-tiny", config={"layers": 1, "width": 32, "hidden": 64, "context": 16})


def small() -> GPTConfig:
    config = configure(SMALL)
    assert isinstance(config, GPTConfig)
    return config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run on one rank."""
    folder = tmp_path / "run"
    model = mics.shard(GPT(small()), mics.Sharding.ddp())
    mics.save(folder / "checkpoints" / "step-00000001", model, mics.AdamW(model.parameters()), step=1)
    (folder / "settings.toml").write_text(to_toml(Settings(model=SMALL)))
    return folder


def step(run: Path) -> Path:
    return run / "checkpoints" / "step-00000001"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made",)


def forge(run: Path) -> None:
    """Put code in front of the honest index: whoever does that writes a manifest, too."""
    index = step(run) / ".metadata"
    index.write_bytes(pickle.dumps(Evil(), 2)[:-1] + b"0" + index.read_bytes())
    manifest = Manifest.read(step(run))
    (step(run) / "manifest.json").write_bytes(
        replace(manifest, files=manifest.files | {".metadata": measure(index)}).render()
    )


def flip(run: Path) -> None:
    file = next(step(run).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(run: Path) -> None:
    file = next(step(run).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def resize(run: Path) -> None:
    (run / "settings.toml").write_text(to_toml(Settings(model=replace(SMALL, config={**SMALL.config, "hidden": 96}))))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (forge, "which no index holds"),
        (flip, "has another checksum than when it was written"),
        (halve, "bytes, expected"),
        (lambda run: (step(run) / ".metadata").write_bytes(os.urandom(500)), r"\.metadata, which says"),
        (lambda run: (step(run) / "manifest.json").unlink(), r"step-00000001 lacks manifest\.json"),
        (lambda run: (run / "checkpoints" / "latest").write_text("../../etc"), "latest is damaged, expected a name"),
        (lambda run: (run / "settings.toml").unlink(), "settings.toml is not there, expected"),
        (lambda run: (run / "settings.toml").write_bytes(b"\xff\xfe"), "settings.toml is no TOML"),
        (resize, "size mismatch"),
    ],
)
def test_what_is_no_sound_run_is_told_in_one_sentence_and_runs_nothing(
    run: Path,
    damage: Callable[[Path], object],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run)
    damage(run)
    assert main([str(run), "--tokens", "1"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("generate: ")
    assert said.err.count("\n") == 1
    assert re.search(sentence, said.err)
    assert not (run / "made").exists()
    assert not said.out


def test_the_weights_are_those_of_the_checkpoint(run: Path) -> None:
    torch.manual_seed(0)  # as when they were drawn
    expected = GPT(small()).state_dict()
    for path in (run, run / "checkpoints", step(run)):
        found = read_weights(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert inspect(["inspect", str(run)]) == 0
    model = load_model(small(), run)
    assert not model.training
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
