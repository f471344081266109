"""`save`: what is collected, copied, written by all ranks, and published by rank 0."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mics_core import registry
from mics_core.checkpoint import model_state, optimizer_state
from mics_core.checkpoint.agreed import on_all_ranks, together
from mics_core.checkpoint.at_disk import Task
from mics_core.checkpoint.contents import Contents, Name
from mics_core.checkpoint.folder import Place, path_of
from mics_core.checkpoint.host_memory import copies
from mics_core.checkpoint.manifest import INDEX, Manifest
from mics_core.checkpoint.plain import digest, packed
from mics_core.checkpoint.random_numbers import random_state
from mics_core.checkpoint.runs import runs_of
from mics_core.checkpoint.writing import Written, write, write_index
from mics_core.comm.world import World
from mics_core.errors import ConfigError, LifecycleError
from mics_core.registry import Runtime
from mics_core.spec.topology import Rungs

EXTRA = Name(("extra",))


class Saving:
    """A save, which may be under way."""

    def __init__(self, job: _Job, world: World, *, background: bool) -> None:
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if not background:
            job.run(world)
            return
        # Not a daemon: a process that ends lets its last save end first.
        self._thread = threading.Thread(target=self._work, args=(job, world), name="mics save")
        self._thread.start()

    def wait(self) -> None:
        """Return when the checkpoint is complete; raise if it is not going to be, the same on every rank."""
        if self._thread is not None:
            self._thread.join()
        _forget(self)
        if self._error is not None:
            raise self._error

    def _work(self, job: _Job, world: World) -> None:
        try:
            if world.device.type == "cuda":
                torch.cuda.set_device(world.device)  # which each thread has of its own
            job.run(world)
        except Exception as error:  # handed to whoever waits, and the next save does
            self._error = error


_under_way: list[Saving] = []
_turn = threading.Lock()  # of what changes folders: nothing writes beside a thread that hangs, and may go on


def _forget(saving: Saving) -> None:
    if saving in _under_way:
        _under_way.remove(saving)


@atexit.register
def wait_for_saves() -> None:
    """Let all saves that are under way come to their end; a failure that nobody has heard of is raised."""
    while _under_way:
        _under_way[0].wait()


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    background: bool = False,
    keep: int | None = None,
    **extra: Any,
) -> Saving:
    """Write a checkpoint that any sharding, number of ranks and precision can load; call it on every rank.

    `path` becomes a directory of the checkpoint's own, such as runs/step-100, on a disk that all ranks share; a
    checkpoint that was there is replaced. It appears when it is complete, and then the file `latest` beside it names
    it: who is killed at any moment can load the one before. Ranks that hold the same bytes share the writing.

    It holds the master weights (with `between_nodes` also those that forwards compute with, which follow their masters
    in eight bits), frozen parameters and persistent buffers (each rank's, where they differ), the optimizer's state,
    the float16 loss scale, the state of torch's, Python's and numpy's random numbers on every rank, and `extra`, such
    as `scheduler=scheduler.state_dict()`: tensors, numbers, texts, bytes, and lists, tuples, sets and dictionaries of
    them, which loading reads without running code. numpy's numbers become Python's; anything else raises. `extra` is
    the same on all ranks, or None on those where rank 0's is meant: slices of parameters are not, so for an average of
    weights copy the model before mics.shard, shard both, and save the copy to a path of its own. It holds no gradients,
    so call it after the step.

    background: copy what this rank writes to host memory, which it keeps for the next such save, and return while a
        thread writes it. The next save waits for it, and so does the end of the process. A failure is raised by the
        next save, or by `wait()` of what this returns: call it at the end, because a process that ends can only print
        it.
    keep: once it is complete, remove all but so many of the newest checkpoints beside it that are of this run, or of
        one that it was loaded from. A run is what becomes of a model after mics.shard: other trainings in the folder
        lose nothing, and neither does a training that began anew. What cannot be removed is a warning in every save.

    A save may take hours while each rank's disk goes on. A rank whose disk answers nothing for about the timeout of
    `init` is named by an error on all ranks; the checkpoints from before are as they were.

    Other tools read it as a torch.distributed.checkpoint: `python -m torch.distributed.checkpoint.format_utils
    dcp_to_torch DIRECTORY FILE` makes one file for torch.load of it, with the model's state dict under "model".
    """
    runtime = registry.runtime_of(model, "save")
    world, rungs = runtime.world.with_own_group("checkpoint"), runtime.ladder.rungs
    contents: list[Contents] = []

    def collect() -> _Told:
        runtime.lifecycle.require_rest("save")
        wait_for_saves()
        runtime.lifecycle.bring_what_users_wrote()  # or weights that forwards compute with would be those from before
        runtime.wait()
        place = Place(path_of(path, "save").absolute())
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ConfigError(f"save: keep is {keep!r}, expected a count from 1 up: the new checkpoint counts")
        _check_gradients(runtime)
        found = _collect(runtime, model, optimizer, extra)
        if background:
            found = found.staged(rungs.piece_number(world.rank, world.size), world.size, partial(copies, runtime))
        contents.append(found)
        hashed = model_state.hash_of(model_state.buffers(model, "save"))
        settings = {} if optimizer is None else optimizer_state.digests(optimizer)
        digests = {name: digest(value) for name, value in extra.items() if value is not None}
        return _Told((str(place.path), keep, background), hashed, settings, digests)

    told = on_all_ranks(world, "save", collect)
    _check_alike(told, world.ranks)

    def plan() -> _Job:
        own = {"random": random_state(runtime.world.device), "buffers": {}}
        if len({each.buffers for each in told}) > 1:
            own["buffers"] = model_state.buffers(model, "save")
        about = _about(runtime, optimizer, contents[0], sorted(extra))
        written = replace(contents[0], own=packed(own, "this rank's state"))
        return _Job(Place(Path(path).absolute()), written, rungs, world.rank, keep, about)

    job = together(world, "save", plan)
    job.prepare(world)
    saving = Saving(job, world, background=background)
    if background:
        _under_way.append(saving)
    return saving


@dataclass(frozen=True)
class _Job:
    """What is left to do when all is collected. Rank 0 claims the folder from `prepare` to the end of `run`."""

    place: Place
    contents: Contents
    rungs: Rungs
    rank: int
    keep: int | None
    about: dict[str, Any]
    claim: ExitStack = field(default_factory=ExitStack)

    def prepare(self, world: World) -> None:
        """Make room for what will be written."""
        with self._left_if_it_fails(world, begun=False):
            together(world, "save", self._prepare, "making room in the folder")

    def run(self, world: World) -> None:
        """Write, and publish when all ranks have."""
        with self._left_if_it_fails(world, begun=True):
            written = on_all_ranks(world, "save", self._write, "writing its part")
            together(world, "save", partial(self._publish, written), "publishing the checkpoint")
            together(world, "save", self._tidy, "removing what is old")

    @contextmanager
    def _left_if_it_fails(self, world: World, *, begun: bool) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C, too: its traceback may keep the claim for as long as anybody looks at it
            if self.rank == 0:
                # In a thread: a disk that hangs must not keep the failure from the caller.
                Task(partial(self._leave, begun)).wait(world.timeout / 3)
            raise

    def _leave(self, begun: bool) -> None:
        with _turn, self.claim:  # no other save comes to the folder before what hangs has gone on
            if begun:  # else what is there may be another process's
                self.place.abandon()

    def _prepare(self) -> None:
        if self.rank == 0:
            with _turn:
                self.claim.enter_context(self.place.claimed())
                self.place.prepare()

    def _write(self) -> Written:
        with _turn:
            return write(self.place.temporary, self.contents, self.rank, self.rungs)

    def _publish(self, written: list[Written]) -> None:
        if self.rank == 0:
            with _turn:
                self._make_complete(written)

    def _tidy(self) -> None:
        with _turn, self.claim:
            if self.rank == 0:
                self.place.tidy(self.keep, self.about["runs"])

    def _make_complete(self, written: list[Written]) -> None:
        files = {each.name: each.entry for each in written}
        for name, entry in files.items():
            file = self.place.temporary / name
            if not file.is_file() or file.stat().st_size != entry.bytes:
                raise ConfigError(
                    f"save: {file} is not what its rank has written, expected all ranks to share the disk: choose a "
                    "path that they share"
                )
        files[INDEX] = write_index(self.place.temporary, self.contents, self.rungs, written)
        self.place.publish(Manifest(self.place.next_number(), files, self.about))


@dataclass(frozen=True)
class _Told:
    """What ranks tell each other before a save."""

    request: tuple[str, int | None, bool]
    buffers: bytes
    settings: dict[str, str]
    extra: dict[str, str]


def _check_alike(told: list[_Told], ranks: Sequence[int]) -> None:
    """Raise, on all ranks alike, unless all asked for the same, and where rank 0's is saved all have the same."""
    first = told[0]
    optimizer_state.check_passed("save", [bool(theirs.settings) for theirs in told], ranks)
    for rank, theirs in zip(ranks, told, strict=True):
        if theirs.request != first.request:
            raise ConfigError(
                f"save: path, keep and background are {theirs.request} on rank {rank} and {first.request} on rank "
                f"{ranks[0]}: ask alike everywhere"
            )
        apart = f"is not the same on rank {rank} as on rank {ranks[0]}, which alone is saved, expected it alike on all"
        for name in sorted(theirs.settings.keys() | first.settings.keys()):
            if theirs.settings.get(name) != first.settings.get(name):
                raise ConfigError(f"save: {name} {apart} ranks: give all ranks' optimizers the same settings")
        for name in sorted(theirs.extra):
            if theirs.extra[name] != first.extra.get(name):
                raise ConfigError(
                    f"save: {name} {apart} ranks: pass {name}=None on the others if rank {ranks[0]}'s is meant, a list "
                    "of all ranks' if each is needed; for slices of parameters copy the model before mics.shard, shard "
                    "both, and save the copy to a path of its own"
                )


def _check_gradients(runtime: Runtime) -> None:
    waiting = runtime.reducer.unstepped()
    if waiting:
        raise LifecycleError(
            f"save: {waiting[0]} has gradients that no step has used, and a checkpoint holds none: save after "
            "optimizer.step(), or drop them with zero_grad()"
        )


def _collect(runtime: Runtime, model: nn.Module, optimizer: Optimizer | None, extra: dict[str, Any]) -> Contents:
    weights = model_state.weights(runtime)
    cuts = [*weights.values(), *model_state.shown(runtime).values()]
    wholes = {Name(("model", name)): buffer for name, buffer in model_state.buffers(model, "save").items()}
    objects = {EXTRA: packed(extra, "extra")}
    numbers: frozenset[str] = frozenset()
    if optimizer is not None:
        state = optimizer_state.collect(runtime, optimizer, weights)
        cuts += state.cuts
        wholes |= state.wholes
        numbers = state.numbers
        objects[optimizer_state.GROUPS] = packed(state.groups, str(optimizer_state.GROUPS))
    return Contents(tuple(cuts), wholes, objects, model_state.aliases(model), numbers)


def _about(runtime: Runtime, optimizer: Optimizer | None, contents: Contents, extra: list[str]) -> dict[str, Any]:
    precision, scaling = runtime.precision, runtime.scaling
    return {
        "ranks": runtime.world.size,
        "ranks_per_node": runtime.ladder.rungs.topology.ranks_per_node,
        "sharding": asdict(runtime.sharding),
        "precision": {name: str(getattr(precision, name)) for name in ("compute", "reduce", "master")},
        "loss_scale": None if scaling is None else scaling.state(),
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "single_numbers": sorted({name.keys[-1] for name in contents.wholes if name.keys[0] == "optimizer"}),
        "python_numbers": sorted(contents.numbers),
        "extra": extra,
        "runs": runs_of(runtime),
        "torch": str(torch.__version__),
    }
