"""One rank's process: it serves one job after the other, each in a fresh default process group."""

import faulthandler
import gc
import io
import math
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import mics_core as mics
from placing import Place

LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class RankError(Exception):
    """What ranks did instead of what was asked of them."""


@dataclass(frozen=True)
class Outcome:
    """How one rank's work ended."""

    state: str  # returned, raised, died or hung
    payload: bytes = b""  # the result or the exception, pickled
    text: str = ""  # the traceback, the exit code or the stack
    at: float = math.inf  # the time of a failure; all processes of a machine share the clock


@dataclass(frozen=True)
class Job:
    """The same for every rank, so it is pickled once."""

    world: int
    work: bytes  # pickled apart: what fails to be imported is the rank's failure, and names its module
    timeout: float
    store: str
    env: dict[str, str]
    place: Place = Place.CPU
    path: list[str] = field(default_factory=lambda: list(sys.path))  # a module is found here as pytest found it
    filters: list[tuple[Any, ...]] = field(default_factory=lambda: list(warnings.filters))  # pytest's, for this test

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set, on nodes of LOCAL_WORLD_SIZE ranks; a rank sees no GPU but its own."""
        local = int(self.env.get("LOCAL_WORLD_SIZE", self.world))
        ours: dict[str, object] = {
            "RANK": rank,
            "WORLD_SIZE": self.world,
            "LOCAL_RANK": rank % local if self.place is Place.CPU else 0,
            "LOCAL_WORLD_SIZE": local,
            "GROUP_RANK": rank // local,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
            "OMP_NUM_THREADS": 1,
        }
        if sys.platform in LOOPBACK:
            ours["GLOO_SOCKET_IFNAME"] = ours["NCCL_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
        if sys.platform == "linux":
            ours["TORCH_GLOO_LAZY_INIT"] = 1  # connects on first use: a group of 8 costs 50 ms rather than 105 ms
        return {name: str(value) for name, value in ours.items()} | self.env

    def perform(self, rank: int) -> Outcome:
        """The work, in a fresh default group and in a state that no other job has touched."""
        sys.path[:] = self.path
        _warn_like(self.filters)
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.manual_seed(0)
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        try:
            # The group waits longer than the pool does, which can say where each rank hangs.
            limit = timedelta(seconds=self.timeout + 60)
            store = dist.FileStore(self.store, self.world)
            nccl = self.place is Place.GPU and torch.cuda.is_available()
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"  # as mics.init chooses
            dist.init_process_group(backend, store=store, rank=rank, world_size=self.world, timeout=limit)
            if self.place is not Place.CPU:
                _compute_on(mics.init())
            function, args = pickle.loads(self.work)
            return Outcome("returned", _from_any_device(function(*args)))
        except BaseException as error:  # also pytest.skip, and a SystemExit, which must not end the worker
            return Outcome("raised", _portable(error), traceback.format_exc(), time.monotonic())


def _compute_on(device: torch.device) -> None:
    """Make tensors there if a job names no device, and compute as exactly as on a CPU, and the same in every run."""
    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


class _Pickler(pickle.Pickler):
    """Brings tensors to the CPU, where the tests are."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor) and thing.device.type == "cuda":
            return thing.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _from_any_device(result: Any) -> bytes:
    data = io.BytesIO()
    _Pickler(data).dump(result)
    return data.getvalue()


def _warn_like(filters: list[tuple[Any, ...]]) -> None:
    """Set the filters of another process."""
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        # Patterns for the two that filterwarnings compiled; Python's own name a module by a plain string.
        said = getattr(message, "pattern", message) or ""
        where = getattr(module, "pattern", re.escape(module) + r"\Z" if isinstance(module, str) else "")
        warnings.filterwarnings(action, said, category, where, line)


def _portable(error: BaseException) -> bytes:
    """The pickled exception, or a RankError of its text if it does not survive that."""
    with suppress(Exception):
        data = pickle.dumps(error)
        if type(pickle.loads(data)) is type(error):
            return data
    return pickle.dumps(RankError(f"{type(error).__qualname__}: {error}"))


def die_with_parent() -> None:
    # The end of the pipe is enough between jobs, but a rank that hangs does not look at it.
    parent = parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os._exit(1)


def serve(rank: int, gpu: str, pipe: Connection, stacks: Path) -> None:
    """A worker's life: ready, job, outcome, release and again; it ends with its pipe."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used, which no import does
    threading.Thread(target=die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; pytest deals with it
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    gc.freeze()  # what is imported already need not be searched after every job
    with stacks.open("w") as file, suppress(EOFError, ConnectionError):
        faulthandler.register(signal.SIGUSR1, file)
        while True:
            pipe.send_bytes(b"ready")
            job: Job = pickle.loads(pipe.recv_bytes())
            with patch.dict(os.environ, job.environment(rank)):
                with warnings.catch_warnings():
                    outcome = job.perform(rank)
                pipe.send_bytes(pickle.dumps(outcome))
                pipe.recv_bytes()  # all ranks are done: a group that is left early breaks the others' collectives
                if dist.is_initialized():
                    dist.destroy_process_group()
            gc.collect()
            gc.freeze()  # what this job has imported need not be searched after the next ones
