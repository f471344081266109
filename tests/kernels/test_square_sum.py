import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import mics_kernels.ops.square_sum as square_sum_op
from comparing import assert_same_bits
from mics_kernels import square_sum

sizes = st.integers(0, 9000) | st.sampled_from([2048, 4096, 8192])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
both = pytest.mark.parametrize("run", [square_sum, square_sum_op.reference])


@both
@given(size=sizes, dtype=dtypes, shift=st.integers(0, 1))
def test_sums_of_whole_numbers_are_exact(run: object, size: int, dtype: torch.dtype, shift: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = torch.randint(-8, 9, (size + shift,), device=device)[shift:]
    total, nonfinite = run(numbers.to(dtype))
    assert total == numbers.square().sum()
    assert nonfinite == 0
    assert total.dtype == torch.promote_types(dtype, torch.float32)


@both
@given(size=st.integers(1, 9000), dtype=dtypes, place=st.floats(0, 0.999), what=st.sampled_from(["inf", "-inf", "nan"]))
def test_one_element_that_is_not_finite_is_found(
    run: object, size: int, dtype: torch.dtype, place: float, what: str
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flat = torch.randn(size, device=device).to(dtype)
    assert run(flat).nonfinite == 0
    flat[int(place * size)] = float(what)
    assert run(flat).nonfinite == 1


@both
def test_a_sum_that_overflows_is_not_an_element_that_is_not_finite(run: object, device: torch.device) -> None:
    total, nonfinite = run(torch.full((5000,), 1e30, device=device))
    assert total.isinf()
    assert nonfinite == 0


@both
def test_many_small_squares_are_not_lost_beside_a_large_one(run: object, device: torch.device) -> None:
    flat = torch.full((300_000,), 1e-3, device=device)
    flat[0] = 100.0
    # Adding one after the other in float32 would lose them all: 3e-5 of the sum.
    torch.testing.assert_close(run(flat).sum.double(), flat.double().square().sum(), rtol=1e-6, atol=0)


def test_the_reference_has_five_digits_of_a_large_buffer_and_sees_all_of_it(device: torch.device) -> None:
    for size in (1 << 15, (1 << 15) + 1, 1 << 18, 300_000, (1 << 21) + 77):
        for dtype in (torch.float32, torch.bfloat16):
            flat = torch.randn(size, device=device).to(dtype)
            total, nonfinite = square_sum_op.reference(flat)
            torch.testing.assert_close(total.double(), flat.double().square().sum(), rtol=1e-5, atol=0)
            assert nonfinite == 0
            for place in (0, size // 2, size - 1):
                kept = flat[place].item()
                flat[place] = torch.inf
                assert square_sum_op.reference(flat).nonfinite == 1
                flat[place] = kept


@pytest.mark.parametrize(
    ("run", "size"),
    [(square_sum, 50_000), (square_sum_op.reference, 50_000), (square_sum_op.reference, 300_000)],  # one sum, and rows
)
def test_the_same_buffer_gives_the_same_bits(run: object, size: int, device: torch.device) -> None:
    flat = torch.randn(size, device=device)
    first = run(flat).sum
    for shift in range(4):  # at another address, too
        moved = torch.empty(size + shift, device=device)[shift:].copy_(flat)
        assert_same_bits(run(moved).sum, first)


@both
def test_results_land_in_the_pair_that_was_given(run: object, device: torch.device) -> None:
    pairs = torch.full((3, 2), torch.nan, device=device)
    for row in pairs:
        run(torch.tensor([3.0, 4.0], device=device), row)
    assert pairs.tolist() == [[25.0, 0.0]] * 3


WRONG = {
    "the buffer is torch.int64": lambda flat: square_sum(flat.long()),
    "the buffer has shape": lambda flat: square_sum(flat.view(2, 2)),
    "out has 4 elements": lambda flat: square_sum(flat, flat),
    "out is torch.float64, expected float32": lambda flat: square_sum(flat, flat[:2].double()),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_request_raises_one_sentence(sentence: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=sentence):
        WRONG[sentence](torch.ones(4, device=device))
