"""One rank's file of a checkpoint, and the index of all files, as torch.distributed.checkpoint writes them."""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from mics_core.checkpoint.at_disk import Task
from mics_core.checkpoint.boxes import Box
from mics_core.checkpoint.contents import Contents, Cut, Name, own_name
from mics_core.checkpoint.folder import naming, write_durably
from mics_core.checkpoint.manifest import INDEX, Entry, measure
from mics_core.spec.topology import Rungs

_LARGE = 1 << 20  # bytes that are worth another thread, which adds them up while they are written
_AHEAD = 1 << 26  # bytes after which the disk is set to work: all at the end would take it as long again
_BEHIND = 1 << 30  # bytes that wait for the disk at most: a call that brings all to a slow one would look like a hang


@dataclass(frozen=True)
class Written:
    """A rank's file."""

    name: str
    entry: Entry
    spans: bytes
    """Offset and length of each item, in the order of the plan: few bytes, because all ranks hear them."""


def write(folder: Path, contents: Contents, rank: int, rungs: Rungs) -> Written:
    """Write this rank's part and bring it to the disk."""
    world = rungs.topology.world
    data: dict[MetadataIndex, torch.Tensor | bytes] = {}
    items: list[WriteItem] = []
    for cut, box in contents.mine(rungs.piece_number(rank, world), world):
        items.append(_cut_item(cut, box))
        data[items[-1].index] = _alone(cut.values(box).detach())
    for item, value in _rest(contents, rank):
        items.append(item)
        data[item.index] = value
    files = _Files()
    writer = FileSystemWriter(folder)
    writer.fs = files
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [SavePlan(items)])[rank]
    with _no_second_checksum(), naming(folder / f"__{rank}_0.distcp"):
        results = {result.index: result for result in writer.write_data(plan, _Planner(data)).value()}
    ordered = [results[item.index] for item in items]
    spans = array("q", [number for r in ordered for number in (r.storage_data.offset, r.storage_data.length)])
    name, entry = files.only()
    return Written(name, entry, spans.tobytes())


def write_index(folder: Path, contents: Contents, rungs: Rungs, written: list[Written]) -> Entry:
    """Write, on rank 0, where everything lies, given all ranks' files."""
    world = rungs.topology.world
    rank_of = {rungs.piece_number(rank, world): rank for rank in range(world)}
    spans = [_pairs(file.spans) for file in written]  # in the order in which each rank wrote
    places: dict[MetadataIndex, _StorageInfo] = {}
    entries: dict[str, STORAGE_TYPES] = {}

    def place(index: MetadataIndex, rank: int) -> None:
        places[index] = _StorageInfo(written[rank].name, *next(spans[rank]))

    for cut in contents.cuts:
        chunks = []
        for piece in cut.pieces(world):
            for box in cut.boxes(piece, world):
                chunks.append(_chunk(box))
                place(MetadataIndex(str(cut.name), chunks[-1].offsets), rank_of[piece])
        entries[str(cut.name)] = TensorStorageMetadata(TensorProperties(cut.local.dtype), torch.Size(cut.shape), chunks)
    for rank in range(world):
        for item, _ in _rest(contents, rank):
            told = item.tensor_data
            entries[item.index.fqn] = (
                BytesStorageMetadata()
                if told is None
                else TensorStorageMetadata(told.properties, told.size, [told.chunk])
            )
            place(item.index, rank)
    keys: dict[str, tuple[str | int, ...]] = {str(name): name.keys for name in _names(contents, world)}
    of_first: dict[str, list[MetadataIndex]] = {str(first): [] for first in contents.aliases.values()}
    for index in places:
        if index.fqn in of_first:
            of_first[index.fqn].append(index)
    for other, first in contents.aliases.items():  # the same bytes under another name
        entries[other] = entries[str(first)]
        keys[other] = ("model", other.removeprefix("model."))
        places |= {replace(index, fqn=other): places[index] for index in of_first[str(first)]}
    about = FileSystemWriter(folder).storage_meta()
    write_durably(folder / INDEX, pickle.dumps(Metadata(entries, keys, places, about)))
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
    chunk = _chunk(box)
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(str(name), chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


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
        with Path(path).open(mode) as file, _Measured(file) as stream:
            self._streams[Path(path).name] = stream
            yield stream


class _Measured(io.RawIOBase):
    """A file, its length and checksum; it goes to the disk while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None
        self._latest: Task[None] | None = None
        self._given = 0
        self._synced = 0
        self.length = 0
        self.checksum = 0

    def write(self, data: Any) -> int:
        summing = Task(partial(zlib.crc32, data, self.checksum)) if len(data) >= _LARGE else None
        whole = memoryview(data)
        for begin in range(0, len(data), _AHEAD):
            self._give(whole[begin : begin + _AHEAD])
        self.checksum = zlib.crc32(data, self.checksum) if summing is None else summing.result()
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

    def close(self) -> None:
        if self._latest is not None:
            self._latest.wait()
        super().close()  # which flushes

    def _give(self, piece: memoryview) -> None:
        try:
            if self._error is None:
                self._file.write(piece)
        except OSError as error:  # C++ called, and reports no reason: `flush`, which comes next, does
            self._error = error
        self._given += len(piece)
        waiting = self._given - self._synced
        if waiting >= _AHEAD and (self._latest is None or self._latest.wait(None if waiting >= _BEHIND else 0)):
            self._latest, self._synced = Task(self._sync), self._given

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file.fileno())
        except OSError as error:  # told once: the sync at the end would not hear of it
            self._error = error
