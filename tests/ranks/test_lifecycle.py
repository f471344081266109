"""Every row of the table of docs/lifecycle.md, cell by cell."""

from pathlib import Path

import pytest

import lifecycle_work as work
from depth import is_deep
from lifecycle_work import Seen
from mics_core import Precision, Sharding
from pool import Pool

REFRESHING = {"after a step of `mics.AdamW`", "after a step of `torch.optim`", "after `zero_grad`, stepped"}
DOCUMENT = Path(__file__).parents[2] / "docs" / "lifecycle.md"


def table() -> dict[str, Seen]:
    """The rows by their moment, without what happens."""
    lines = iter(DOCUMENT.read_text().splitlines())
    head = next(line for line in lines if line.startswith("| moment | what happens | `module.weight` |"))
    assert head.count("|") == next(lines).count("|") == 8
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        moment, _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert moment not in rows
        rows[moment] = Seen(*cells)
    return rows


def under(sharding: Sharding, world: int, moment: str, row: Seen) -> Seen:
    """What a row says of this sharding, by the sentences below the table."""
    p, g, o = sharding.params, sharding.grads, sharding.optimizer
    unit = row.unit
    if p == 1:
        unit = "UNSHARDING" if o > 1 and moment in REFRESHING else "UNSHARDED"
    missing = {"gather": p == 1, "hop 1": g == 1, "hop 2": g == world, "refresh": o == p}
    lane = ", ".join(job for job in row.lane.split(", ") if not missing.get(job, False)) or "-"
    return Seen(row.weight, unit, row.gradient, row.grad, lane)


WALKS = [(4, (2, 2, 4), Precision.bf16()), (4, (1, 1, 4), Precision.fp32()), (2, (2, 2, 2), Precision.fp32())]
if is_deep():
    worlds = [(2, (2, 2, 2)), (4, (2, 2, 2)), (4, (2, 2, 4)), (4, (1, 1, 4)), (4, (1, 2, 2))]
    WALKS = [(*each, precision) for each in worlds for precision in (Precision.fp32(), Precision.bf16())]


@pytest.mark.parametrize(("world", "degrees", "precision"), WALKS)
def test_every_row_of_the_table_is_what_ranks_find(
    pool: Pool, world: int, degrees: tuple[int, int, int], precision: Precision
) -> None:
    rows, sharding = table(), Sharding(*degrees)
    for rank, seen in enumerate(pool.run(world, work.walk, sharding, precision, LOCAL_WORLD_SIZE=2)):
        assert seen.keys() == rows.keys(), "each row wants a check, and each check a row"
        expected = {moment: under(sharding, world, moment, row) for moment, row in rows.items()}
        wrong = {moment: (seen[moment], row) for moment, row in expected.items() if seen[moment] != row}
        assert not wrong, f"rank {rank} found, and the table says: {wrong}"
