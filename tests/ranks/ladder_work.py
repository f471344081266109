"""What test_ladder.py asks ranks to do: move whole numbers, whose sums are exact in any order."""

import threading
import time
from dataclasses import dataclass
from functools import partial

import torch

from mics_core.comm.counters import Counters
from mics_core.comm.ladder import Ladder, Route, Transfer
from mics_core.comm.world import World
from mics_core.spec.sharding import Sharding
from mics_core.spec.topology import Rungs, Scope, Topology
from mics_kernels import accumulate
from seeded import seeded


@dataclass(frozen=True)
class Case:
    world: int
    per_node: int
    sharding: Sharding
    pieces: int  # elements of the smallest piece
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        return self.world * self.pieces

    def ladder(self, sharding: Sharding | None = None) -> tuple[Ladder, Counters]:
        """Of the case's rungs, with groups for another sharding."""
        world = World(None)
        counters = world.counters()
        rungs = Rungs.of(self.sharding, Topology(self.world, self.per_node))
        return Ladder(rungs, sharding or self.sharding, world, counters), counters

    def partial(self, rank: int) -> torch.Tensor:
        """What one rank contributes."""
        generator = seeded(rank)
        return torch.randint(-8, 9, (self.size,), generator=generator).to(self.dtype)

    def total(self) -> torch.Tensor:
        return torch.stack([self.partial(rank) for rank in range(self.world)]).sum(0)


EVERYWHERE = Sharding.ddp().resolve(1)
"""With these degrees the slow routes have a group for every level."""

UP = Transfer(Route.HOP2, "a sum", "up", 1, -1)
DOWN = Transfer(Route.REFRESH, "a gather", "down", 1, -1)


def there_and_back(case: Case) -> dict[str, bool]:
    """Reduce-scatter from 1 to every rung by way of the one before, and gather again; compare with sums of all."""
    ladder, _ = case.ladder(EVERYWHERE)
    world, rank = case.world, ladder.rank
    size = case.size
    result = {}
    buffer = case.partial(rank)
    below = 1
    for degree in ladder.rungs.degrees:
        parts = ladder.reduce_scatter(UP, buffer, below, degree)
        piece = torch.empty(size // degree, dtype=case.dtype)
        accumulate(piece, parts, overwrite=True)
        begin, end = ladder.range(size, degree)
        # The ranks that share my copy at this degree are the first so many, counted from a multiple of it.
        mine = range(rank - rank % degree, rank - rank % degree + degree)
        expected = torch.stack([case.partial(other) for other in mine]).sum(0)[begin:end]
        result[f"up to {degree}"] = torch.equal(piece, expected)
        buffer, below = piece.clone(), degree
    begin, end = ladder.range(size, world)
    result["up to the top"] = torch.equal(buffer, case.total()[begin:end])
    high = world
    for degree in reversed(ladder.rungs.degrees[:-1]):
        begin, end = ladder.range(size, degree)
        whole = torch.full((size // degree,), torch.nan, dtype=case.dtype)
        ladder.all_gather(DOWN, buffer, whole, degree, high)
        result[f"down to {degree}"] = torch.equal(whole, case.total()[begin:end])
        buffer, high = whole, degree
    return result


def straight_down_and_up(case: Case) -> dict[str, bool]:
    """Several rungs in one call, in place."""
    ladder, counters = case.ladder(EVERYWHERE)
    size = case.size
    top = ladder.rungs.degrees[-1]
    buffer = case.partial(ladder.rank)
    parts = ladder.reduce_scatter(UP, buffer, 1, top)
    begin, end = ladder.range(size, top)
    mine = buffer[begin:end]
    accumulate(mine, parts, overwrite=True)
    ladder.all_gather(DOWN, mine, buffer, 1, top)
    sent = {
        action: sum(t.bytes for (name, _), t in counters.links.items() if name == action) for action in ("up", "down")
    }
    # However many rungs: each rank sends what it does not keep, and what the others do not have, once.
    least = (case.world - 1) * case.pieces * buffer.itemsize
    return {"all-reduce": torch.equal(buffer, case.total()), "fewest bytes": sent["up"] == sent["down"] == least}


def totals(case: Case, degree: int) -> list[float]:
    ladder, _ = case.ladder()
    return ladder.total(torch.tensor([1.0, float(ladder.rank)], dtype=torch.float64), degree).tolist()


def compared(case: Case, degree: int) -> tuple[list[int], tuple[int, ...]]:
    ladder, _ = case.ladder()
    rows = ladder.compare(torch.tensor([ladder.rank]), degree)
    return rows.flatten().tolist(), ladder.rungs.replicating(ladder.rank, degree)


def _wait_for(event: threading.Event) -> None:
    assert event.wait(600), "nobody lets the lane go"


def two_sums_while_the_net_is_busy(case: Case) -> tuple[int, int, bool]:
    """Reduce-scatters of two units while another holds the lane between nodes: how many were inside nodes and how many
    between them by then, and whether both sums are right once it has gone.
    """
    ladder, counters = case.ladder(EVERYWHERE)
    inside, between = (("up", ladder.rungs.name(level)) for level in range(2))
    busy = threading.Event()
    ladder.submit(Route.HOP2, Scope.INTER, "holding", lambda: _wait_for(busy))
    transfer = Transfer(Route.HOP2, "hop 2", "up", 1, case.world)
    pieces = [torch.empty(case.size // case.world, dtype=case.dtype) for _ in range(2)]
    works = [
        ladder.reduce_scatter_async(transfer, case.partial(ladder.rank), partial(_add_up, piece)) for piece in pieces
    ]
    deadline = time.monotonic() + 300  # only ends a hang
    while counters.links[inside].calls < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    calls = counters.links[inside].calls, counters.links[between].calls
    busy.set()
    for work in works:
        work.wait()
    begin, end = ladder.range(case.size, case.world)
    return *calls, all(torch.equal(piece, case.total()[begin:end]) for piece in pieces)


def _add_up(piece: torch.Tensor, parts: list[torch.Tensor]) -> None:
    accumulate(piece, parts, overwrite=True)
