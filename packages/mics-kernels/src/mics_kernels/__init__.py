"""Fused kernels for the bytes around collectives: flat buffers in and out, sums, norms, AdamW, quantization.

Every op runs as one Triton kernel on a GPU and as plain torch elsewhere; `backend(device)` says which, and why.
"""

from mics_kernels.backend import backend
from mics_kernels.ops.accumulate import accumulate
from mics_kernels.ops.adamw import adamw
from mics_kernels.ops.pack import pack
from mics_kernels.ops.quantize import Quantized, dequantize, quantize
from mics_kernels.ops.square_sum import square_sum
from mics_kernels.ops.unpack import unpack
from mics_kernels.rounding import StochasticRounding
from mics_kernels.segments import Segments

__version__ = "0.1.0"

__all__ = [
    "Quantized",
    "Segments",
    "StochasticRounding",
    "accumulate",
    "adamw",
    "backend",
    "dequantize",
    "pack",
    "quantize",
    "square_sum",
    "unpack",
]
