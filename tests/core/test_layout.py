"""Where parameters lie in a flat buffer: integers only."""

from math import prod

from hypothesis import given
from hypothesis import strategies as st

from mics_core.spec.layout import ALIGNED, BLOCK, PIECE, Layout

SHAPES = st.lists(st.lists(st.integers(0, 20), max_size=3).map(tuple), max_size=8)


@given(shapes=SHAPES, pieces=st.sampled_from([1, 2, 3, 8, 64]))
def test_parameters_are_aligned_and_in_order_and_do_not_overlap(shapes: list[tuple[int, ...]], pieces: int) -> None:
    layout = Layout.plan([(str(number), shape) for number, shape in enumerate(shapes)], pieces)
    end = 0
    for slot, shape in zip(layout.slots, shapes, strict=True):
        assert (slot.size, slot.begin % ALIGNED) == (prod(shape), 0)
        assert end <= slot.begin < end + ALIGNED
        end = slot.end
    assert end <= layout.size < end + PIECE * pieces
    assert layout.size % (PIECE * pieces) == 0


@given(shapes=SHAPES, pieces=st.sampled_from([1, 2, 3, 8]))
def test_pieces_together_hold_every_element_once(shapes: list[tuple[int, ...]], pieces: int) -> None:
    layout = Layout.plan([(str(number), shape) for number, shape in enumerate(shapes)], pieces)
    found: list[list[int]] = [[] for _ in shapes]
    for piece in range(pieces):
        begin, end = layout.size // pieces * piece, layout.size // pieces * (piece + 1)
        for elements, slot, (first, last) in zip(found, layout.slots, layout.within(begin, end), strict=True):
            assert 0 <= first <= last <= end - begin
            elements += range(begin + first - slot.begin, begin + last - slot.begin)
    assert found == [list(range(prod(shape))) for shape in shapes]


@given(shapes=st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), max_size=6), exact=st.integers(0, 6))
def test_what_stays_exact_lies_last_in_blocks_of_its_own(shapes: list[tuple[int, ...]], exact: int) -> None:
    exact = min(exact, len(shapes))
    layout = Layout.plan([(str(number), shape) for number, shape in enumerate(shapes)], 4, exact)
    assert layout.size % (4 * BLOCK) == 0
    assert layout.exact % BLOCK == 0
    assert all(slot.end <= layout.exact for slot in layout.slots[:exact])
    assert all(slot.begin >= layout.exact for slot in layout.slots[exact:])
