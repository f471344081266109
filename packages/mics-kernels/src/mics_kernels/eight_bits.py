"""int8 and fp8 inside kernels, by integers: sm_80 has no fp8."""

from __future__ import annotations

import torch

from mics_kernels.backend import jit, tl

MANTISSA_BITS = {torch.int8: 0, torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
"""Of each dtype's mantissa; 0 for int8."""


@jit
def to_nearest_integer(x: tl.tensor) -> tl.tensor:
    """Ties to even: adding 1.5 * 2**23 leaves no bit for a fraction, and rounds as the hardware does."""
    return (x + 12582912.0) - 12582912.0


@jit
def encode(x: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    """The bits of float32 `x` (finite, within the limit) as fp8, ties to even, with integers: sm_80 has no fp8."""
    BIAS: tl.constexpr = 2 ** (6 - MANTISSA) - 1
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + (2 ** (DROPPED - 1) - 1) + ((magnitude >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
    subnormal = to_nearest_integer(tl.abs(x) * (2.0 ** (BIAS - 1 + MANTISSA))).to(tl.uint32)
    code = tl.where(tl.abs(x) < 2.0 ** (1 - BIAS), subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@jit
def decode(code: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    """int8 (MANTISSA = 0), or the bits of fp8 -> float32."""
    if MANTISSA == 0:
        return code.to(tl.float32)
    return _decode_fp8(code, MANTISSA)


@jit
def _decode_fp8(code: tl.tensor, MANTISSA: tl.constexpr) -> tl.tensor:
    BIAS: tl.constexpr = 2 ** (6 - MANTISSA) - 1
    wide = code.to(tl.uint32)
    magnitude = wide & 0x7F
    normal = ((magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    subnormal = magnitude.to(tl.float32) * (2.0 ** -(BIAS - 1 + MANTISSA))
    x = tl.where(magnitude < 2**MANTISSA, subnormal, normal)
    if MANTISSA == 3:
        x = tl.where(magnitude == 0x7F, float("nan"), x)  # e4m3fn has no infinity
    else:
        x = tl.where(magnitude == 0x7C, float("inf"), tl.where(magnitude > 0x7C, float("nan"), x))
    sign = (wide & 0x80) << 24  # as a bit: 0 - x would lose the sign of zero
    return (x.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
