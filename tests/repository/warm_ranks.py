"""Ranks that start at once: forks of one process, which has imported the pretraining program.

As users start them, each rank and its launcher import torch, which takes longer than all that these tests do.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
PATIENCE = 600  # seconds, after which a rank is killed


@dataclass(frozen=True)
class Done:
    """What became of a run."""

    statuses: list[int]  # of each rank's process
    stdout: str  # of all ranks
    stderr: str


class WarmRanks:
    """Inside `with`, a process that forks ranks; one run at a time."""

    def __enter__(self) -> WarmRanks:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=PATIENCE)

    def run(self, *ranks: Sequence[str], program: str = "pretrain", deadly: str = "") -> Done:
        """Run the program with these command lines, one for each rank; alone it is plain python."""
        self.start(*ranks, program=program, deadly=deadly)
        return self.wait()

    def start(
        self,
        *ranks: Sequence[str],
        program: str = "pretrain",
        gate: tuple[int, str] | None = None,
        deadly: str = "",
    ) -> list[int]:
        """Begin a run that does not take the step of this number until the file of this name is there; the process of
        each rank. In the function of the name `deadly`, "module:name", the last rank is killed.
        """
        self._folder = tempfile.TemporaryDirectory()
        asked = {"folder": self._folder.name, "ranks": ranks, "program": program, "gate": gate, "deadly": deadly}
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        pids: list[int] = self._hear()
        return pids

    def wait(self) -> Done:
        """The end of the run that was started last."""
        statuses = self._hear()
        with self._folder as folder:
            stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        return Done(statuses, stdout, stderr)

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Fork what each line of the input asks for; tell the processes, and then how they ended."""
    import torch

    import mics_models.generate
    import mics_models.pretrain  # noqa: F401 - for the ranks

    torch.empty(1, device="meta").normal_()  # brings in what torch imports on its first use
    for line in sys.stdin:
        asked = json.loads(line)
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        pids = []
        for rank in range(len(asked["ranks"])):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, port, asked)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def _be_rank(rank: int, port: int, asked: dict[str, Any]) -> None:
    from mics_models import generate, pretrain

    signal.alarm(PATIENCE)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{asked['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if (world := len(asked["ranks"])) > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    if asked["gate"]:
        shut, file = asked["gate"]
        step = pretrain.Training.step

        def gated(training: Any, number: int) -> Any:
            while number == shut and not Path(file).exists():
                time.sleep(0.01)
            return step(training, number)

        pretrain.Training.step = gated  # type: ignore[method-assign]
    if asked["deadly"] and rank == world - 1:
        module, _, name = asked["deadly"].partition(":")
        within, _, last = name.rpartition(".")
        owner = pkgutil.resolve_name(f"{module}:{within}") if within else importlib.import_module(module)
        setattr(owner, last, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    status = 70
    try:
        status = {"pretrain": pretrain, "generate": generate}[asked["program"]].main(asked["ranks"][rank])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        pretrain.leave(status)


if __name__ == "__main__":
    serve()
