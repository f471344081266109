"""The ranks that train together: how they join, what they say to each other, groups and lanes for their states."""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mics_core.comm import placement
from mics_core.comm.counters import Counters
from mics_core.comm.first_cause import absentees, blamed, remember_store
from mics_core.comm.groups import DeviceGroup, Group, HostGroup, Membership, silent
from mics_core.comm.lanes import DONE, Lane, lane
from mics_core.comm.launched import end_with_the_launcher, make_room_for_connections
from mics_core.comm.meeting import meet
from mics_core.comm.questions import Answers, find_largest
from mics_core.comm.staged import CudaDriver, StagedGroup, Staging
from mics_core.errors import ConfigError, LifecycleError

ProcessGroup = dist.ProcessGroup

_CPU = torch.device("cpu")
_PATIENCE = timedelta(minutes=10)
# torch 2.11 sorts the ranks of every group, and has no word for it.
_AS_LISTED: dict[str, Any] = {"sort_ranks": False} if "sort_ranks" in signature(dist.new_group).parameters else {}
_met = False  # whether `init` made this world, in a part of the store that is its own
_timeout: tuple[object, timedelta] = (None, _PATIENCE)  # for groups made later in this world; torch has one of its own


def init(timeout: timedelta = _PATIENCE) -> torch.device:
    """Join the ranks that `torchrun` started, and return this rank's device.

    With GPUs that is one of this host's by LOCAL_RANK, and NCCL, else the CPU and gloo. Ranks that outnumber the GPUs
    share them, all alike, and what travels goes through the hosts' memory: slow, and good for tests. In a plain
    `python` process there is a world of one rank. Call it once, first. A collective that takes longer than `timeout`
    raises an error, and so does a save or a load in which a rank's disk does nothing for about as long, however long it
    takes while it goes on. On Linux, ranks of torchrun are killed when it is gone.
    """
    global _met, _timeout
    if not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
        raise ConfigError(f"init: timeout is {timeout!r}, expected a timedelta above 0, such as timedelta(minutes=10)")
    end_with_the_launcher()
    # Read when CUDA starts. Computation, lanes and NCCL are more streams than 8 queues; in one queue they wait in line.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    device = _CPU
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        start = meet(store, rank, world, make_room_for_connections(rank, world), timeout, placement.place(device))
        # gloo beside NCCL: what hosts agree on must not wait for a device.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and not start.shared else "gloo"
        dist.init_process_group(backend, store=start.store, rank=rank, world_size=world, timeout=timeout)
        _met = True
        if start.shared and rank == 0:
            print(
                "init: ranks share GPUs, so what travels goes through the hosts' memory by gloo, which is for tests: "
                "start one rank for each GPU to use NCCL",
                file=sys.stderr,
                flush=True,
            )
    elif _timeout[0] is not dist.group.WORLD:
        _met = False
    _timeout = (dist.group.WORLD, timeout)
    if dist.is_initialized():
        _remember_store()
    return device


def leave() -> None:
    """Destroy all process groups; nothing of them may be in use.

    A group's threads end when nobody holds it any more. One that lets go of its last message's memory while Python is
    taken apart aborts the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget_old_world()


class World:
    """The ranks that train one model together: all of them, or those of a caller's data-parallel group."""

    _per_gpu = 0  # ranks, on the fullest GPU; 0 where none share one

    def __init__(self, group: ProcessGroup | None) -> None:
        if not isinstance(group, ProcessGroup | None):
            raise ConfigError(
                f"shard: group is {group!r}, expected a process group of torch.distributed that holds this rank, or "
                "None for all ranks: make one with new_group, or take a DeviceMesh's by get_group"
            )
        if group is None and "RANK" in os.environ and not dist.is_initialized():
            raise LifecycleError("shard: torchrun's RANK is set but no process group exists: call mics.init() first")
        self._single = not dist.is_initialized()
        if not self._single:
            _remember_store()
        self.whole = group is None
        self._questions = "questions"  # the lane of what this world asks
        self.ranks: tuple[int, ...] = (0,) if self._single else tuple(dist.get_process_group_ranks(group))
        self.rank = 0 if self._single else dist.get_rank(group)
        self.size = len(self.ranks)
        if not _AS_LISTED and list(self.ranks) != sorted(self.ranks):
            raise ConfigError(
                f"shard: the group has the ranks {list(self.ranks)}, expected them in ascending order by this version "
                "of torch, which sorts those of groups within it: list them so, or use a later one"
            )
        bound = None if self._single else dist.distributed_c10d._get_default_group().bound_device_id
        if bound is not None and 1 < self.size < dist.get_world_size():
            raise ConfigError(
                f"shard: the group has {self.size} of {dist.get_world_size()} ranks, and the default process group is "
                f"bound to {bound}, with which torch makes each group on all ranks: leave device_id out of "
                "init_process_group, as mics.init does"
            )
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self.streams: Any = torch.cuda if self.device.type == "cuda" else None
        """Where the computation's stream is asked for; None if there are no streams."""
        self._staging: Staging | None = None
        if self.size > 1:
            places = _count_groups_alike(group, placement.place(self.device))
            if dist.get_backend() != "fake" and placement.shared(places, self.ranks):
                self._per_gpu = max(Counter(places).values())
                self._staging = _staging_of(self.device)
            self._control = self._control_group(self.ranks, "control")

    def all_gather_object(self, mine: object, what: str) -> list[Any]:
        """What every rank says here, in the order of ranks; small objects only. `what` it is about, for errors."""
        if self.size == 1:
            return [mine]
        return _all_gather_object(self._control, self.ranks, mine, what)

    def max_async(self, mine: Sequence[int], what: str) -> Answers:
        """Begin to find the largest of all ranks' numbers, each from 0 to 255; nothing waits until it is read."""
        with torch.inference_mode(False):  # a lane, where no mode of the caller's holds, writes to them
            numbers = torch.tensor(mine, dtype=torch.uint8, device=_CPU)
        if self.size == 1 or not numbers.numel():
            return Answers(numbers, DONE)
        job = partial(find_largest, self._control, self.ranks, self.rank, numbers, what)
        return Answers(numbers, self._lane(self._questions, _CPU).submit(what, job))

    def broadcast(self, flat: torch.Tensor) -> None:
        """Overwrite everyone's buffer with rank 0's."""
        if self.size > 1:
            pass_on = flat.cpu().view(-1).view(torch.uint8)  # any dtype travels as bytes
            try:
                dist.broadcast(pass_on, group_src=0, group=self._control)
            except RuntimeError as error:
                raise blamed("shard: taking rank 0's weights", error) from error
            flat.copy_(pass_on.view(flat.dtype).view(flat.shape))

    @property
    def timeout(self) -> float:
        """Seconds that ranks wait for each other, as `init` was told."""
        return _patience().total_seconds()

    def with_own_group(self, name: str) -> World:
        """The same ranks, for another thread to talk to: what two threads say in one group gets mixed."""
        twin = copy.copy(self)
        if self.size > 1:
            _count_groups_alike(self._control)
            twin._control = self._control_group(self.ranks, name)
        return twin

    def among(self, members: Sequence[int], name: str) -> World:
        """Some of these ranks, for questions of their own; all of them must ask for it, in the same order of groups."""
        part = copy.copy(self)
        part.ranks = tuple(self.ranks[member] for member in members)
        part.rank, part.size = members.index(self.rank), len(members)
        part._questions = name
        if part.size > 1:
            part._control = self._control_group(part.ranks, name)
        return part

    def lane(self, name: str, *, urgent: bool = False) -> Lane:
        """The lane of this name."""
        if self._staging is not None:
            return self._staging.lane(name, urgent=urgent)
        return self._lane(name, self.device, urgent=urgent)

    def group(self, members: Sequence[int], name: str) -> Group:
        """The group of these members of this world; all of them must ask for it, in the same order of groups."""
        ranks = tuple(self.ranks[member] for member in members)
        membership = Membership(ranks, members.index(self.rank), name)
        if self._staging is not None:
            return StagedGroup(membership, self._subgroup(ranks, name, "gloo"), self._staging)
        if self.device.type == "cuda":
            return DeviceGroup(membership, self._subgroup(ranks, name, "nccl"))
        return HostGroup(membership, self._subgroup(ranks, name, "gloo"))

    def sharing(self, ranks_per_node: int) -> int:
        """How many ranks share a GPU, or without GPUs a machine; the most that do."""
        return self._per_gpu or (min(ranks_per_node, self.size) if self.device.type == "cpu" else 1)

    def counters(self) -> Counters:
        """For what a model's transfers move."""
        return Counters(self.device)

    def _control_group(self, ranks: tuple[int, ...], name: str) -> Any:
        """For what hosts say to each other."""
        return self._subgroup(ranks, name, "gloo")

    def _lane(self, name: str, device: torch.device, *, urgent: bool = False) -> Lane:
        _forget_old_world()
        if (name, device) not in _lanes:
            _lanes[name, device] = lane(f"mics {name}", device, urgent=urgent)
        return _lanes[name, device]

    def _subgroup(self, ranks: tuple[int, ...], name: str, backend: str) -> ProcessGroup:
        """A process group for one purpose."""
        _forget_old_world()
        key = (self.ranks, ranks, name)
        if key not in _subgroups:
            try:
                _subgroups[key] = dist.new_group(
                    list(ranks),
                    timeout=_patience(),
                    backend=dist.get_backend() if dist.get_backend() == "fake" else backend,
                    use_local_synchronization=True,  # only members take part: a caller's groups can each have a model
                    group_desc=f"mics {name}",
                    **_AS_LISTED,
                )
            except RuntimeError as error:
                raise blamed(f"connecting ranks for {name}", error) from error
        return _subgroups[key]


# Shared by the models of a world: a group costs sockets or GPU memory. What a group carries is told apart by its order
# alone, so a group belongs to one lane, and a lane is one queue for all models.
_subgroups: dict[tuple[tuple[int, ...], tuple[int, ...], str], ProcessGroup] = {}
_lanes: dict[tuple[str, torch.device], Lane] = {}
_stagings: dict[torch.device, Staging] = {}
_meetings: Counter[str] = Counter()  # how often the ranks of a group have told each other something, by its name
_parent: ProcessGroup | None = None  # the world that these are for


def _patience() -> timedelta:
    return _timeout[1] if _timeout[0] is dist.group.WORLD else _PATIENCE


def _forget_old_world() -> None:
    global _parent
    if dist.group.WORLD is not _parent:  # it was destroyed
        _subgroups.clear()
        _lanes.clear()
        for staging in _stagings.values():
            staging.lanes.clear()
        _stagings.clear()
        _meetings.clear()
        _parent = dist.group.WORLD


def _remember_store() -> None:
    remember_store(new=_timeout[0] is dist.group.WORLD and _met)


def hear_all(mine: object, what: str) -> list[Any]:
    """What every rank of the whole world says here, in their order, though no model is sharded yet; small objects."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return [mine] if size == 1 else _all_gather_object(None, range(size), mine, what)


@contextmanager
def hearing(what: str, group: ProcessGroup | None, ranks: Sequence[int]) -> Iterator[None]:
    """Inside, all ranks of a group wait for each other: if that fails, LostRank says which of them is missing."""
    _forget_old_world()
    name = str((group or dist.distributed_c10d._get_default_group()).group_name)
    _meetings[name] += 1
    try:
        yield
    except RuntimeError as error:
        absent = absentees(f"{name} {_meetings[name]}", ranks)
        if absent is not None:
            one, number = absent
            others = f" and {number - 1} others" if number > 1 else ""
            raise blamed(f"{what}: hearing all ranks", silent("nothing came from", one, others, error)) from error
        raise blamed(f"{what}: hearing all ranks", error) from error


def _all_gather_object(group: ProcessGroup | None, ranks: Sequence[int], mine: object, what: str) -> list[Any]:
    """What every rank of the group says, all of them about the same."""
    everyone: list[Any] = [None] * len(ranks)
    with hearing(what, group, ranks):
        dist.all_gather_object(everyone, (what, mine), group=group)
    (first, _), *_ = everyone
    for rank, (theirs, _) in zip(ranks, everyone, strict=True):
        if theirs != first:
            raise LifecycleError(
                f"ranks meet in different calls: {first} on rank {ranks[0]} and {theirs} on rank {rank}: make the same "
                "calls, in the same order, on all ranks"
            )
    return [said for _, said in everyone]


def _staging_of(device: torch.device) -> Staging:
    _forget_old_world()
    if device not in _stagings:
        _stagings[device] = Staging(CudaDriver(device))
    return _stagings[device]


def _count_groups_alike(group: ProcessGroup | None, place: str = "") -> list[str]:
    """Make all ranks members of equally many groups; where they all are, as they say.

    torch names a group that only its members make by its ranks and by how many groups the rank is in already; members
    that disagree about the name wait for each other. So ranks that are in fewer groups make some of their own.
    """
    mine = len(dist.distributed_c10d._world.pg_names)
    said = _all_gather_object(group, dist.get_process_group_ranks(group), (mine, place), "shard, save or load")
    for _ in range(max(count for count, _ in said) - mine):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return [at for _, at in said]
