"""The one rule that picks Triton or the torch reference, and the one place that imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:  # Triton's language is built by decorators that a type checker cannot follow.
    triton: Any
    tl: Any
    INSTALLED: bool
else:
    try:
        import triton
        import triton.language as tl

        INSTALLED = True
    except ModuleNotFoundError as error:
        if error.name != "triton":  # Triton is there and broken: hiding that would be a silent fallback.
            raise
        triton = tl = None
        INSTALLED = False

INTERPRETED: bool = INSTALLED and bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1 was set when this module was imported: kernels run on the CPU, in numpy."""

_INTERPRETER = Lock()
"""The interpreter swaps parts of Triton's language while a kernel runs: one thread at a time."""

OLDEST_CAPABILITY = (8, 0)
"""bf16 arithmetic and conversions are instructions from sm_80 on; below it Triton refuses our kernels."""


class Backend(NamedTuple):
    """Which implementation runs for a device, and why, as a sentence's second half."""

    name: str
    reason: str

    @property
    def is_triton(self) -> bool:
        """Whether Triton kernels run, compiled or interpreted."""
        return self.name == "triton"


def constexpr(value: Any) -> Any:
    """A module-level constant that kernels may read."""
    return tl.constexpr(value) if INSTALLED else value


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` where Triton is installed; elsewhere the function is never called."""
    return triton.jit(function) if INSTALLED else function


@lru_cache(maxsize=64)
def backend(device: torch.device | str) -> Backend:
    """Say which implementation every op of this package uses for tensors on `device`, and why."""
    device = torch.device(device)
    if not INSTALLED:
        return Backend("reference", "Triton is not installed")
    if INTERPRETED:
        return Backend("triton", "TRITON_INTERPRET=1 asks for Triton's interpreter on every device")
    if device.type == "cpu":
        return Backend("reference", "Triton compiles for GPUs and these tensors are on the CPU")
    if device.type != "cuda":  # ROCm calls itself cuda, too
        return Backend("reference", f"these kernels are checked on CUDA and ROCm, not on {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return Backend("reference", f"compute capability {capability} is below {OLDEST_CAPABILITY}")
    return Backend("triton", f"Triton {triton.__version__} compiles for {torch.cuda.get_device_name(device)}")


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run `programs` instances of `kernel` on `device`, in its current stream.

    Products and sums stay apart (no fused multiply-add): these kernels wait for memory anyway, and so a GPU, the
    interpreter and the reference round alike. 64 registers a thread let half of a GPU's threads be in flight.
    """
    if programs == 0:
        return
    # 128 threads either way: AMD counts wider warps. It has four times the registers, and its compiler no such limit.
    options = {"num_warps": 2} if torch.version.hip else {"num_warps": 4, "maxnreg": 64}
    with torch.cuda.device(device) if device.type == "cuda" else _INTERPRETER:
        kernel[(programs,)](*arguments, **constants, **options, enable_fp_fusion=False)
