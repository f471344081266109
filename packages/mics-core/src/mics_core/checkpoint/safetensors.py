"""The safetensors format: written tensor by tensor, read by mapping files into memory.

It needs no library: the length of a header, the header, which is JSON and says where each tensor lies, and the tensors'
bytes, one after another. There is no checksum.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mics_core.errors import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By what the format calls them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

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


@dataclass(frozen=True)
class _Placed:
    """A tensor in a file."""

    entry: Entry
    path: Path
    raw: Tensor  # the bytes, in mapped memory


class Files(Mapping[str, Tensor]):
    """The tensors of some files, which lie in memory that is read from the disk where it is used, and never written."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._placed: dict[str, _Placed] = {}
        for path in paths:
            for name, placed in _placed(path).items():
                if name in self._placed:
                    raise ConfigError(
                        f"load_weights: {name} is in {self._placed[name].path} and in {path}, expected it once: "
                        "remove one of the files"
                    )
                self._placed[name] = placed

    def __getitem__(self, name: str) -> Tensor:
        placed = self._placed[name]
        raw, entry = placed.raw, placed.entry
        if not entry.bytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if raw.storage_offset() % entry.dtype.itemsize:
            raw = raw.clone()  # files of others may begin anywhere, torch's tensors may not
        return raw.view(entry.dtype).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._placed)

    def meta(self, name: str) -> Tensor:
        """Its shape and dtype, as a tensor without memory."""
        entry = self._placed[name].entry
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def path(self, name: str) -> Path:
        """The file that holds it."""
        return self._placed[name].path


def _placed(path: Path) -> dict[str, _Placed]:
    """The tensors of one file, which is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        said = sorted(
            (*map(int, entry["data_offsets"]), name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"has {size} bytes and no sound header of {length}") from error
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    placed: dict[str, _Placed] = {}
    at = 0
    for begin, end, name, dtype, shape in said:
        if dtype not in DTYPES:
            raise ConfigError(
                f"load_weights: {name} is {dtype!r} in {path}, expected one of {', '.join(DTYPES)}: convert the file"
            )
        entry = Entry(name, shape, DTYPES[dtype])
        if begin != at or end != at + entry.bytes or min(shape, default=0) < 0:
            raise _damaged(path, f"has {name}, {shape} of {dtype}, at bytes {begin} to {end} after {at}")
        placed[name] = _Placed(entry, path, mapped[begin:end])
        at = end
    if at != len(mapped):
        raise _damaged(path, f"has {size} bytes, and its header tells of {8 + length + at}")
    return placed


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"load_weights: {path} {what}, expected a whole safetensors file: fetch or write it again")
