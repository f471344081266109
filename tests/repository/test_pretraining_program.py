"""The pretraining program: a whole run, an interrupted one that goes on, and one that goes wrong."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mics_models.data.prepare import Settings, prepare
from mics_models.training import journal
from warm_ranks import ENVIRONMENT, Done, WarmRanks

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
)
TORCHRUN = ("--standalone", "--nproc-per-node", "2", "--signals-to-handle", "SIGTERM,SIGUSR1")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks() as warm:
        yield warm


def run(warm: WarmRanks, *changes: str, ranks: int = 1) -> Done:
    return warm.run(*[[*TINY, *changes]] * ranks)


def losses(folder: Path) -> dict[float, float]:
    return {row["step"]: row["loss"] for row in journal.read(folder)}


@pytest.fixture(scope="module")
def whole(warm: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 12 steps on two ranks, and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    settings = ("schedule.steps=12", "checkpoint.every=4", "log.peak_tflops=1", f"output={folder}")
    done = run(warm, *settings, ranks=2)
    assert done.statuses == [0, 0], done.stderr
    return folder, done.stdout


def test_a_run_says_its_plan_and_leaves_all_that_it_promised(whole: tuple[Path, str]) -> None:
    folder, said = whole
    assert said.startswith("waiting until all 2 ranks are there\n")
    for name in ("model", "data", "ranks", "sharding", "memory", "traffic", "batch", "schedule"):
        assert re.search(rf"^{name} ", said, re.M), said
    assert re.search(
        r"^step 12/12  loss \d\.\d+  held out \d\.\d+  norm \S+  \S+ tokens/s  exposed \d+%  MFU \S+  ETA \S+$",
        said,
        re.M,
    )
    assert "a sample:\n\ndef " in said
    assert re.search(r"^held-out loss \d\.\d+ nats a token \(a uniform guess: 5.545\) after 12 steps", said, re.M)
    assert (folder / "curves.png").exists()
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000008", "step-00000012"]
    assert list(losses(folder)) == [3, 6, 9, 12]
    assert "held_out" in journal.read(folder)[-1]


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.deep)])
def test_ranks_that_are_told_to_leave_save_and_go_on_as_if_nothing_had_been(
    warm: WarmRanks, whole: tuple[Path, str], tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "run"
    settings = ("schedule.steps=12", "checkpoint.every=0", f"output={folder}")
    gate = tmp_path / "gate"
    processes = warm.start(*[[*TINY, *settings]] * 2, gate=(6, str(gate)))  # behind two reports
    end = time.monotonic() + 600
    while not (folder / journal.LOG).exists() or len(losses(folder)) < 2:
        assert time.monotonic() < end, "the ranks hang"
        time.sleep(0.05)
    for process in processes:
        os.kill(process, how)
    gate.touch()
    left = warm.wait()
    assert left.statuses == [3, 3], left.stderr
    assert left.stderr == ""
    stopped = re.search(r"stopped after (\d+) of 12 steps", left.stdout)
    assert stopped
    told = f"-m mics_models.pretrain {folder}/settings.toml output={folder} checkpoint.resume=always"
    assert f"; to go on:\n    torchrun --standalone --nproc-per-node 2 {told}\n" in left.stdout
    assert int(stopped[1]) == 8, "the wish is told with step 7 and heard behind step 8, between two reports"
    done = run(warm, *settings, "checkpoint.resume=always", ranks=2)
    assert done.statuses == [0, 0], done.stderr
    assert f"resuming after step {stopped[1]}" in done.stdout
    expected, found = losses(whole[0]), losses(folder)
    assert {step: found[step] for step in expected} == expected


def launched(
    tmp_path: Path, program: str, interrupted: bool = False, arguments: Sequence[str] = TORCHRUN
) -> tuple[int, str, str]:
    """How the launcher of `make pretrain` ends with a program on two ranks, and all that was said."""
    script = tmp_path / "program.py"
    script.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{program}")
    started = [sys.executable, "-m", "mics_models.training.launch", *arguments, str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(started, env=ENVIRONMENT, start_new_session=True, **pipes) as process:  # type: ignore
        if interrupted:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, complaints = process.communicate(timeout=600)
    return process.returncode, said, complaints


@pytest.mark.deep
def test_the_launcher_adds_nothing_to_what_a_rank_says_of_a_mistake(tmp_path: Path) -> None:
    program = "time.sleep(600 * (1 - rank))\nprint('pretrain: a mistake', file=sys.stderr)\nsys.exit(2)"
    assert launched(tmp_path, program) == (2, "", "pretrain: a mistake\n")


@pytest.mark.deep
def test_the_launcher_names_a_rank_that_died_without_a_word(tmp_path: Path) -> None:
    program = "time.sleep(600 * (1 - rank))\nos.kill(os.getpid(), signal.SIGKILL)"
    assert launched(tmp_path, program) == (137, "", "launch: rank 1 ended with exit status -9, expected 0\n")


SAVES_WHEN_ASKED = """
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), sys.exit(3)))
open(f'{__file__}.{rank}', 'w').close()
while not os.path.exists(f'{__file__}.{1 - rank}'): time.sleep(0.01)
"""


@pytest.mark.deep
def test_ctrl_c_asks_ranks_to_leave_and_shows_no_traceback(tmp_path: Path) -> None:
    program = SAVES_WHEN_ASKED + "if rank == 0: print('ready', flush=True)\ntime.sleep(600)"
    assert launched(tmp_path, program, interrupted=True) == (143, "saved\nsaved\n", "")


@pytest.mark.deep
def test_sigusr1_to_the_launcher_asks_ranks_to_leave(tmp_path: Path) -> None:
    program = SAVES_WHEN_ASKED + "if rank == 0: os.kill(os.getppid(), signal.SIGUSR1)\ntime.sleep(600)"
    assert launched(tmp_path, program, arguments=TORCHRUN[:3]) == (143, "saved\nsaved\n", "")


@pytest.mark.deep
@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell")
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """What was said ends when no process is left that could say more."""
    program = "import mics_core\nmics_core.init()\n"
    program += "open(f'{__file__}.{rank}', 'w').close()\n"
    program += "while not os.path.exists(f'{__file__}.{1 - rank}'): time.sleep(0.01)\n"
    program += "if rank == 0: os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)\nprint('went on')"
    assert launched(tmp_path, program)[:2] == (-signal.SIGKILL, "")


def test_an_unknown_key_is_told_once_with_the_nearest(warm: WarmRanks) -> None:
    done = run(warm, "batch.sequence=3", ranks=2)
    assert done.statuses == [2, 2]
    assert done.stderr == "pretrain: batch.sequence is unknown, did you mean batch.seq?\n"


def test_an_output_that_has_a_run_is_refused(warm: WarmRanks, whole: tuple[Path, str]) -> None:
    done = run(warm, f"output={whole[0]}", ranks=2)
    assert done.statuses == [2, 2]
    assert re.fullmatch(r"pretrain: output .* has a run already, expected a new folder: .*\n", done.stderr)
    assert "sharding" not in done.stdout, "told before the plan is made"


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved_and_names_its_samples(
    warm: WarmRanks, tmp_path: Path
) -> None:
    settings = ("optimizer.lr=1e38", "optimizer.clip=0", "schedule.warmup=0", "checkpoint.every=1", "log.every=50")
    done = run(warm, *settings, f"output={tmp_path / 'run'}", ranks=2)
    assert done.statuses == [1, 1]
    (said,) = re.findall(r"^pretrain: the loss of step (\d+) is not finite in micro-step (.*)$", done.stderr, re.M)
    assert re.search(r"on rank [01], samples \d+ to \d+", said[1])
    (newest,) = re.findall(r"\d+", (tmp_path / "run" / "checkpoints" / "latest").read_text())
    assert int(newest) == int(said[0]) - 1  # so many steps were finite
    assert f"go on from the last checkpoint in {tmp_path / 'run'}" in done.stderr


def test_a_rank_that_is_killed_is_named_by_the_others_in_one_sentence(warm: WarmRanks, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    settings = ("log.every=1", "checkpoint.every=0", f"output={tmp_path / 'run'}")
    processes = warm.start(*[[*TINY, *settings]] * 2, gate=(2, str(gate)))
    end = time.monotonic() + 600
    while not (tmp_path / "run" / journal.LOG).exists() or len(losses(tmp_path / "run")) < 2:
        assert time.monotonic() < end, "the ranks hang"
        time.sleep(0.05)
    os.kill(processes[1], signal.SIGKILL)
    gate.touch()
    done = warm.wait()
    assert done.statuses == [1, -signal.SIGKILL]
    assert re.fullmatch(r"pretrain: on rank 0: .*nothing came from rank 1.*\n", done.stderr)


@pytest.mark.parametrize(
    "deadly",
    [
        "mics_models.training.news:Exchange.send",
        # behind the forwards of an evaluation
        pytest.param("mics_models.pretrain:everyone", marks=pytest.mark.deep),
        pytest.param("mics_core.checkpoint.saving:write", marks=pytest.mark.deep),
        pytest.param("mics_core.checkpoint.saving:write in the background", marks=pytest.mark.deep),
    ],
)
def test_a_rank_that_dies_is_named_once_wherever_others_wait_for_it(
    warm: WarmRanks, tmp_path: Path, deadly: str
) -> None:
    where, _, behind = deadly.partition(" ")
    settings = (f"checkpoint.background={'true' if behind else 'false'}", "checkpoint.every=2", "evaluation.every=1")
    settings += ("schedule.steps=5", f"output={tmp_path / 'run'}")
    done = warm.run(*[[*TINY, *settings]] * 2, deadly=where)
    assert done.statuses == [1, -signal.SIGKILL], done.stderr
    (said,) = re.findall(r"^pretrain: .*$", done.stderr, re.M)
    assert re.match("pretrain: on rank 0: .*nothing came from rank 1[: ]", said)


def test_damaged_tokens_that_one_rank_finds_end_the_run_before_it_is_saved(warm: WarmRanks, tmp_path: Path) -> None:
    text, data = tmp_path / "a.txt", tmp_path / "data"
    text.write_text("to be or not to be\n" * 1000)
    prepare([text], data, Settings(vocab=256))
    file = data / "held_out" / "00000.tokens"  # the second file, so rank 1 reads it
    file.write_bytes(file.read_bytes()[:-2] + b"\x07\0")
    settings = (f"data.folder={data}", "schedule.steps=300", "checkpoint.every=0", f"output={tmp_path / 'run'}")
    done = run(warm, *settings, ranks=2)
    assert done.statuses == [2, 2]
    sentence = r"pretrain: on rank 1: stopped after \d+ steps: token files: the tokens of .* are damaged, .*\n"
    assert re.fullmatch(sentence, done.stderr)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ranks_that_are_told_different_things_refuse_to_begin(warm: WarmRanks) -> None:
    done = warm.run(["seed=0"], ["seed=1"])
    assert done.statuses == [2, 2]
    expected = "pretrain: seed is 1 on rank 1 and 0 on rank 0, expected the same everywhere: tell all ranks alike\n"
    assert done.stderr == expected


def test_a_mistake_that_one_rank_alone_was_told_is_refused_by_all(warm: WarmRanks, tmp_path: Path) -> None:
    done = warm.run([], [str(tmp_path / "missing.toml")])
    assert done.statuses == [2, 2]
    assert re.fullmatch(
        r"pretrain: on rank 1: .*missing\.toml is not there, expected a file of settings: .*\n", done.stderr
    )


def test_a_run_whose_minutes_are_over_ends_as_a_whole_one(warm: WarmRanks, tmp_path: Path) -> None:
    settings = ("schedule.steps=1000000", "schedule.minutes=0.01", "evaluation.every=2", "checkpoint.resume=auto")
    done = run(warm, *settings, f"output={tmp_path / 'run'}")
    assert done.statuses == [0], done.stderr
    assert re.search(r"stopped after \d+ of 1000000 steps, because the minutes are over", done.stdout)
    assert "held-out loss" in done.stdout
    assert "MFU" not in done.stdout, "nobody has said what a CPU can do"
    assert (tmp_path / "run" / "curves.png").exists()
    (stopped,) = re.findall(r"stopped after (\d+) of", done.stdout)
    last = journal.read(tmp_path / "run")[-1]
    assert last["step"] == int(stopped)
    assert f"held-out loss {last['held_out']:.4f}" in done.stdout, "the loss that is told is that of the last step"
    again = run(warm, "schedule.steps=1", "checkpoint.resume=auto", f"output={tmp_path / 'run'}")
    assert again.statuses == [2]
    assert "expected more: raise schedule.steps to go on" in again.stderr


def test_text_comes_from_a_run(warm: WarmRanks, whole: tuple[Path, str]) -> None:
    done = warm.run([str(whole[0]), "--prompt", "import ", "--tokens", "7"], program="generate")
    assert done.statuses == [0], done.stderr
    assert done.stdout.startswith("import ")
    assert "Warning" not in done.stderr


@pytest.mark.deep
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
            env=ENVIRONMENT | {"RANKS": "1", "PORT": port, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert re.search(r"^ranks +2 on cpu, 1 on a node", said[0], re.M)
