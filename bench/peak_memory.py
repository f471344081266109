"""The most memory that a piece of work needed: on a GPU torch's own, on a CPU what was resident of the process."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def unmeasured(device: torch.device) -> str | None:
    """Why it cannot be measured on this device; None if it can."""
    if device.type == "cpu":
        try:
            _RESET.write_text("5")
        except OSError as error:
            return f"peak memory of a CPU's process needs {_RESET}, which cannot be written here: {error.strerror}"
    return None


def held(device: torch.device) -> int:
    """Bytes in use now."""
    _give_back(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def forget(device: torch.device) -> None:
    """Let the peak be what is in use now."""
    _give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _RESET.write_text("5")


def highest(device: torch.device) -> int:
    """The most bytes in use since `forget`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cpu":  # where what was freed stays resident, for the next to use
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    (kilobytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    return 1024 * int(kilobytes)
