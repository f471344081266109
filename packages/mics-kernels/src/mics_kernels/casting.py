"""Conversions between dtypes inside kernels: each gives the bits that torch's `.to()` gives.

Kernels convert only through `convert`, so that Triton's interpreter (which truncates float32 -> bfloat16, in
every version from 3.6 to 3.9) is dealt with here and nowhere else.
"""

from __future__ import annotations

from mics_kernels.backend import INTERPRETED, constexpr, jit, tl

_INTERPRETED = constexpr(INTERPRETED)


@jit
def convert(value: tl.tensor, target: tl.constexpr) -> tl.tensor:
    """`value` in dtype `target`; float -> float rounds to nearest even, float -> int truncates."""
    if value.dtype == target:
        return value
    if value.dtype == tl.bfloat16:
        if _INTERPRETED:
            value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            value = value.to(tl.float32)
    if target == tl.bfloat16:
        return _round_to_bfloat16(value.to(tl.float32))
    if target == tl.float16:
        value = value.to(tl.float32)  # torch, too, passes through float32 on the way from float64 and int64
    return value.to(target)


@jit
def _round_to_bfloat16(value: tl.tensor) -> tl.tensor:
    if _INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)  # a NaN's payload must not carry into its sign
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(tl.bfloat16)


@jit
def scaled(value: tl.tensor, scale: tl.tensor, target: tl.constexpr, SCALED: tl.constexpr) -> tl.tensor:
    """`value * scale` in dtype `target`, multiplied in float32, or in float64 where either side is float64."""
    if SCALED:
        if (value.dtype == tl.float64) or (target == tl.float64):
            value = convert(value, tl.float64) * tl.full(value.shape, scale, tl.float64)
        else:
            value = convert(value, tl.float32) * tl.full(value.shape, scale, tl.float32)
    return convert(value, target)
