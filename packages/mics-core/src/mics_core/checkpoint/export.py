"""A checkpoint's weights as safetensors files, written tensor by tensor: no more than one is in memory at a time.

The format is simple enough to write without a library: the length of a header, the header, which is JSON and says where
each tensor lies, and the tensors' bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mics_core.checkpoint.reading import Stored
from mics_core.errors import ConfigError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def export(checkpoint: Path, out: Path, dtype: torch.dtype | None = None, shard_bytes: int | None = None) -> list[Path]:
    """Write the model's weights and buffers to `out`, in this dtype if they are floating point; the files written.

    With `shard_bytes` they are spread over files of at most so many bytes of tensors, and an index names them:
    model.safetensors becomes model-00001-of-00003.safetensors and so on, and model.safetensors.index.json.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"export: the output is {out}, expected a name that ends in .safetensors")
    stored = Stored(checkpoint)
    stored.verify(0, 1)
    entries = []
    for full, entry in sorted(stored.tensors.items()):
        if full.startswith("model."):
            given = entry.properties.dtype
            chosen = dtype if dtype is not None and given.is_floating_point else given
            if chosen not in NAMES:
                raise ConfigError(f"export: {full} is {chosen}, which safetensors cannot hold: choose a dtype")
            entries.append(_Entry(full.removeprefix("model."), tuple(entry.size), chosen))
    parts = _spread(entries, shard_bytes)
    paths = [out]
    if len(parts) > 1:
        paths = [out.with_stem(f"{out.stem}-{number:05}-of-{len(parts):05}") for number in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        _write(path, part, stored)
    if len(parts) > 1:
        where = {entry.name: path.name for path, part in zip(paths, parts, strict=True) for entry in part}
        index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": where}
        out.with_name(f"{out.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths


def _spread(entries: list[_Entry], limit: int | None) -> list[list[_Entry]]:
    """In order, as many to a file as fit; one that is larger has a file of its own."""
    parts: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if limit is not None and parts[-1] and size + entry.bytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.bytes
    return parts


def _write(path: Path, entries: list[_Entry], stored: Stored) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            value = stored.whole(f"model.{entry.name}").to(entry.dtype).contiguous()
            if entry.bytes:
                file.write((ctypes.c_char * entry.bytes).from_address(value.data_ptr()))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
