import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import mics_kernels.ops.quantize as quantize_op
from comparing import assert_same_bits
from mics_kernels import accumulate, dequantize, quantize

# The largest step between neighbouring values, in units of a block's scale: 1 between integers; fp8 has 3 or 2 bits
# of mantissa, so at the top of its range neighbours are limit / 2**bits / (2 - 2**-bits) of 1.75 or so apart.
STEPS = {torch.int8: 1.0, torch.float8_e4m3fn: 32.0, torch.float8_e5m2: 8192.0}

kinds = st.sampled_from(list(STEPS))
sizes = st.integers(0, 3000) | st.sampled_from([1024, 2048])
floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
blocks = st.sampled_from([16, 64, 256, 1024])


def spread_out(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of very different magnitude, with zeros and a whole block of them."""
    numbers = torch.randn(size) * 10.0 ** torch.randint(-4, 3, (size,)).float()
    numbers[torch.rand(size) < 0.1] = 0
    numbers[1024:1300] = 0
    return numbers.to(dtype).to("cuda" if torch.cuda.is_available() else "cpu")


def empty(size: int, kind: torch.dtype, block: int, device: torch.device) -> quantize_op.Quantized:
    scales = torch.empty(-(-size // block), device=device)
    return quantize_op.Quantized(torch.empty(size, dtype=kind, device=device), scales)


@given(sizes, floats, kinds, blocks, st.booleans(), st.none() | floats, st.sampled_from([None, torch.inf, torch.nan]))
def test_quantizing_gives_the_bits_of_the_reference(
    size: int,
    dtype: torch.dtype,
    kind: torch.dtype,
    block: int,
    feedback: bool,
    based: torch.dtype | None,
    strange: float | None,
) -> None:
    flat = spread_out(size, dtype)
    base = None if based is None else torch.randn(size).to(based).to(flat.device)
    if strange is not None and size:
        flat[size // 2] = strange
    residual = torch.randn(size, device=flat.device) if feedback else None
    expected_residual = residual.clone() if feedback else None
    expected = empty(size, kind, block, flat.device)
    quantize_op.quantize_reference(flat, expected, block, expected_residual, base)
    got = quantize(flat, kind, block=block, residual=residual, base=base)
    assert_same_bits(got.values, expected.values)
    assert_same_bits(got.scales, expected.scales)
    if feedback:
        assert_same_bits(residual, expected_residual)
    returned, expected_returned = torch.empty_like(flat), torch.empty_like(flat)
    quantize_op.dequantize_reference(*expected, expected_returned, block)
    assert_same_bits(dequantize(*got, returned, block=block), expected_returned)


@given(sizes, floats, kinds, blocks)
def test_a_round_trip_errs_by_half_a_step_at_most(size: int, dtype: torch.dtype, kind: torch.dtype, block: int) -> None:
    flat = spread_out(size, dtype)
    values, scales = quantize(flat, kind, block=block)
    bound = scales.repeat_interleave(block)[:size] * (STEPS[kind] / 2) * (1 + 1e-5)
    error = (dequantize(values, scales, block=block) - flat.float()).abs()
    assert (error <= bound).all()
    # Relative to the element itself, fp8 errs by half of its last bit, down to its smallest normal number.
    if kind != torch.int8:
        info = torch.finfo(kind)
        normal = flat.float().abs() >= scales.repeat_interleave(block)[:size] * info.smallest_normal
        assert (error[normal] <= flat.float().abs()[normal] * (info.eps / 2) * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", STEPS)
def test_error_feedback_loses_nothing_in_the_long_run(kind: torch.dtype, device: torch.device) -> None:
    gradients = torch.randn(20, 1000, device=device)
    residual, sent = torch.zeros(1000, device=device), torch.zeros(1000, device=device)
    for gradient in gradients:
        sent += dequantize(*quantize(gradient, kind, residual=residual))
    torch.testing.assert_close(sent + residual, gradients.sum(0), rtol=1e-5, atol=1e-4)
    without = sum(dequantize(*quantize(gradient, kind)) for gradient in gradients)
    assert (sent - gradients.sum(0)).norm() < (without - gradients.sum(0)).norm() / 2


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_code_is_read_as_torch_reads_it(kind: torch.dtype, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(kind)
    assert_same_bits(dequantize(codes, torch.ones(1, device=device)), codes.float())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_codes_are_rounded_as_torch_rounds_them(kind: torch.dtype, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(kind).float()
    codes = codes[codes.isfinite()].sort().values
    halves = (codes[1:] + codes[:-1]) / 2  # ties, and their neighbours on both sides
    numbers = torch.cat([codes, halves, halves.nextafter(codes[1:]), halves.nextafter(codes[:-1])])
    limit = torch.finfo(kind).max
    for part in numbers.split(15):
        flat = torch.cat([part, torch.tensor([limit], device=device)])  # makes the scale one
        assert_same_bits(quantize(flat, kind).values, flat.to(kind))


@pytest.mark.parametrize("kind", STEPS)
def test_an_overflow_stays_visible_and_stays_in_its_block(kind: torch.dtype, device: torch.device) -> None:
    flat, residual = torch.randn(1000, device=device), torch.full((1000,), 0.5, device=device)
    flat[300] = torch.inf
    back = dequantize(*quantize(flat, kind, residual=residual))
    assert back[256:512].isnan().all()
    assert back[:256].isfinite().all()
    assert back[512:].isfinite().all()
    assert residual[256:512].eq(0.5).all()
    assert residual.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-45, 3e38])
@pytest.mark.parametrize("kind", STEPS)
def test_the_ends_of_the_range_survive(size: float, kind: torch.dtype, device: torch.device) -> None:
    flat = torch.tensor([size, -size, 0.0], device=device)
    values, scales = quantize(flat, kind)
    back = dequantize(values, scales)
    assert back.isfinite().all()
    assert ((back - flat).abs() <= scales * STEPS[kind] / 2).all()


WRONG = {
    "expected a power of two": lambda x: quantize(x, block=100),
    "expected a power of two from 16": lambda x: dequantize(x.to(torch.int8), x, block=8),
    "dtype is torch.int32": lambda x: quantize(x, torch.int32),
    "the buffer is torch.float64": lambda x: quantize(x.double()),
    "residual has 4 elements, expected 40": lambda x: quantize(x, residual=x[:4]),
    "scales has 40 elements": lambda x: dequantize(x.to(torch.int8), x),
    "out.values is torch.int32": lambda x: quantize(x, out=quantize_op.Quantized(x.int(), x[:1])),
    "dtype is torch.float8_e5m2, expected torch.int8": lambda x: quantize(
        x, torch.float8_e5m2, out=empty(40, torch.int8, 256, x.device)
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_request_raises_one_sentence(sentence: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=sentence):
        WRONG[sentence](torch.ones(40, device=device))


@pytest.mark.parametrize("feedback", [False, True])
def test_the_references_cross_from_one_part_to_the_next(feedback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randn(1000)
    flat[700] = torch.inf
    results = []
    for most in (1 << 20, 64):
        monkeypatch.setattr(quantize_op, "SCRATCH", most)
        monkeypatch.setattr(quantize_op, "DEQUANTIZED", most)
        out, residual = empty(1000, torch.int8, 32, flat.device), torch.ones(1000) if feedback else None
        quantize_op.quantize_reference(flat, out, 32, residual)
        back = torch.empty(1000)
        quantize_op.dequantize_reference(*out, back, 32)
        results.append([*out, back, back if residual is None else residual])
    for whole, parts in zip(*results, strict=True):
        assert_same_bits(parts, whole)


@given(sizes, floats)
def test_a_base_that_follows_by_differences_comes_as_near_as_its_own_dtype_allows(
    size: int, dtype: torch.dtype
) -> None:
    """Each difference holds what the ones before have lost, so that in the end the base's own rounding is left."""
    master = torch.randn(size, device="cuda" if torch.cuda.is_available() else "cpu")
    shown = torch.zeros_like(master, dtype=dtype)
    for _ in range(6):
        accumulate(shown, [quantize(master, base=shown)])
    off = (master - shown.float()).abs()
    largest = master.abs().max() if size else 0.0
    assert (off <= torch.finfo(dtype).eps * (master.abs() + largest / 127) + 1e-7).all()
