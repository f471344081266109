"""What every rank of a scene runs: the same training under all its variants, a turn of each after the other."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mics_core as mics
from bench.cluster import traffic
from bench.harness import order
from bench.ranks import report
from bench.scenes.limit import bytes_leaving, limit, unit_times
from bench.scenes.model import ROWS, Model
from bench.scenes.runtimes import Ours, Runtime, Terms, runtime
from bench.scenes.table import Scene


@dataclass(frozen=True)
class Turn:
    """What a step took, as the mean of several in a row, to the end of all they started."""

    seconds: float  # on the slowest rank
    sent: int  # bytes that this rank's node sent
    losses: float  # the mean of all ranks, in the last one
    busy: float  # the share of the machine's cores that the ranks kept busy


def turn(variant: Runtime, batches: Sequence[Tensor], steps: int) -> Turn:
    """Take some steps in a row."""
    dist.barrier()
    before, worked, begun = traffic().sent, time.process_time(), time.perf_counter()
    for _ in range(steps):
        loss = variant.accumulate(batches)
        variant.update()
    variant.finish()
    passed = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
    work = torch.tensor(time.process_time() - worked, dtype=torch.float64)
    dist.barrier()  # or the node's other ranks may still be sending
    moved = traffic().sent - before
    mean = loss.double() / dist.get_world_size()
    dist.all_reduce(passed, dist.ReduceOp.MAX)
    dist.all_reduce(mean)
    dist.all_reduce(work)
    busy = work.item() / (passed.item() * len(os.sched_getaffinity(0)))
    return Turn(passed.item() / steps, moved // steps, mean.item(), busy)


def warm_up(variant: Runtime, batches: Sequence[Tensor]) -> int:
    """The first steps record, allocate and connect; the most bytes that a rank holds for its state."""
    variant.accumulate(batches)
    variant.update()
    variant.accumulate(batches)
    held = torch.tensor(variant.held())
    variant.update()
    variant.finish()
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held.item())


def expected(variant: Runtime, scene: Scene, micro_steps: int) -> dict[str, float] | None:
    """What the formula says of one of ours: the limit in seconds, and the bytes that leave a node."""
    if not isinstance(variant, Ours):
        return None
    formula = mics.ledger(variant.model).formula
    times = unit_times(formula, scene.stand_in, scene.rate_mbit, scene.ranks_per_node, micro_steps)
    return {
        "limit": limit(times, micro_steps, scene.steps),
        "sent": bytes_leaving(formula, scene.ranks_per_node, micro_steps, marked=variant.marked),
    }


def run(scene: Scene) -> list[dict[str, Any]]:
    """The whole scene on this rank: what was found of every variant, for each number of micro-steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    most = max(scene.micro_steps)
    generator = torch.Generator().manual_seed(2)
    batches = list(torch.randn(world, most, ROWS, scene.width, generator=generator)[rank])
    terms = Terms(torch.device("cpu"), scene.precision)
    variants = {
        name: runtime(name, lambda: Model(scene.width, scene.blocks, scene.stand_in), terms) for name in scene.variants
    }
    held = {name: warm_up(variant, batches[:1]) for name, variant in variants.items()}
    cases = []
    for micro_steps in scene.micro_steps:
        found: dict[str, dict[str, Any]] = {
            name: {"seconds": [], "sent": [], "losses": [], "busy": [], "held": held[name]} for name in variants
        }
        for number in range(scene.rounds):
            for name in order(list(variants), number):
                for key, value in asdict(turn(variants[name], batches[:micro_steps], scene.steps)).items():
                    found[name][key].append(value)
        for name, variant in variants.items():
            most_sent = torch.tensor(found[name]["sent"])
            dist.all_reduce(most_sent, dist.ReduceOp.MAX)
            found[name]["sent"] = most_sent.tolist()
            found[name]["expected"] = expected(variant, scene, micro_steps)
        cases.append({"micro_steps": micro_steps, "variants": found})
    return cases


def main(words: Sequence[str]) -> None:
    """Play the scene that `Scene.write` wrote."""
    mics.init()
    torch.set_num_threads(1)
    found = run(Scene.read(words[0]))
    if dist.get_rank() == 0:
        report(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
