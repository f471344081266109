"""Whether a gradient's two hops and the step after them can be captured, and give the same bits as without a graph.

    python -m bench.gpu.graphs NOTES [--pretend]

A world of one rank, with NCCL. A whole training step is no graph: works are events from outside a capture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

import mics_core as mics
from bench.gpu.stand import Stand, arguments, ask, environment, stand
from bench.harness import WARM_UPS
from mics_core.comm.groups import Group
from mics_core.comm.world import World
from mics_kernels import accumulate, adamw, pack, square_sum

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class Hops:
    """The buffers of one unit, and the kernels and collectives from its gradients to its new weights."""

    def __init__(self, device: torch.device, size: int, groups: Sequence[Group]) -> None:
        chance = torch.Generator(device).manual_seed(0)
        self.grads = [torch.randn(size // 8, device=device, generator=chance).bfloat16() for _ in range(8)]
        self.staging = torch.empty(size, device=device)
        self.grad_sum = torch.zeros(size, device=device)
        self.grad_mean = torch.zeros(size, device=device)
        self.sums = torch.zeros(2, device=device)
        self.state = list(torch.zeros(3, size, device=device).unbind())
        self.weights = torch.zeros(size, device=device, dtype=torch.bfloat16)
        self.groups = groups
        self.offsets = [number * (size // 8) for number in range(8)]

    def run(self) -> None:
        """Hop 1, hop 2, the norm, the step."""
        one, two = self.groups
        pack(self.grads, self.staging, self.offsets)
        accumulate(self.grad_sum, one.exchange(self.staging), overwrite=True)
        accumulate(self.grad_mean, two.exchange(self.grad_sum), 0.5, overwrite=True)
        square_sum(self.grad_mean, self.sums)
        master, average, square = self.state
        adamw(master, average, square, self.grad_mean, self.weights, lr=1e-3, step=1)
        two.all_gather(self.weights, self.weights)

    def results(self) -> list[torch.Tensor]:
        """What came of it."""
        return [each.clone() for each in (self.grad_sum, self.grad_mean, self.sums, *self.state, self.weights)]


def a_graph_gives_the_bits_of_single_calls(here: Stand) -> dict[str, object]:
    """Of two hops and a step, by the size of a unit."""
    found: dict[str, object] = {}
    with environment(**ALONE, **LOOPBACK):
        if here.pretends:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            mics.init()
        try:
            world = World(None)
            groups = [world.group((0,), name) for name in ("graph, hop 1", "graph, hop 2")]
            for size in (1 << 12, here.small(1 << 24, 1 << 13)):
                found[str(size)] = _compared(here, partial(Hops, here.device, size, groups))
        finally:
            dist.destroy_process_group()
    return found


def _compared(here: Stand, make: Callable[[], Hops]) -> dict[str, object]:
    eager, graphed = make(), make()
    for hops in (eager, graphed):
        for _ in range(WARM_UPS):
            hops.run()  # compiles, and fills tables of addresses
    here.complete()
    for _ in range(3):
        eager.run()
    if here.pretends:
        again, times = graphed.run, 3
    else:
        side = here.stream()
        with here.on(side):
            graphed.run()  # this stream's own tables
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks events meanwhile, which is an error in a capture that is not of this thread alone.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            graphed.run()
        again, times = graph.replay, 2
    for _ in range(times):
        again()
    here.complete()
    same = [torch.equal(a, b) for a, b in zip(eager.results(), graphed.results(), strict=True)]
    if not all(same):
        raise AssertionError(f"a graph gives other bits than single calls: {same}")
    other, rounds = make(), here.small(50, 1)  # each replay changes the sums: the bits come first
    other.run()
    return {
        "same": True,
        "us, single calls": here.seconds(lambda: [other.run() for _ in range(rounds)]) / rounds * 1e6,
        "us, graph": here.seconds(lambda: [again() for _ in range(rounds)]) / rounds * 1e6,
    }


def main(words: Sequence[str] | None = None) -> int:
    """Ask all."""
    return 0 if ask(stand(arguments(__doc__).parse_args(words)), (a_graph_gives_the_bits_of_single_calls,)) else 1


if __name__ == "__main__":
    sys.exit(main())
