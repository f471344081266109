"""A pool of rank processes that live as long as the test session: torch is imported once, and tests send work to them.

The work is a function of a *_work.py beside the tests, which every rank imports by its name. `run` gives the results in
the order of ranks, `errors` the exceptions; keywords in capitals are environment variables of that one job:

    first, second = pool.run(2, work.gather, 3, LOCAL_WORLD_SIZE=1)

Both leave the pool usable whatever the ranks did: those that hang or died are replaced when the next job needs them.
"""

import itertools
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar
from unittest.mock import patch

from placing import Place, gpus_of, place
from rank_process import Job, Outcome, RankError, die_with_parent, serve

__all__ = ["Pool", "RankError"]

T = TypeVar("T")

PATIENCE = 300.0  # seconds until what is under way counts as hung, also where other work fills the machine
GRACE = 2.0  # seconds that the other ranks have once one has failed, and that leaving a group may take


class Worker:
    """One rank's process, seen from the tests."""

    def __init__(self, rank: int, gpu: str, stacks: Path) -> None:
        # A fork of a server that has imported torch takes 10 ms; macOS's frameworks do not survive a fork.
        context = get_context("spawn") if sys.platform == "darwin" else get_context("forkserver")
        self.stacks = stacks
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(rank, gpu, theirs, stacks), daemon=True, name=f"rank {rank}")
        self.process.start()
        theirs.close()

    def is_ready(self, seconds: float) -> bool:
        """Wait until a job can be sent."""
        with suppress(EOFError, OSError):
            return self.pipe.poll(seconds) and self.pipe.recv_bytes() == b"ready"
        return False

    def outcome(self) -> Outcome:
        """Read what the pipe has."""
        try:
            outcome: Outcome = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join(PATIENCE)  # the pipe is closed before there is an exit code
            # Others fail because this one died, so it comes before them.
            return Outcome("died", text=f"exit code {self.process.exitcode}", at=-math.inf)
        return outcome

    def stack(self) -> str:
        """Where each of its threads is now; kill it afterwards."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        while not self.stacks.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.02)  # the last line of one thread may not be the last of all
        threads = self.stacks.read_text().split("\n\n")
        return "\n\n".join(text for text in threads if die_with_parent.__name__ not in text) or "no stack was written\n"

    def close(self, seconds: float = 0.0) -> None:
        """End the process: gently, if it has a while for it."""
        self.pipe.close()
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        self.process.close()


class Pool:
    """Up to `size` workers, started when a job first needs them and again when they had to be killed.

    gpus: what ranks may compute on; where they are too few, ranks share them. Without `sharing`, and where `only_cpus`
        is set, other workers do it on the CPU.
    """

    def __init__(
        self, size: int = 8, patience: float = PATIENCE, gpus: Sequence[str] = (), *, sharing: bool = True
    ) -> None:
        self.size = size
        self.patience = patience
        self.gpus = gpus
        self.sharing = sharing
        self.only_cpus = False
        self.used: set[Place] = set()  # since somebody has cleared it
        self.workers: dict[tuple[str, int], Worker] = {}  # by their GPU, if any, and rank
        self.returned = True  # whether all ranks of the last job did, and will leave their group
        self.numbers = itertools.count()
        self.folder = TemporaryDirectory(prefix="mics-ranks-")
        if sys.platform != "darwin":
            # With threads the server must not fork; and each rank says for itself which GPU it sees.
            with patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
                # tests/kernels sets it in this process, or not, by which tests are collected; ranks are all alike.
                os.environ.pop("TRITON_INTERPRET", None)
                get_context("forkserver").set_forkserver_preload(
                    ["torch.distributed", "torch._dynamo", "pytest", "mics_core"]
                )
                forkserver.ensure_running()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, world: int, function: Callable[..., T], *args: Any, timeout: float | None = None, **env: str | int
    ) -> list[T]:
        """Each rank's `function(*args)`; a RankError if one of them fails, or is not back after `timeout` seconds."""
        timeout = self.patience if timeout is None else timeout
        outcomes = self._perform(world, function, args, timeout, min(GRACE, timeout), env)
        if any(outcome.state != "returned" for outcome in outcomes):
            raise RankError(_report(outcomes, timeout))
        return [pickle.loads(outcome.payload) for outcome in outcomes]

    def errors(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float | None = None, **env: str | int
    ) -> list[BaseException]:
        """The exception that each rank's `function(*args)` raised; a RankError if one of them did not raise."""
        timeout = self.patience if timeout is None else timeout
        outcomes = self._perform(world, function, args, timeout, timeout, env)
        if any(outcome.state != "raised" for outcome in outcomes):
            raise RankError(f"expected an exception on every rank: {_report(outcomes, timeout)}")
        errors: list[BaseException] = [pickle.loads(outcome.payload) for outcome in outcomes]
        for rank, (error, outcome) in enumerate(zip(errors, outcomes, strict=True)):
            error.add_note(f"on rank {rank}:\n{outcome.text}")
        return errors

    def place(self, world: int) -> Place:
        """Where so many ranks run."""
        return place(world, () if self.only_cpus else self.gpus, sharing=self.sharing)

    def close(self) -> None:
        """End every worker; the fork server ends with this process."""
        while self.workers:
            self.workers.popitem()[1].close(GRACE)
        self.folder.cleanup()

    def _perform(
        self,
        world: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float,
        grace: float,
        env: dict[str, str | int],
    ) -> list[Outcome]:
        if not 1 <= world <= self.size:
            raise ValueError(f"got {world} ranks, expected 1 to {self.size}")
        store = str(Path(self.folder.name, f"store-{next(self.numbers)}"))
        names = {name: str(value) for name, value in env.items()}
        at = self.place(world)
        self.used.add(at)
        keys = list(zip(gpus_of(world, self.gpus, at), range(world), strict=True))
        job = pickle.dumps(Job(world, pickle.dumps((function, args)), timeout, store, names, at))
        workers = self._ready(keys)
        outcomes: dict[int, Outcome] = {}
        pending: dict[Any, int] = {worker.pipe: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        try:
            for worker in workers:
                worker.pipe.send_bytes(job)
            while pending and (left := deadline - time.monotonic()) > 0:
                for pipe in connection.wait(list(pending), left):
                    outcome = outcomes[pending[pipe]] = workers[pending[pipe]].outcome()
                    del pending[pipe]
                    if outcome.state != "returned":
                        deadline = min(deadline, time.monotonic() + grace)
            outcomes |= {rank: Outcome("hung", text=workers[rank].stack()) for rank in pending.values()}
        finally:  # after Ctrl-C, too, those that are still at work must go
            failed = pending or any(outcome.state != "returned" for outcome in outcomes.values())
            for rank, key in enumerate(keys):
                # A stream may wait for a transfer that never came, and torch would give it to a later job.
                stuck = failed and at is Place.SHARED
                if stuck or rank in pending.values() or outcomes[rank].state == "died":
                    self.workers.pop(key).close()
                else:
                    with suppress(BrokenPipeError):  # it died meanwhile, and will be missed by the next job
                        workers[rank].pipe.send_bytes(b"release")
        self.returned = all(outcome.state == "returned" for outcome in outcomes.values())
        return [outcomes[rank] for rank in range(world)]

    def _ready(self, keys: Sequence[tuple[str, int]]) -> list[Worker]:
        """Workers that have left their last job's group; new ones for those that did not manage to."""
        deadline = time.monotonic() + (PATIENCE if self.returned else GRACE)
        for key in keys:
            if key in self.workers and not self.workers[key].is_ready(max(0.0, deadline - time.monotonic())):
                self.workers.pop(key).close()
        new = [key for key in keys if key not in self.workers]
        for gpu, rank in new:  # all of them before the first is waited for
            self.workers[gpu, rank] = Worker(rank, gpu, Path(self.folder.name, f"stacks-{next(self.numbers)}"))
        for key in new:
            if not self.workers[key].is_ready(PATIENCE):
                self.workers.pop(key).close()
                raise RankError(f"the process of rank {key[1]} does not start: its output may say why")
        return [self.workers[key] for key in keys]


def _report(outcomes: list[Outcome], timeout: float) -> str:
    """The first failure in full, what became of the other ranks, and where those are that hang."""
    said = [f"rank {rank} {outcome.state}" for rank, outcome in enumerate(outcomes)]
    first = min(range(len(outcomes)), key=lambda rank: outcomes[rank].at)
    if outcomes[first].at < math.inf:
        head = f"rank {first} {outcomes[first].state} first: {outcomes[first].text}"
    elif any(outcome.state == "hung" for outcome in outcomes):
        head = f"not every rank was back after {timeout:g} s"
    else:
        head = "no rank raised"
    for rank, outcome in enumerate(outcomes):
        if outcome.state in ("raised", "died"):
            said[rank] += f" ({outcome.text.strip().splitlines()[-1]})"
    hung = [(rank, outcome.text) for rank, outcome in enumerate(outcomes) if outcome.state == "hung"]
    stacks = [f"rank {rank} hung, and was killed, at:\n{text}" for rank, text in hung]
    return "\n".join([head, ", ".join(said), *stacks])
