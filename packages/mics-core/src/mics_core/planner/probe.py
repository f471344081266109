"""Measuring a cluster: what links, arithmetic and memory give, by the collectives that the runtime uses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mics_core.comm.groups import Group
from mics_core.comm.placement import node_name, rank_memory, ranks_per_node
from mics_core.comm.world import World, init
from mics_core.errors import ConfigError
from mics_core.planner.cluster import Cluster, Link, Table, Transport
from mics_core.planner.progress import Progress
from mics_core.planner.this_machine import USABLE

EFFICIENCY = 0.55
"""A guess: no probe can know which share of the peak a model's arithmetic reaches."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Effort:
    sizes: tuple[int, ...]  # bytes that a rank sends in a collective
    rounds: int  # of which the fastest counts
    matrix: int  # rows and columns
    memory: int  # bytes that are copied


_QUICK = _Effort((1 << 12, 1 << 18), 2, 256, 1 << 22)
_WHOLE = _Effort(tuple(1 << power for power in range(12, 29, 2)), 5, 8192, 1 << 30)
_WHOLE_CPU = _Effort(tuple(1 << power for power in range(12, 25, 2)), 5, 1024, 1 << 27)


def probe(path: Path, *, quick: bool = False) -> Cluster:
    """Measure the cluster that torchrun started this process on, and let rank 0 write it to a TOML file.

    Every rank calls it. Collectives run in groups of several sizes inside nodes, and between nodes with all ranks of a
    node side by side, as the runtime's do. The fastest of a few rounds counts, and of the ranks the slowest.
    """
    if path.suffix != ".toml":
        raise ConfigError(f"probe: the file is {path}, expected a name such as cluster.toml: plans tell it by its end")
    device = init()
    world = World(None)
    writable = not path.is_dir() and os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    _check_written(path, None if writable else "no such folder, or no permission", world)  # before minutes of work
    per_node = min(ranks_per_node(world.all_gather_object(node_name(), "probe"), whole_world=True), world.size)
    effort = _QUICK if quick else _WHOLE if device.type == "cuda" else _WHOLE_CPU
    groups = [*_inside(per_node), *_between(world.size // per_node)]
    with Progress(3 * len(groups) * len(effort.sizes) + 3, speaks=world.rank == 0) as progress:
        prober = _Prober(world, per_node, effort, progress)
        flops = prober.arithmetic()
        bandwidth = prober.memory_bandwidth()
        intra = prober.link([prober.group(ranks, inside=True) for ranks in _inside(per_node)], bandwidth / 2, 1)
        inter = prober.link(
            [prober.group(nodes, inside=False) for nodes in _between(world.size // per_node)],
            intra.bandwidth,
            per_node,
        )
    memory = min(world.all_gather_object(int(USABLE * rank_memory(device, world.sharing(per_node))), "probe"))
    said = f"measured by mics probe{' --quick' if quick else ''} on {world.size} ranks"
    sources = dict.fromkeys(("memory", "flops", "memory_bandwidth", "intra", "inter"), said)
    if per_node == 1:
        sources["intra"] = "one rank on each node: half the memory's bandwidth, and never used"
    if world.size == per_node:
        sources["inter"] = "a guess, as inside the node: torchrun on two nodes or more measures it"
    sources["efficiency"] = "a guess: set it to the share of the peak that a step of yours reached"
    transport = Transport.NCCL if device.type == "cuda" else Transport.GLOO
    cluster = Cluster(
        path.stem,
        world.size // per_node,
        per_node,
        memory,
        flops,
        bandwidth,
        intra,
        inter,
        EFFICIENCY,
        sources,
        transport,
    )
    problem = None
    if world.rank == 0:
        try:
            cluster.save(path)
        except OSError as error:
            problem = error.strerror
    _check_written(path, problem, world)
    if world.rank == 0:
        guessed = {name: "" if sources[name] == said else f" (not measured: {sources[name]})" for name in sources}
        print(
            f"{path}: {cluster.nodes} nodes of {per_node} ranks; {intra.bandwidth / 1e9:.3g} GB/s of a rank inside a "
            f"node{guessed['intra']}, {inter.bandwidth / 1e9:.3g} GB/s of a node between nodes{guessed['inter']}"
        )
    return cluster


def _check_written(path: Path, problem: str | None, world: World) -> None:
    """Raise on all ranks what rank 0 has found."""
    if told := world.all_gather_object(problem, "probe")[0]:
        raise ConfigError(f"probe: {path} cannot be written: {told}: name a file in a folder of yours")


class _Prober:
    """Times work that all ranks do together."""

    def __init__(self, world: World, per_node: int, effort: _Effort, progress: Progress) -> None:
        self._world = world
        self._per_node = per_node
        self._effort = effort
        self._progress = progress

    def group(self, ranks: int, *, inside: bool) -> Group:
        """This rank's group: so many neighbours on its node, or its peers on so many nodes; alone if nodes are left."""
        rank, per_node = self._world.rank, self._per_node
        name = f"probe {ranks} {'inside' if inside else 'between'}"
        if inside:
            first = rank - rank % ranks
            return self._world.group(tuple(range(first, first + ranks)), name)
        first = rank - rank % (ranks * per_node) + rank % per_node
        members = tuple(range(first, first + ranks * per_node, per_node))
        # Those who stay alone make a group, too, or ranks would number later ones differently.
        return self._world.group(members if members[-1] < self._world.size else (rank,), name)

    def link(self, groups: Sequence[Group], otherwise: float, sharing: int) -> Link:
        """A link's tables; its bandwidth, of so many ranks, by the largest message, its latency by the smallest."""
        tables: dict[tuple[str, int], Table] = {}
        bandwidths, latencies = [], []
        for group in groups:
            ranks = max(self._world.all_gather_object(len(group.membership.ranks), "probe"))
            for collective in ("gather", "reduce", "all-reduce"):
                rows = []
                for piece in _pieces(self._effort.sizes, ranks):
                    seconds = self.fastest(self._work(group, collective, piece))
                    sent = piece * (ranks - 1) * (2 if collective == "all-reduce" else 1)
                    rows.append((float(sent), seconds))
                    self._progress.advance(f"{collective} of {ranks} ranks, {sent:,} bytes")
                tables[collective, ranks] = tuple(rows)
                if collective == "gather":
                    (small, least), (large, most) = rows[0], rows[-1]
                    rate = (large - small) / (most - least) if most > least else large / most
                    bandwidths.append(sharing * rate)
                    hops = ranks - 1 if self._world.device.type == "cuda" else 1
                    latencies.append(max(least - small / rate, 1e-7) / hops)
        if not groups:
            return Link(otherwise, 1e-6)
        return Link(max(bandwidths), min(latencies), tables)

    def arithmetic(self) -> dict[str, float]:
        """Products of matrices, in FLOP a second."""
        rates = {}
        size, device = self._effort.matrix, self._world.device
        for name, dtype in _DTYPES.items():
            a = torch.randn(size, size, device=device).to(dtype)
            out = torch.empty_like(a)
            rates[name] = 2 * size**3 / self.fastest(partial(torch.mm, a, a, out=out))
            self._progress.advance(f"matrices of {name}")
        return rates

    def memory_bandwidth(self) -> float:
        """Bytes a second, read and written."""
        source = torch.zeros(self._effort.memory, dtype=torch.uint8, device=self._world.device)
        target = torch.empty_like(source)
        return 2 * self._effort.memory / self.fastest(lambda: target.copy_(source))

    def fastest(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest round, on the slowest rank; all ranks begin together."""
        times = []
        for _ in range(self._effort.rounds + 1):  # the first connects and allocates
            self._world.all_gather_object(None, "probe")
            begin = time.perf_counter()
            work()
            if self._world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return float(max(self._world.all_gather_object(min(times[1:]), "probe")))

    def _work(self, group: Group, collective: str, piece: int) -> Callable[[], object]:
        mine = torch.zeros(piece // 4, device=self._world.device)
        whole = mine.repeat(len(group.membership.ranks))
        if collective == "gather":
            return lambda: group.all_gather(whole, mine)
        if collective == "reduce":
            return lambda: group.exchange(whole)  # the sum of what comes costs memory, which plans count apart

        def both() -> None:
            group.all_gather(whole, _sum(group.exchange(whole)))

        return both


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _pieces(sizes: Sequence[int], ranks: int) -> list[int]:
    """Bytes for each other rank, of which a collective sends about these in all, none twice."""
    return sorted({max(64, size // max(ranks - 1, 1) // 64 * 64) for size in sizes})


def _inside(per_node: int) -> list[int]:
    return [ranks for ranks in range(2, per_node + 1) if per_node % ranks == 0]


def _between(nodes: int) -> list[int]:
    """2, 4, 8 and so on, and all."""
    return sorted({*_powers(nodes), nodes} - {1})


def _powers(most: int) -> Iterator[int]:
    number = 2
    while number <= most:
        yield number
        number *= 2
