import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import mics_kernels.ops.accumulate as accumulate_op
from comparing import assert_same_bits
from depth import draws
from mics_kernels import accumulate, dequantize, quantize
from mics_kernels.ops import accumulate_quantized
from mics_kernels.ops.quantize import Quantized

sizes = st.integers(0, 5000) | st.sampled_from([2048, 4096, 6144])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@given(sizes, st.integers(1, 5), dtypes, dtypes, st.sampled_from([1.0, 0.5, 0.3]), st.booleans(), st.booleans())
def test_accumulating_is_the_reference_and_with_a_scale_of_a_power_of_two_to_the_bit(
    size: int, count: int, acc_dtype: torch.dtype, dtype: torch.dtype, scale: float, overwrite: bool, aligned: bool
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    room = torch.randn(count, size + 3, device=device).to(dtype)
    # Rows of a matrix of odd width, shifted by one element, begin at every kind of address.
    chunks = [room[n, :size].clone() if aligned else room[n, 1 : size + 1] for n in range(count)]
    acc = torch.randn(size, device=device).to(acc_dtype)
    before, expected = acc.clone(), acc.clone()
    accumulate_op.reference(expected, chunks, scale, overwrite=overwrite)
    accumulate(acc, chunks, scale, overwrite=overwrite)
    if scale != 0.3:  # a CPU may add and multiply in one rounding, which only shows where the product is inexact
        assert_same_bits(acc, expected)
    exact = scale * sum(chunk.double() for chunk in chunks) + (0 if overwrite else before.double())
    terms = scale * sum(chunk.double().abs() for chunk in chunks) + before.double().abs()
    for got in (acc, expected):
        rounding = torch.finfo(torch.float32).eps * count + torch.finfo(acc_dtype).eps
        assert ((got.double() - exact).abs() <= terms * rounding).all()


@draws(25, 100)
@given(
    sizes,
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]),
    st.sampled_from([1.0, 0.3]),
    st.booleans(),
    st.booleans(),
)
def test_quantized_chunks_are_added_as_if_they_were_restored_one_by_one(
    size: int,
    count: int,
    acc_dtype: torch.dtype,
    dtype: torch.dtype,
    scale: float,
    overwrite: bool,
    aligned: bool,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chunks = []
    for number in range(count):
        numbers = torch.randn(size, device=device) * 10.0**number
        if size > 300 and number == 1:
            numbers[280] = torch.inf  # so the whole block comes back as NaN
        values, scales = quantize(numbers, dtype)
        room = torch.empty(size + 3, dtype=dtype, device=device)
        place = room[:size] if aligned else room[3:]
        place.copy_(values)
        chunks.append(Quantized(place, scales))
    acc = torch.randn(size, device=device).to(acc_dtype)
    total = torch.zeros(0)
    for number, chunk in enumerate(chunks):
        restored = dequantize(*chunk)
        total = total + restored if number else restored
    total = total * scale
    exact = (total if overwrite else total + acc.float()).to(acc_dtype)
    expected = acc.clone()
    accumulate_quantized.reference(expected, chunks, scale, 256, overwrite=overwrite)
    accumulate(acc, chunks, scale, overwrite=overwrite)
    assert_same_bits(acc, expected)
    assert_same_bits(acc, exact)


@given(sizes, st.integers(1, 5), st.sampled_from([1.0, 0.25]))
def test_sums_of_whole_numbers_are_exact(size: int, count: int, scale: float) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chunks = torch.randint(-8, 9, (count, size), device=device).mul(4)
    acc = torch.randint(-8, 9, (size,), device=device)
    expected = acc.double() + scale * chunks.double().sum(0)
    for run in (accumulate, accumulate_op.reference):
        got = acc.float()
        run(got, chunks.bfloat16(), scale)
        assert_same_bits(got, expected.float())


@pytest.mark.parametrize("run", [accumulate, accumulate_op.reference])
def test_overwriting_ignores_what_was_there(run: object, device: torch.device) -> None:
    acc = torch.full((3000,), torch.nan, device=device)
    run(acc, [torch.ones(3000, device=device).bfloat16()] * 2, 0.5, overwrite=True)
    assert acc.eq(1).all()


def test_the_reference_crosses_from_one_scratch_part_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate_op, "SCRATCH", 7)
    acc, chunks = torch.ones(40), torch.randn(3, 40)
    accumulate_op.reference(acc, chunks, 2.0)
    torch.testing.assert_close(acc, 1 + 2 * chunks.sum(0))


WRONG = {
    "got no chunks": lambda acc: accumulate(acc, []),
    "chunk 1 has 4 elements, expected 5": lambda acc: accumulate(acc, [acc, acc[:4]]),
    "chunk 1 is torch.bfloat16, expected float32": lambda acc: accumulate(acc, [acc, acc.bfloat16()]),
    "chunk 0 is torch.int64": lambda acc: accumulate(acc, [acc.long()]),
    "acc has shape": lambda acc: accumulate(acc.view(5, 1), [acc]),
    "chunk 0 is on meta": lambda acc: accumulate(acc, [acc.to("meta")]),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_request_raises_one_sentence_and_adds_nothing(sentence: str, device: torch.device) -> None:
    acc = torch.ones(5, device=device)
    with pytest.raises(ValueError, match=sentence):
        WRONG[sentence](acc)
    assert acc.eq(1).all()
