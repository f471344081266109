"""What links.py runs on every rank: the ladder's transfers between nodes, one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import mics_core as mics
from bench.ranks import report
from mics_core.comm.counters import Counters
from mics_core.comm.ladder import Ladder, Route, Transfer
from mics_core.comm.parcel import add_up
from mics_core.comm.world import World
from mics_core.spec.topology import Rungs, Topology

REPEATS = 2  # transfers behind each other, as a step's units are
ROUNDS = 3
ROUTES = {Route.HOP2: "hop 2", Route.REFRESH: "refresh"}


def transfers(elements: int, per_node: int) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """Each transfer, of a buffer of so many elements a rank, and the bytes that a rank sends in it."""
    world = World(None)
    counters = Counters(world.device)
    top = world.size
    sharding = mics.Sharding(per_node, per_node, per_node)
    ladder = Ladder(Rungs.of(sharding, Topology(top, per_node)), sharding, world, counters)
    buffer = torch.zeros(elements)
    begin, end = ladder.range(elements * per_node, top, within=per_node)
    mine = buffer[begin:end]
    up, down = (Transfer(route, name, name, per_node, top) for route, name in ROUTES.items())

    def refresh() -> None:
        ladder.all_gather(down, mine, buffer, per_node, top)

    def hop2() -> None:
        add_up(mine, ladder.reduce_scatter(up, buffer, per_node, top), overwrite=True)

    def both() -> None:
        hop2()
        refresh()

    actions = {"refresh": refresh, "hop 2": hop2, "both": both}
    sent = {}
    for name, action in actions.items():
        counters.links.clear()
        action()
        sent[name] = sum(traffic.bytes for traffic in counters.links.values())
    return actions, sent


def measure(elements: int, per_node: int) -> dict[str, Any]:
    """The seconds of each transfer in every round, and the bytes that a node sends in it."""
    actions, sent = transfers(elements, per_node)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, action in actions.items():
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(REPEATS):
                action()
            passed = torch.tensor((time.perf_counter() - begun) / REPEATS)
            dist.all_reduce(passed, dist.ReduceOp.MAX)
            seconds[name].append(passed.item())
    return {"seconds": seconds, "sent_by_node": {name: per_node * bytes for name, bytes in sent.items()}}


def main(words: Sequence[str]) -> None:
    """Measure with buffers of so many MB, one size after the other, on nodes of so many ranks."""
    per_node, *sizes = words
    mics.init()
    torch.set_num_threads(1)
    multiple = 64 * dist.get_world_size()
    with torch.no_grad():
        found = [measure(round(float(size) * 1e6 / 4) // multiple * multiple, int(per_node)) for size in sizes]
    if dist.get_rank() == 0:
        report(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
