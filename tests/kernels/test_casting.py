"""The one place that deals with how dtypes are rounded, over all values that could be rounded wrongly."""

import pytest
import torch

from comparing import assert_same_bits
from mics_kernels import pack, unpack


def every_bfloat16(device: torch.device) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16)


def around_every_bfloat16(device: torch.device) -> torch.Tensor:
    """float32 numbers: each bf16, each tie between two neighbours, and what lies beside the ties."""
    high = torch.arange(2**16, dtype=torch.int64, device=device) << 16
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], device=device)
    return (high[:, None] + lows).flatten().to(torch.int32).view(torch.float32)


def converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    flat = torch.empty(source.numel(), dtype=dtype, device=source.device)
    pack([source], flat, [0])
    return flat


def test_float32_becomes_bfloat16_by_rounding_to_nearest_even(device: torch.device) -> None:
    numbers = around_every_bfloat16(device)
    assert_same_bits(converted(numbers, torch.bfloat16), numbers.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_every_bfloat16_is_read_as_torch_reads_it(dtype: torch.dtype, device: torch.device) -> None:
    assert_same_bits(converted(every_bfloat16(device), dtype), every_bfloat16(device).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float64_is_rounded_as_torch_rounds_it(dtype: torch.dtype, device: torch.device) -> None:
    numbers = torch.randn(50_000, dtype=torch.float64, device=device) * 10.0 ** torch.randint(
        -9, 6, (50_000,), device=device
    )
    assert_same_bits(converted(numbers, dtype), numbers.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32, torch.complex64])
def test_bits_of_the_same_dtype_pass_unread(dtype: torch.dtype, device: torch.device) -> None:
    noise = torch.randint(0, 256, (4096 * 8,), dtype=torch.uint8, device=device)
    flat = torch.empty(4096 * 8, dtype=torch.uint8, device=device)
    pack([noise.view(dtype)], flat.view(dtype), [0])  # signalling NaNs and their payloads, too
    assert flat.equal(noise)
    back = torch.empty_like(noise)
    unpack(flat.view(dtype), [back.view(dtype)], [0])
    assert back.equal(noise)
