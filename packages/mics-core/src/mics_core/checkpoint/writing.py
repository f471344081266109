"""One rank's file of a checkpoint, and the index of all files, as torch.distributed.checkpoint writes them."""

from __future__ import annotations

import ctypes
import io
import os
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from mics_core.checkpoint.boxes import Box
from mics_core.checkpoint.contents import Contents, Cut, Name, own_name
from mics_core.checkpoint.manifest import Entry, measure
from mics_core.topology import Rungs

INDEX = ".metadata"


@dataclass(frozen=True)
class Written:
    """A rank's file."""

    name: str
    entry: Entry
    spans: bytes
    """Offset and length of each item, in the order of the plan: few bytes, because all ranks hear them."""


def write(folder: Path, contents: Contents, rank: int, rungs: Rungs) -> tuple[Written, list[WriteResult]]:
    """Write this rank's part and bring it to the disk."""
    world = rungs.topology.world
    data: dict[MetadataIndex, torch.Tensor | bytes] = {}
    items: list[WriteItem] = []
    for cut, box in contents.mine(rungs.piece(rank, world), world):
        items.append(_cut_item(cut, box))
        data[items[-1].index] = _alone(cut.values(box).detach())
    for item, value in _rest(contents, rank):
        items.append(item)
        data[item.index] = value
    files = _Files()
    writer = FileSystemWriter(folder)
    writer.fs = files
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [SavePlan(items)])[rank]
    with _no_second_checksum():
        results = {result.index: result for result in writer.write_data(plan, _Planner(data)).value()}
    ordered = [results[item.index] for item in items]
    spans = array("q", [number for r in ordered for number in (r.storage_data.offset, r.storage_data.length)])
    name, entry = files.only()
    return Written(name, entry, spans.tobytes()), ordered


def write_index(
    folder: Path, contents: Contents, rungs: Rungs, written: list[Written], results: list[WriteResult]
) -> Entry:
    """Write, on rank 0, where everything lies, given all ranks' files and rank 0's results."""
    world = rungs.topology.world
    rank_of = {rungs.piece(rank, world): rank for rank in range(world)}
    plans: list[list[WriteItem]] = [[] for _ in range(world)]
    for cut in contents.cuts:
        for piece in cut.pieces(world):
            plans[rank_of[piece]] += [_cut_item(cut, box) for box in cut.boxes(piece, world)]
    for rank, plan in enumerate(plans):
        plan += [item for item, _ in _rest(contents, rank)]
    _, metadata = create_default_global_save_plan([SavePlan(plan) for plan in plans])
    everything = [
        WriteResult(item.index, size, replace(results[0].storage_data, relative_path=file.name, offset=at, length=size))
        for plan, file in zip(plans, written, strict=True)
        for item, (at, size) in zip(plan, _pairs(file.spans), strict=True)
    ]
    metadata.planner_data = {str(name): name.keys for name in _names(contents, world)}
    by_name: dict[str, list[WriteResult]] = {}
    for result in everything:
        by_name.setdefault(result.index.fqn, []).append(result)
    for other, first in contents.aliases.items():  # the same bytes under another name
        metadata.state_dict_metadata[other] = metadata.state_dict_metadata[str(first)]
        metadata.planner_data[other] = ("model", other.removeprefix("model."))
        everything += [replace(result, index=replace(result.index, fqn=other)) for result in by_name[str(first)]]
    FileSystemWriter(folder).finish(metadata, [everything])
    return measure(folder / INDEX)


@contextmanager
def _no_second_checksum() -> Iterator[None]:
    """torch.save computes one of each tensor, which no reader looks at, and which takes longer than writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _alone(part: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that ends where its memory ends: of any other part torch would write a copy."""
    if part.device.type != "cpu" or not part.numel():
        return part
    memory = (ctypes.c_char * part.nbytes).from_address(part.data_ptr())
    return torch.frombuffer(memory, dtype=part.dtype).view(part.shape)


def _names(contents: Contents, world: int) -> Iterator[Name]:
    yield from (cut.name for cut in contents.cuts)
    yield from contents.wholes
    yield from contents.objects
    yield from (own_name(rank) for rank in range(world))


def _rest(contents: Contents, rank: int) -> Iterator[tuple[WriteItem, torch.Tensor | bytes]]:
    """What a rank writes apart from cut tensors."""
    if rank == 0:
        for name, value in contents.wholes.items():
            whole = Box((0,) * value.dim(), tuple(value.shape), 0)
            yield _tensor_item(name, whole, tuple(value.shape), value.dtype), value
        for name, content in contents.objects.items():
            yield WriteItem(MetadataIndex(str(name)), WriteItemType.BYTE_IO), content
    yield WriteItem(MetadataIndex(str(own_name(rank))), WriteItemType.BYTE_IO), contents.own


def _cut_item(cut: Cut, box: Box) -> WriteItem:
    return _tensor_item(cut.name, box, cut.shape, cut.local.dtype)


def _tensor_item(name: Name, box: Box, shape: tuple[int, ...], dtype: torch.dtype) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(str(name), chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _pairs(spans: bytes) -> Iterator[tuple[int, int]]:
    numbers = iter(array("q", spans))
    return zip(numbers, numbers, strict=True)


class _Planner(DefaultSavePlanner):
    """Hands the writer what the items stand for."""

    def __init__(self, data: dict[MetadataIndex, torch.Tensor | bytes]) -> None:
        super().__init__()
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        value = self._data[write_item.index]
        return io.BytesIO(value) if isinstance(value, bytes) else value


class _Files(FileSystem):
    """Measures files while they are written."""

    def __init__(self) -> None:
        self._streams: dict[str, _Measured] = {}

    def only(self) -> tuple[str, Entry]:
        """The one file that was written."""
        ((name, stream),) = self._streams.items()
        return name, Entry(stream.length, stream.checksum)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with Path(path).open(mode) as file:
            stream = self._streams[Path(path).name] = _Measured(file)
            yield stream


class _Measured(io.RawIOBase):
    """A file, its length and checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None
        self.length = 0
        self.checksum = 0

    def write(self, data: Any) -> int:
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:  # C++ called, and reports no reason: `flush`, which comes next, does
            self._error = error
        self.checksum = zlib.crc32(data, self.checksum)
        self.length += len(data)
        return len(data)

    def tell(self) -> int:
        return self.length

    def flush(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()
