"""The parts of `make gpu-check`, the most telling first, and how a step of one runs: in a process of its own, until its
time is over, and with its findings kept as they come.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.record import ROOT

FAREWELL = 5.0
"""Seconds that a step whose time is over has to end its ranks, which would stay on the GPU."""

LONGEST_OUTPUT = 12_000
"""Characters kept of what a step prints that fails."""

RANKS = (
    "tests/ranks/test_ladder.py",
    "tests/ranks/test_training.py::test_five_steps_are_those_of_one_process",
    "tests/ranks/test_lifecycle.py",
)
"""What says most about ranks, on GPUs where the tests' pool takes them."""

NOTES = "NOTES"
"""Stands in a command for the file of its findings, and says that it takes --seconds and --pretend."""


@dataclass(frozen=True)
class Step:
    """A command of Python's, with a share of the time."""

    part: int
    name: str
    seconds: float  # its share, of nine minutes for parts 0 to 2 and as much for all others
    words: Sequence[str]  # a module and its arguments
    environment: Mapping[str, str] = field(default_factory=dict)


def _training(name: str, seconds: float, *words: str, part: int = 5) -> Step:
    told = ["bench.training", "--name", f"training-{name}", *words]
    return Step(part, f"training, {name}", seconds, told)


def steps(gpus: int, *, pretend: bool) -> list[Step]:
    """All of them, for a machine with so many GPUs."""

    def tests(part: int, name: str, seconds: float, *chosen: str) -> Step:
        quick = ["tests/core/test_topology.py"]
        return Step(part, name, seconds, ["bench.gpu.pytests", NOTES, "--", *(quick if pretend else chosen)])

    small = ["--tokens", "8", "--seq", "8", "--seconds", "0.01", "--precision", "fp32"]
    model = ["--models", "byte-tiny"] if pretend else []
    alone = [*(small if pretend else ["--seconds", "12"]), "--apart", "--ranks", "1"]
    medium, large = model or ["--models", "gpt2-350m"], ["--models", "gpt-1.3b"]
    compiled = ["--compile", "aot_eager" if pretend else "inductor"]
    found = [
        Step(0, "probes", 50, ["bench.gpu.probes", NOTES]),
        tests(1, "kernels", 85, "tests/kernels"),
        tests(2, "runtime", 40, "tests/gpu"),
        *(
            Step(2, f"{ranks} ranks share a GPU", 35 + 2 * ranks, ["bench.gpu.shared", NOTES, "--ranks", str(ranks)])
            for ranks in ((2,) if pretend else (2, 4, 8))
        ),
        tests(2, "tests of ranks", 60, *RANKS, "--patience", "20"),
        Step(2, "2 ranks of NCCL share a GPU", 20, ["bench.gpu.shared", NOTES, "--ranks", "2", "--nccl"]),
        Step(3, "order", 30, ["bench.gpu.order", NOTES]),
        Step(
            3,
            "order, expandable segments",
            15,
            ["bench.gpu.order", NOTES],
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        ),
        Step(4, "bandwidth", 40, ["bench.gpu.bandwidth", NOTES]),
        _training("350m", 35, *medium, *alone),
        *([] if pretend else [_training("1.3b", 55, *large, *alone)]),
        Step(6, "graphs", 15, ["bench.gpu.graphs", NOTES]),
    ]
    for ranks in sorted({2, gpus}) if gpus > 1 else ():
        words = [*(small if pretend else ["--seconds", "20"]), "--apart", "--ranks", str(ranks)]
        found.append(_training(f"350m-on-{ranks}", 60, *medium, *words, part=7))
    found.append(_training("350m-compiled", 50, *medium, *alone, *compiled, part=8))
    if not pretend:
        found.append(_training("1.3b-compiled", 50, *large, *alone, *compiled, part=8))
    return found


@dataclass(frozen=True)
class Outcome:
    """How a step went."""

    part: int
    step: str
    command: str
    environment: Mapping[str, str]
    status: str  # passed, failed, or out of time
    seconds: float
    limit: float
    findings: Sequence[Any]
    output: str  # the end of what it printed, if it did not pass or has no findings


def run(step: Step, limit: float, more: Sequence[str], *, pretend: bool) -> Outcome:
    """Run a step for at most so long; `more` goes to a step that writes records itself."""
    with tempfile.TemporaryDirectory() as folder:
        notes, printed = Path(folder, "notes"), Path(folder, "printed")
        words = [str(notes) if word == NOTES else word for word in step.words]
        if NOTES in step.words:
            at = words.index(str(notes)) + 1
            words[at:at] = ["--seconds", f"{limit:.0f}", *(["--pretend"] if pretend else [])]
        else:
            words += more
        # Without a network a host's name may lead nowhere.
        usual = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        usual["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # as of mics.init: all steps see the same schedule
        usual |= {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if pretend:
            usual["CUDA_VISIBLE_DEVICES"] = ""
        begun = time.monotonic()
        with printed.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", *words],
                cwd=ROOT,
                env=usual | dict(step.environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
        said = printed.read_text(errors="replace")
        found = findings(notes.read_text(errors="replace")) if notes.exists() else []
    ended = "out of time" if status is None else "passed" if status == 0 else "failed"
    kept = "" if status == 0 and NOTES in step.words else said[-LONGEST_OUTPUT:]
    return outcome(step, ended, time.monotonic() - begun, limit, found, kept)


def outcome(step: Step, status: str, seconds: float, limit: float, found: Sequence[Any], output: str) -> Outcome:
    """Of a step."""
    command = " ".join(["python", "-m", *step.words])
    return Outcome(step.part, step.name, command, step.environment, status, seconds, limit, found, output)


def findings(notes: str) -> list[Any]:
    """What a step wrote down; a line that is half written, as by a process that was killed, is left out."""
    found = []
    for line in notes.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it has started in its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # benchmarks and torchrun end their ranks then
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(FAREWELL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
