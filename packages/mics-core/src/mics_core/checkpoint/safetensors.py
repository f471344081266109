"""The safetensors format: written tensor by tensor, which its library cannot, and read by the library.

A file is the length of a header, the header, which is JSON and says where each tensor lies, and the tensors' bytes, one
after another. There is no checksum.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mics_core.errors import ConfigError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls the dtypes of weights."""

_ALIGNED = 8
"""Tensors begin at a multiple of so many bytes of the file."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its length in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write(path: Path, entries: Sequence[Entry], tensors: Iterator[Tensor]) -> None:
    """Write a file of these entries, taking as many tensors, in their order; it appears when it is complete."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without which transformers 4 refuses it
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry in entries:
                _put(file, entry, next(tensors))  # which has no name here, so that it is gone before the next is made
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _put(file: BinaryIO, entry: Entry, tensor: Tensor) -> None:
    assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
    tensor = tensor.contiguous()
    if entry.bytes:
        file.write((ctypes.c_char * entry.bytes).from_address(tensor.data_ptr()))


class Files(Mapping[str, Tensor]):
    """The tensors of some files, which lie in memory that is read from the disk where it is used, and never written."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            for name, tensor in _mapped(path).items():
                if name in self._tensors:
                    raise ConfigError(
                        f"load_weights: {name} is in {self._paths[name]} and in {path}, expected it once: "
                        "remove one of the files"
                    )
                self._tensors[name], self._paths[name] = tensor, path

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        # files of others may begin anywhere, torch's tensors may not
        return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def meta(self, name: str) -> Tensor:
        """Its shape and dtype, as a tensor without memory."""
        return self._tensors[name].to("meta")

    def path(self, name: str) -> Path:
        """The file that holds it."""
        return self._paths[name]


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, which is as long as its header says."""
    try:
        file: Any = safe_open(path, "pt")
        # all at once, which reads none: one that is made between two copies takes the library eight times as long
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"load_weights: {path} cannot be read ({reason}), expected a whole safetensors file: fetch or write it "
            "again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ConfigError(
                f"load_weights: {name} is {tensor.dtype} in {path}, expected one of {', '.join(map(str, NAMES))}: "
                "convert the file"
            )
    return tensors
