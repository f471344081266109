"""A run that something stops ends with one sentence, and saves nothing of what is worthless."""

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mics_core as mics
from mics_core.checkpoint import saving
from mics_models import pretrain
from mics_models.data.prepare import Settings, prepare
from mics_models.training.journal import Journal
from mics_models.training.run import resuming
from mics_models.training.screen import fitted
from mics_models.training.together import refusing

TINY = (
    "model.config.layers=1",
    "model.config.width=32",
    "model.config.hidden=64",
    "batch.seq=32",
    "batch.samples=4",
    "evaluation.batches=1",
    "evaluation.sampled=0",
    "log.tensorboard=false",
    "schedule.steps=3",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("to be or not to be\n" * 1000)
    prepare([folder / "a.txt"], folder / "bytes", Settings(vocab=256))
    return folder / "bytes"


@pytest.fixture
def run(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Pretrain on one rank: the status, and what was said."""

    def run(*changes: str) -> tuple[int, str, str]:
        status = pretrain.main([*TINY, f"data.folder={data}", f"output={tmp_path / 'run'}", *changes])
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


@pytest.mark.parametrize("every", ["checkpoint.every=0", "checkpoint.every=2"])
def test_a_save_that_fails_is_one_sentence(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise RuntimeError("save: no room on the disk: make some")

    monkeypatch.setattr(pretrain.mics, "save", save)
    status, _, complaint = run(every)
    assert status == 2
    steps = 3 if every.endswith("0") else 2
    assert complaint == f"pretrain: stopped after {steps} steps: save: no room on the disk: make some\n"


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the disk be full in the first saves after so many steps."""

    def full(*steps: int) -> None:
        left, write = list(steps), saving.write

        def run_out(folder: Path, *rest: Any) -> Any:
            for step in left:
                if f"step-{step:08d}" in str(folder):
                    left.remove(step)
                    raise OSError(errno.ENOSPC, "No space left on device", "a file")
            return write(folder, *rest)

        monkeypatch.setattr(saving, "write", run_out)

    return full


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_is_told_to_leave_where_a_save_in_the_background_fails_saves_once_more(
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    full: Callable[..., None],
    again: bool,
) -> None:
    step = pretrain.Training.step

    def told_in_the_second(self: pretrain.Training, number: int) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(pretrain.Training, "step", told_in_the_second)
    full(*[2] * (1 + again))
    status, said, complaint = run("schedule.steps=9", "checkpoint.every=1")
    assert "the checkpoint of step 2 was not saved: save: " in said
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    if again:
        assert (status, latest) == (2, "step-00000001")
        assert complaint.startswith("pretrain: stopped after 2 steps: save: ")
        assert "saved in" not in said
    else:
        assert (status, latest, complaint) == (3, "step-00000002", "")


@pytest.mark.parametrize(("steps", "status"), [((2, 6), 0), ((2, 4), 2)])
def test_the_second_checkpoint_in_a_row_that_is_not_saved_ends_a_run(
    run: Callable[..., tuple[int, str, str]], full: Callable[..., None], steps: tuple[int, int], status: int
) -> None:
    full(*steps)
    ended, said, complaint = run("schedule.steps=9", "checkpoint.every=2")
    assert ended == status, complaint
    for step in steps:
        assert f"the checkpoint of step {step} was not saved: save: " in said
    expected = "pretrain: stopped after 6 steps: two checkpoints in a row were not saved: save: .* room.*\n"
    assert re.fullmatch(expected if status else "", complaint)


@pytest.mark.parametrize(
    ("change", "sentence"), [("model.config.width=64", "another model"), ("schedule.steps=2", "raise schedule.steps")]
)
def test_a_resume_that_is_refused_leaves_the_runs_settings(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, change: str, sentence: str
) -> None:
    assert run()[0] == 0
    told = tmp_path / "run" / "settings.toml"
    before = told.read_text()
    status, _, complaint = run("checkpoint.resume=always", change)
    assert status == 2
    assert sentence in complaint
    assert told.read_text() == before


def test_a_checkpoint_of_another_program_is_refused_in_a_sentence(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: pretrain.Training, path: Path, *_: Any, **__: Any) -> Any:
        return mics.save(path, self.model, self.optimizer, step=1)

    monkeypatch.setattr(pretrain.Training, "save", save)
    assert run()[0] == 0
    status, _, complaint = run("checkpoint.resume=always")
    assert status == 2
    assert re.fullmatch(
        r"pretrain: the checkpoint in .*/checkpoints has no losses, settings, expected .*: name .*\n", complaint
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("40 GB"), mics.LostRank("nothing came from rank 1")])
def test_what_some_ranks_alone_raise_is_not_taken_for_a_refusal_of_all(error: Exception) -> None:
    with pytest.raises(type(error)), refusing():
        raise error


@pytest.mark.parametrize("every", ["log.every=1", "log.every=3", "log.every=50"])
def test_a_log_that_cannot_be_written_is_one_sentence(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "write", write)
    status, _, complaint = run(every, "evaluation.every=0")
    assert status == 2
    assert re.fullmatch(
        r"pretrain: stopped after [23] steps: the log of .* cannot be written \(No space left on device\): .*\n",
        complaint,
    )


def test_a_gradient_that_is_not_finite_ends_a_run_before_it_saves(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, complaint = run("model.config.init_std=1e9", "checkpoint.every=1")
    assert status == 1
    assert re.fullmatch(
        r"pretrain: the gradient of step 1 is not finite, .*, on samples 0 to 3 of seed 0, .*\n", complaint
    )
    assert "checkpoint" not in complaint, "there is none"
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("checkpoint.resume=always", "has no checkpoint, expected one: begin one with checkpoint.resume=auto"),
        ("output=/proc/run", r"/proc/run cannot be used \(No such file or directory\), expected one that can be"),
        ("output=/dev/null/run", r"/dev/null/run\S* cannot be used \(Not a directory\), expected one that can be"),
        ("data.folder=/proc", "proc has no manifest.json, expected a folder that"),
    ],
)
def test_a_place_that_cannot_be_used_is_told_in_a_sentence(
    run: Callable[..., tuple[int, str, str]], change: str, sentence: str
) -> None:
    status, said, complaint = run(change)
    assert status == 2
    assert "sharding" not in said or "resume" in change, "told before the plan is made"
    assert re.search(sentence, complaint)
    assert complaint.count("\n") == 1
    assert "Errno" not in complaint


def test_a_run_that_may_begin_anew_does_not_beside_checkpoints_that_no_file_names(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    assert run("checkpoint.resume=auto", "checkpoint.every=1")[0] == 0  # there is none yet
    (tmp_path / "run" / "checkpoints" / "latest").unlink()
    status, _, complaint = run("checkpoint.resume=auto", "schedule.steps=4")
    assert status == 2
    assert re.fullmatch("pretrain: load: .* has no file latest, .*; the newest is .*/step-00000003\n", complaint)


def test_an_error_of_one_rank_is_one_sentence_unless_its_traceback_is_asked_for(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def step(*_: object) -> None:
        raise mics.LifecycleError("gather of blocks.0: ranks differ")

    monkeypatch.setattr(pretrain.Training, "step", step)
    status, _, complaint = run()
    assert (status, complaint) == (1, "pretrain: on rank 0: gather of blocks.0: ranks differ\n")
    with pytest.raises(mics.LifecycleError):
        run("--traceback", f"output={tmp_path / 'other'}")


def test_what_goes_on_with_a_run_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "-m mics_models.pretrain 'my runs/a/settings.toml' 'output=my runs/a' checkpoint.resume=always"
    assert resuming(Path("my runs/a"), 1) == f"python {told}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resuming(Path("my runs/a"), 4) == f"torchrun --standalone --nproc-per-node 4 {told}"
    assert resuming(Path("my runs/a"), 8) == f"torchrun --nnodes 2 --nproc-per-node 4 ... {told}"


def test_a_report_breaks_lines_between_its_words() -> None:
    words = ["step 12000/100000", "loss 2.8234", "held out 2.9012", "norm 0.52", "1,234,567 tokens/s", "exposed 3%"]
    lines = fitted(words, 40).splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert "  ".join(line.strip() for line in lines) == "  ".join(words)


def test_a_run_of_more_steps_than_there_is_time_reports_all_the_same(run: Callable[..., tuple[int, str, str]]) -> None:
    status, said, complaint = run(f"schedule.steps={2**63 - 1}", "schedule.minutes=0.001", "log.every=1")
    assert (status, complaint) == (0, "")
    assert f"step {'1':>19}/{2**63 - 1} " in said
    assert "ETA 999999999 days, 23:59:59" in said
