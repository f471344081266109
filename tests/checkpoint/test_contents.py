"""What a checkpoint holds beside weights and moments, and what reading it does not do."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import contents_work as work
import mics_core as mics
from checkpoint_work import Cluster
from mics_core import ConfigError, Sharding
from mics_core.checkpoint.description import describe
from mics_core.checkpoint.manifest import Manifest, measure
from mics_core.cli import main
from pool import Pool

TWO = Cluster(2, 2, Sharding(1, 1, 2))
FOUR = Cluster(4, 2, Sharding(2, 2, 4))
ONE = Cluster(1, 1, Sharding(1, 1, 1))


def test_buffers_that_differ_come_back_to_their_ranks(pool: Pool, tmp_path: Path) -> None:
    saved = pool.run(4, work.count, FOUR, tmp_path)
    assert len({tuple(seen) for seen in saved}) == 4
    assert pool.run(4, work.count_on, FOUR, tmp_path) == saved
    assert pool.run(2, work.count_on, TWO, tmp_path) == [saved[0]] * 2


def test_random_numbers_of_torch_python_and_numpy_continue_on_each_rank(pool: Pool, tmp_path: Path) -> None:
    drawn = pool.run(2, work.draw, TWO, tmp_path, True)
    assert len(set(drawn)) == 2
    assert pool.run(2, work.draw, TWO, tmp_path, False) == drawn


def test_numbers_in_an_optimizers_state_stay_what_they_are(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(4, work.keep_numbers, FOUR, tmp_path)[0] == [("step", 3), ("decay", 0.125), ("warm", True)]
    for loaded in pool.run(2, work.read_numbers, TWO, tmp_path):
        assert loaded == [("step", 4), ("decay", 0.0625), ("warm", True)]
        assert [type(value) for _, value in loaded] == [int, float, bool]


def test_an_optimizer_of_named_parameters_in_another_order(pool: Pool, tmp_path: Path) -> None:
    for before, after in pool.run(2, work.with_names, TWO, Cluster(2, 1, Sharding(2, 2, 2)), tmp_path):
        for name, expected in before.items():
            torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [mics.AdamW, torch.optim.AdamW])
def test_loading_needs_no_memory_for_a_second_copy_of_the_moments(pool: Pool, tmp_path: Path, kind: Any) -> None:
    places = pool.run(2, work.load_again, TWO, tmp_path, kind)
    assert any(before for before, _ in places)
    assert all(after == before for before, after in places)


def test_a_buffer_that_cannot_be_overwritten_is_refused_before_it_is_saved(pool: Pool, tmp_path: Path) -> None:
    for error in pool.errors(2, work.expanded, tmp_path):
        assert type(error) is ConfigError
        assert "the buffer mask is expanded" in str(error)
    assert not list(tmp_path.iterdir())


def test_weights_that_were_two_do_not_become_one(pool: Pool, tmp_path: Path) -> None:
    for said, changed in pool.run(2, work.tie_or_not, tmp_path / "two", False):
        assert "blocks.1.weight and blocks.0.weight are one parameter here and two in" in said
        assert not changed
    for said, changed in pool.run(2, work.tie_or_not, tmp_path / "one", True):
        assert said == "loaded"
        assert changed


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_inspecting_runs_nothing_that_is_hidden_in_pickles(tmp_path: Path) -> None:
    model, optimizer = work.build(ONE, torch.optim.SGD)
    optimizer.param_groups[0]["note"] = Evil(tmp_path / "made")
    mics.save(tmp_path / "step-1", model, optimizer, trap=Evil(tmp_path / "made"))
    text = describe(tmp_path, verify=True)
    assert "extra: trap" in text
    assert "its settings hold objects" in text
    assert not (tmp_path / "made").exists()
    mics.load(tmp_path, model, None)  # which says that it trusts them
    assert (tmp_path / "made").exists()


class Called:
    """What a pickle calls when it is read, by the name of a module and one to follow from there."""

    def __init__(self, module: str, name: str, *args: object) -> None:
        self.module, self.name, self.args = module, name, args

    def pickled(self) -> bytes:
        """By protocol 4, which follows names through dots."""

        def text(word: str) -> bytes:
            return b"X" + len(word.encode()).to_bytes(4, "little") + word.encode()

        return b"\x80\x04" + text(self.module) + text(self.name) + b"\x93" + pickle.dumps(self.args, 2)[2:-1] + b"R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "mkdir"),
        ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
        ("torch.distributed.checkpoint.metadata", "torch._strobelight.cli_function_profiler.subprocess.Popen"),
        ("torch", "Size.__class__"),
    ],
)
def test_an_index_that_an_attacker_wrote_runs_nothing_and_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], module: str, name: str
) -> None:
    """Its length and checksum are right: whoever writes an index writes a manifest, too."""
    model, optimizer = work.build(ONE, torch.optim.SGD)
    mics.save(tmp_path / "step-1", model, optimizer)
    step, made = tmp_path / "step-1", tmp_path / "made"
    (step / ".metadata").write_bytes(
        Called(module, name, ["mkdir", str(made)] if "Popen" in name else str(made)).pickled()
    )
    manifest = Manifest.read(step)
    files = manifest.files | {".metadata": measure(step / ".metadata")}
    (step / "manifest.json").write_bytes(replace(manifest, files=files).render())
    for command in (["inspect", str(step)], ["inspect", "--verify", str(step)], ["export", str(step), "x.safetensors"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert f"the index holds {module}.{name}, which no index holds" in said
        assert said.count("\n") == 1
    for load in (lambda: mics.load(step, model, optimizer), lambda: describe(step)):
        with pytest.raises(RuntimeError, match="which no index holds"):
            load()
    assert not made.exists()
