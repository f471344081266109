"""Tensors that differ in any bit, or in the order of their elements, have different fingerprints."""

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from mics_core.fingerprint import fingerprint


@given(size=st.integers(1, 200), seed=st.integers(0, 1000), data=st.data())
def test_one_flipped_bit_shows(size: int, seed: int, data: st.DataObject) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    other = tensor.clone()
    other[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert torch.equal(fingerprint(tensor), fingerprint(tensor.clone()))
    assert not torch.equal(fingerprint(tensor), fingerprint(other))


@given(size=st.integers(2, 100), data=st.data())
def test_two_elements_in_each_others_place_show(size: int, data: st.DataObject) -> None:
    tensor = torch.arange(size, dtype=torch.float32)
    one, other = data.draw(st.sets(st.integers(0, size - 1), min_size=2, max_size=2))
    swapped = tensor.clone()
    swapped[[one, other]] = tensor[[other, one]]
    assert not torch.equal(fingerprint(tensor), fingerprint(swapped))


def test_what_a_view_holds_counts_and_not_how_it_lies_in_memory() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert torch.equal(fingerprint(matrix.t()), fingerprint(matrix.t().contiguous()))
    assert not torch.equal(fingerprint(matrix.t()), fingerprint(matrix))


@given(size=st.integers(0, 200), part=st.integers(1, 20))
def test_the_parts_that_it_is_read_in_change_nothing(size: int, part: int) -> None:
    tensor = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    with patch("mics_core.fingerprint._PART", part):
        in_parts = fingerprint(tensor)
    assert torch.equal(in_parts, fingerprint(tensor))
