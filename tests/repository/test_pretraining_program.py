"""The pretraining program as users start it: a whole run, an interrupted one that goes on, and one that goes wrong."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mics_models.training import journal

TINY = (
    "model.config.layers=1",
    "model.config.width=32",
    "model.config.hidden=64",
    "batch.seq=32",
    "batch.samples=8",
    "evaluation.batches=1",
    "evaluation.sampled=5",
    "log.every=3",  # the signal comes after two reports, and the run ends between two
    "log.tensorboard=false",
    "log.peak_tflops=1",
)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(*changes: str, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "mics_models.pretrain", *TINY, *changes]


def run(*changes: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    whole = command(*changes, launcher=launcher)
    return subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


def losses(folder: Path) -> dict[float, float]:
    return {row["step"]: row["loss"] for row in journal.read(folder)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 12 steps on two ranks, and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run("schedule.steps=12", "checkpoint.every=4", f"output={folder}", launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_a_run_says_its_plan_and_leaves_all_that_it_promised(whole: tuple[Path, str]) -> None:
    folder, said = whole
    for name in ("model", "data", "ranks", "sharding", "memory", "traffic", "batch", "schedule"):
        assert re.search(rf"^{name} ", said, re.M), said
    assert re.search(
        r"step 12/12  loss \d\.\d+  held out \d\.\d+  norm .* tokens/s  MFU .*compute \d+%, exposed \d+%, optimizer",
        said,
    )
    assert "a sample:\n\ndef " in said
    assert re.search(r"^held-out loss \d\.\d+ nats a token \(a uniform guess: 5.545\) after 12 steps", said, re.M)
    assert (folder / "curves.png").exists()
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000008", "step-00000012"]
    assert list(losses(folder)) == [3, 6, 9, 12]
    assert "held_out" in journal.read(folder)[-1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_leave_saves_and_goes_on_as_if_nothing_had_been(
    whole: tuple[Path, str], tmp_path: Path, how: signal.Signals
) -> None:
    expected = losses(whole[0])
    folder = tmp_path / "run"
    settings = ("schedule.steps=12", "checkpoint.every=0", f"output={folder}")
    # Slow steps, so that the signal comes between them.
    program = "import time, mics_models.pretrain as p; step = p.Training.step\n"
    program += "p.Training.step = lambda self, n: (time.sleep(0.4), step(self, n))[1]\nraise SystemExit(p.main())"
    slow = tmp_path / "slow.py"
    slow.write_text(program)
    launcher = (*TWO_RANKS, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    started = [sys.executable, *launcher, str(slow), *TINY, *settings]
    with subprocess.Popen(started, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        while not (folder / journal.LOG).exists() or len(losses(folder)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(how)
        said = process.communicate(timeout=120)[0]
        assert process.returncode != 0
    stopped = re.search(r"stopped after (\d+) of 12 steps", said)
    assert stopped
    assert 6 <= int(stopped[1]) < 12
    assert int(stopped[1]) % 3, "it ended at a report, so nothing is shown"
    done = run(*settings, "checkpoint.resume=always", launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming after step {stopped[1]}" in done.stdout
    found = losses(folder)
    assert {step: found[step] for step in expected} == expected


def test_an_output_that_has_a_run_is_refused(whole: tuple[Path, str]) -> None:
    done = run(f"output={whole[0]}")
    assert done.returncode == 2
    assert re.fullmatch(r"pretrain: output .* has a run already, expected a new folder: .*\n", done.stderr)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved_and_names_its_samples(tmp_path: Path) -> None:
    settings = ("optimizer.lr=1e38", "optimizer.clip=0", "schedule.warmup=0", "checkpoint.every=1", "log.every=50")
    done = run(*settings, f"output={tmp_path / 'run'}", launcher=TWO_RANKS)
    assert done.returncode == 1
    (said,) = re.findall(r"^pretrain: the loss of step (\d+) is not finite in micro-step (.*)$", done.stderr, re.M)
    assert re.search(r"on rank [01], samples \d+ to \d+", said[1])
    (newest,) = re.findall(r"\d+", (tmp_path / "run" / "checkpoints" / "latest").read_text())
    assert int(newest) == int(said[0])  # so many steps were finite


def test_ranks_that_are_told_different_things_refuse_to_begin(tmp_path: Path) -> None:
    program = tmp_path / "different.py"
    program.write_text("import os, mics_models.pretrain as p\nraise SystemExit(p.main(['seed=' + os.environ['RANK']]))")
    started = [sys.executable, *TWO_RANKS, str(program)]
    done = subprocess.run(started, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert done.stderr.count("pretrain: seed is 1 on rank 1 and 0 on rank 0, expected the same everywhere") == 1


def test_a_run_whose_minutes_are_over_ends_as_a_whole_one(tmp_path: Path) -> None:
    settings = ("schedule.steps=1000000", "schedule.minutes=0.03", "evaluation.every=2", "checkpoint.resume=auto")
    done = run(*settings, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"stopped after \d+ of 1000000 steps, because the minutes are over", done.stdout)
    assert "held-out loss" in done.stdout
    assert (tmp_path / "run" / "curves.png").exists()
    (stopped,) = re.findall(r"stopped after (\d+) of", done.stdout)
    last = journal.read(tmp_path / "run")[-1]
    assert last["step"] == int(stopped)
    assert f"held-out loss {last['held_out']:.4f}" in done.stdout, "the loss that is told is that of the last step"
    again = run("schedule.steps=1", "checkpoint.resume=auto", f"output={tmp_path / 'run'}")
    assert again.returncode == 2
    assert "expected more: raise schedule.steps to go on" in again.stderr


def test_an_unknown_key_is_a_usage_error_that_suggests_the_nearest() -> None:
    done = run("batch.sequence=3")
    assert done.returncode == 2
    assert "batch.sequence is unknown, did you mean batch.seq?" in done.stderr


def test_text_comes_from_a_run(whole: tuple[Path, str]) -> None:
    sample = [sys.executable, "-m", "mics_models.generate", str(whole[0]), "--prompt", "import ", "--tokens", "7"]
    done = subprocess.run(sample, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import ")
    assert "Warning" not in done.stderr


def test_two_nodes_train_together_by_the_recipe_of_the_examples(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "examples" / "two-nodes.sh"
    settings = (*TINY, "schedule.steps=4", f"output={tmp_path / 'run'}")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    agents = [
        subprocess.Popen(
            [recipe, str(node), "127.0.0.1", *settings],
            env=ENVIRONMENT | {"RANKS": "2", "PORT": port, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert re.search(r"^ranks +4 on cpu, 2 on a node", said[0], re.M)
