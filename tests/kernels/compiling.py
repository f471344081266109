"""Compile every kernel for a GPU that is not there, as its launcher would, and print what the machine code does.

`python compiling.py cuda:90` prints one JSON object a line, of every variant. A driver that only names its target
stands in for the GPU, and the ops' own launchers run on CPU tensors: so constants, dtypes and the alignment of
arguments are those of real launches, and nothing here repeats them.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import mics_kernels.ops.accumulate as accumulate_op
import mics_kernels.ops.accumulate_quantized as quantized_op
import mics_kernels.ops.adamw as adamw_op
import mics_kernels.ops.pack as pack_op
import mics_kernels.ops.quantize as quantize_op
import mics_kernels.ops.square_sum as square_sum_op
import mics_kernels.ops.unpack as unpack_op
from mics_kernels import Segments, StochasticRounding
from mics_kernels.segments import BLOCK

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SIZE = 1 << 16
THREADS = 128  # four warps of NVIDIA, two of AMD

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Driver:
    """As much of a GPU driver as compiling takes."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return self.target


def empty(dtype: torch.dtype, size: int = SIZE) -> torch.Tensor:
    return torch.empty(size, dtype=dtype)


def wide(elements: int, *dtypes: torch.dtype) -> int:
    """128-bit accesses a thread needs to touch `elements` elements of each dtype, shared by its block."""
    return sum(elements * dtype.itemsize // (16 * THREADS) for dtype in dtypes)


Variant = tuple[str, Callable[[], object], int, int]  # name, launch, 128-bit loads, 128-bit stores


def variants() -> Iterator[Variant]:
    """Each op with the dtypes and options that change its machine code, and its fewest 128-bit accesses a thread."""
    for source, target in ((F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16), (F16, BF16), (F64, F32)):
        for scale in (1.0, 0.5):
            if scale == 1.0 or source != target:
                name, loads, stores = f"{source} -> {target} * {scale}", wide(BLOCK, source), wide(BLOCK, target)
                packing = partial(pack_op._launch, [empty(source)], empty(target), [0], scale)
                yield f"pack {name}", packing, loads, stores
                unpacking = partial(unpack_op._launch, empty(source), [empty(target)], [0], scale)
                yield f"unpack {name}", unpacking, loads, stores
    mixed = [empty(F32), empty(BF16), empty(torch.int64, 100)]
    packing = partial(pack_op._launch, mixed, empty(BF16, 3 * SIZE), [0, SIZE, 2 * SIZE], 1.0)
    yield "pack mixed", packing, wide(BLOCK, F32, BF16), wide(BLOCK, BF16, BF16, BF16)
    for source, target in ((BF16, F32), (F32, F32)):
        adding = partial(pack_op._launch, [empty(source)], empty(target), [0], 1.0, add=True)
        yield f"pack added {source} -> {target}", adding, wide(BLOCK, source, target), wide(BLOCK, target)
    strided = [empty(BF16).view(256, 256).t(), empty(BF16).view(64, 8, 128).transpose(0, 1), empty(BF16)]
    offsets, bucket = [0, SIZE, 2 * SIZE], empty(F32, 3 * SIZE)
    packing = partial(pack_op._launch, strided, bucket, offsets, 1.0)
    yield "pack strided", packing, wide(BLOCK, BF16), wide(BLOCK, F32)
    unpacking = partial(unpack_op._launch, bucket, strided, offsets, 1.0)
    yield "unpack strided", unpacking, wide(BLOCK, F32), wide(BLOCK, BF16)

    yield from corners()

    for dtype in (F32, BF16, F16):
        tile = accumulate_op.TILE
        for overwrite in (False, True):
            adding = partial(accumulate_op._launch, empty(F32), [empty(dtype)] * 4, 0.5, overwrite=overwrite)
            loads = wide(tile, dtype) if overwrite else wide(tile, dtype, F32)
            yield f"accumulate {dtype}, overwrite={overwrite}", adding, loads, wide(tile, F32)
        summing = partial(square_sum_op._launch, empty(dtype), None)
        yield f"square_sum {dtype}", summing, wide(square_sum_op.TILE, dtype), 0

    tile = adamw_op.TILE
    for grad, weights in ((F32, BF16), (BF16, BF16), (F32, None)):
        for rounding in (None, StochasticRounding(3)) if weights else (None,):
            loads = wide(tile, F32, F32, F32, grad)
            stores = wide(tile, F32, F32, F32, grad, *([weights] if weights else []))
            updating = partial(adamw_launch, grad, weights, rounding)
            yield f"adamw grad {grad}, weights {weights}, {rounding}", updating, loads, stores

    for kind in quantize_op.LIMITS:
        chunks = [quantize_op.Quantized(empty(kind), empty(F32, SIZE // 256)) for _ in range(4)]
        for dtype, overwrite in ((F32, True), (BF16, False)):
            adding = partial(quantized_op.launch_quantized, empty(dtype), chunks, 0.5, 256, overwrite=overwrite)
            tile = quantize_op.TILE if kind == torch.int8 else quantize_op.TILE // 2
            there = [] if overwrite else [dtype]
            yield f"accumulate {kind} into {dtype}", adding, wide(tile, kind, *there), wide(tile, dtype)
        for dtype in (F32, BF16):
            tile, out = quantize_op.TILE, quantize_op.Quantized(empty(kind), empty(F32, SIZE // 256))
            leaving = partial(quantize_op._launch_quantize, empty(dtype), out, 256, None, None)
            yield f"quantize {dtype} -> {kind}", leaving, wide(tile, dtype), wide(tile, kind)
            returning = partial(quantize_op._launch_dequantize, *out, empty(dtype), 256)
            yield f"dequantize {kind} -> {dtype}", returning, wide(tile, kind), wide(tile, dtype)
            leaving = partial(quantize_op._launch_quantize, empty(F32), out, 256, None, empty(dtype))
            yield f"quantize {F32} - {dtype} -> {kind}", leaving, wide(tile, F32, dtype), wide(tile, kind)
            # With a residual the tile is half as large, so a thread's eight values of a byte each leave as 64 bits.
            tile = quantize_op.TILE_WITH_RESIDUAL
            leaving = partial(quantize_op._launch_quantize, empty(dtype), out, 256, empty(F32), None)
            yield f"quantize {dtype} -> {kind} with residual", leaving, wide(tile, dtype, F32), wide(tile, F32)


def corners() -> Iterator[Variant]:
    """Arguments that become constants when they are 1, addresses that are not aligned, elements of 64 bits."""
    odd = {dtype: empty(dtype, SIZE + 1)[1:] for dtype in (F32, BF16)}
    for size in (0, 1, 100):
        for dtype in (F32, F64):
            yield f"square_sum {dtype}[{size}]", partial(square_sum_op._launch, empty(dtype, size), None), 0, 0
    yield f"square_sum {F64}", partial(square_sum_op._launch, empty(F64), None), 0, 0
    yield "square_sum misaligned", partial(square_sum_op._launch, odd[BF16], None), 0, 0
    for dtype in (BF16, F64):
        adding = partial(accumulate_op._launch, empty(F32, 1), [empty(dtype, 1)], 1.0, overwrite=False)
        yield f"accumulate {dtype}[1]", adding, 0, 0
        adding = partial(accumulate_op._launch, empty(F64), [empty(dtype)] * 3, 0.5, overwrite=False)
        yield f"accumulate {dtype} to {F64}", adding, 0, 0
    for acc, chunk in ((F32, odd[BF16]), (F32, odd[F32]), (BF16, odd[BF16])):
        adding = partial(accumulate_op._launch, empty(acc), [chunk] * 3, 0.5, overwrite=False)
        yield f"accumulate misaligned {chunk.dtype} to {acc}", adding, 0, 0
    for seed in (0, 1, 16, 2**32 - 1):
        yield f"adamw seed {seed}", partial(adamw_launch, F32, BF16, StochasticRounding(seed, first=1)), 0, 0
    for dtype in (torch.int64, torch.complex64, F64):
        packing = partial(pack_op._launch, [empty(dtype)], empty(dtype), [0], 1.0)
        yield f"pack {dtype}", packing, 0, 0
        yield f"unpack {dtype}", partial(unpack_op._launch, empty(dtype), [empty(dtype)], [0], 1.0), 0, 0
    numbers = [empty(torch.int64), empty(torch.bool)]
    yield f"pack numbers to {F64}", partial(pack_op._launch, numbers, empty(F64, 2 * SIZE), [0, SIZE], 1.0), 0, 0
    for block in (16, 1024):
        out = quantize_op.Quantized(empty(torch.int8, 1), empty(F32, 1))
        leaving = partial(quantize_op._launch_quantize, empty(BF16, 1), out, block, None, None)
        yield f"quantize {BF16}[1], blocks of {block}", leaving, 0, 0
        yield (
            f"dequantize {BF16}[1], blocks of {block}",
            partial(quantize_op._launch_dequantize, *out, empty(BF16, 1), block),
            0,
            0,
        )


def adamw_launch(grad: torch.dtype, weights: torch.dtype | None, rounding: StochasticRounding | None) -> None:
    number = torch.ones(())
    settings = adamw_op._Settings(
        lr=number,
        step=number,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=torch.zeros(1),
        segments=Segments.build([0], [SIZE], "cpu"),
        clip=number,
        skip=number,
        zero_grad=True,
        rounding=rounding,
    )
    copy = None if weights is None else empty(weights)
    adamw_op._launch(adamw_op._Buffers(empty(F32), empty(F32), empty(F32), empty(grad), copy), settings)


def nvidia_report(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    accesses = Counter(re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", code))
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"] + sum(count for (name, _), count in accesses.items() if name in ("LDL", "STL")),
        "wide loads": sum(n for (name, how), n in accesses.items() if name == "LDG" and ".128" in how),
        "wide stores": sum(n for (name, how), n in accesses.items() if name == "STG" and ".128" in how),
    }


def amd_report(kernel: Any) -> dict[str, int]:
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return max(int(found) for found in re.findall(rf"\.{name}:\s*(\d+)", code))

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "local": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "wide stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
    }


def main() -> None:
    backend, arch = sys.argv[1].split(":")
    nvidia = backend == "cuda"
    torch.version.hip = None if nvidia else "as if"
    triton.runtime.driver.set_active(Driver(GPUTarget(backend, int(arch) if nvidia else arch, 32 if nvidia else 64)))
    compiled = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, **options: Any) -> None:
        compiled.append(run(self, *arguments, **options | {"warmup": True}))

    JITFunction.run = compile_only
    for name, launch, loads, stores in variants():
        launch()
        report = nvidia_report(compiled[-1]) if nvidia else amd_report(compiled[-1])
        print(json.dumps({"name": name, "expected loads": loads, "expected stores": stores, **report}), flush=True)


if __name__ == "__main__":
    main()
