"""A flat range of a tensor is a few boxes, in order; and all ranks together write every element once."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_core import Sharding
from mics_core.checkpoint.boxes import boxes
from mics_core.checkpoint.contents import Contents, Cut, Name
from mics_core.spec.layout import Layout
from mics_core.spec.topology import Rungs, Topology

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(shape=SHAPES, ends=st.tuples(st.integers(0, 700), st.integers(0, 700)), limit=st.integers(1, 700))
def test_boxes_hold_the_range_in_order(shape: tuple[int, ...], ends: tuple[int, int], limit: int) -> None:
    size = prod(shape)
    begin, end = sorted(min(number, size) for number in ends)
    numbers = torch.arange(size).view(shape)
    found = []
    for box in boxes(shape, begin, end, limit):
        part = numbers[tuple(slice(at, at + length) for at, length in zip(box.offsets, box.sizes, strict=True))]
        assert part.numel() <= limit
        assert part.flatten().tolist() == list(range(box.begin, box.end))
        found += part.flatten().tolist()
    assert found == list(range(begin, end))


@given(shape=SHAPES.filter(bool), ends=st.tuples(st.integers(0, 700), st.integers(0, 700)))
def test_a_range_needs_no_more_than_twice_as_many_boxes_as_dimensions_less_one(
    shape: tuple[int, ...], ends: tuple[int, int]
) -> None:
    begin, end = sorted(min(number, prod(shape)) for number in ends)
    assert len(list(boxes(shape, begin, end, 1000))) <= 2 * len(shape) - 1


@st.composite
def rungs(draw: st.DrawFn) -> tuple[Rungs, int]:
    """Any nodes, and the degree of the optimizer's state."""
    per_node, nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    world = per_node * nodes
    fits = [d for d in range(1, world + 1) if world % d == 0 and (d % per_node == 0 or per_node % d == 0)]
    degree = draw(st.sampled_from(fits))
    return Rungs.of(Sharding(1, 1, degree), Topology(world, per_node)), degree


@given(rungs=rungs(), shapes=st.lists(SHAPES, min_size=1, max_size=5))
def test_ranks_write_every_element_once_evenly_and_only_what_they_hold(
    rungs: tuple[Rungs, int], shapes: list[tuple[int, ...]]
) -> None:
    ladder, degree = rungs
    world = ladder.topology.world
    layout = Layout.plan([(str(number), shape) for number, shape in enumerate(shapes)], ladder.degrees[-1])
    times = [torch.zeros(shape, dtype=torch.int) for shape in shapes]
    announced = [0] * len(shapes)
    for rank in range(world):
        held = layout.size // degree
        at = ladder.piece_number(rank, degree) * held
        cuts = [
            Cut(Name((slot.name,)), slot.shape, slot.begin, layout.size, part, max(0, at - slot.begin))
            for slot, (begin, end) in zip(layout.slots, layout.within(at, at + held), strict=True)
            for part in [times[int(slot.name)].view(-1)[max(0, at - slot.begin) :][: end - begin]]
        ]
        contents, piece = Contents(tuple(cuts), {}, {}, b"", {}), ladder.piece_number(rank, world)
        written = 0
        for cut, box in contents.mine(piece, world):
            cut.values(box).add_(1)
            written += cut.values(box).numel()
            announced[int(str(cut.name))] += 1
        assert written <= layout.size // world
        staged = contents.staged(piece, world, lambda parts: [part.clone() for part in parts])
        assert [box for _, box in staged.mine(piece, world)] == [box for _, box in contents.mine(piece, world)]
        for cut, box in staged.mine(piece, world):
            assert cut.values(box).shape == box.sizes
    assert all((count == 1).all() for count in times)
    assert all(announced)
