"""A checkpoint on the disk, read in parts: into boxes of a rank's memory, tensor by tensor, object by object."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mics_core.checkpoint.at_disk import Task
from mics_core.checkpoint.contents import Cut, Name
from mics_core.checkpoint.finding import find, or_another
from mics_core.checkpoint.index import read_index
from mics_core.checkpoint.manifest import INDEX, MANIFEST, Damaged, Entry, Manifest, measured
from mics_core.checkpoint.opened import Opened
from mics_core.checkpoint.plain import unpacked

_THREADS = 4
"""What is read is copied twice, so one thread is slower than a disk."""


class Stored:
    """A checkpoint whose manifest and index are sound, and whose files have the right lengths."""

    def __init__(self, path: Path) -> None:
        self.path = find(path)
        self._opened = Opened(self.path)
        self._places: dict[str, set[tuple[str, int]]] | None = None
        with or_another(self.path):
            with self._opened.stream(MANIFEST) as file:
                self.manifest = Manifest.parse(file.read(), self.path / MANIFEST)
            self._check(INDEX, lambda _: "which says where all parameters lie", checksum=True)
            with self._opened.stream(INDEX) as file:
                self.metadata: Metadata = read_index(file.read(), self.path / INDEX)
            for name in self.manifest.files:
                self._check(name, self._holds, checksum=False)
            strange = {at.relative_path for at in self.metadata.storage_data.values()}.difference(self.manifest.files)
            if strange:
                raise Damaged(f"load: {self.path / INDEX} names {min(strange)}, which {MANIFEST} does not")
        self._reader = FileSystemReader(self.path)
        self._reader.fs = _Files(self._opened)
        self._reader.set_up_storage_reader(self.metadata, True)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The tensors, whole, by name."""
        stored = self.metadata.state_dict_metadata
        return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}

    def verify(self, share: int, shares: int) -> None:
        """Raise if one of this share of the files does not have the checksum that it had when written."""
        with or_another(self.path):
            for name in sorted(self.manifest.files)[share::shares]:
                self._check(name, self._holds, checksum=True)

    def tied(self, name: str, other: str) -> bool:
        """Whether these are two names of the same bytes."""
        return self._bytes_of(name) == self._bytes_of(other)

    def read_object(self, name: Name, also: Sequence[Any] = ()) -> Any:
        """Something that was packed, None if there is none; `also` says what it may hold but plain data and tensors."""
        if not isinstance(self.metadata.state_dict_metadata.get(str(name)), BytesStorageMetadata):
            return None
        index = MetadataIndex(str(name))
        empty = torch.Size([0])
        objects: dict[str, io.BytesIO] = {}
        self._read([ReadItem(LoadItemType.BYTE_IO, index, empty, index, empty, empty)], {}, objects)
        return unpacked(objects[str(name)], f"the {name} of {self.path}", also)

    def read(self, cuts: Iterable[Cut], wholes: Mapping[str, torch.Tensor]) -> None:
        """Fill what this rank holds of these tensors."""
        self._read(*self._wanted(cuts, wholes), {})

    def planned(self, cuts: Iterable[Cut], wholes: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """The same, later: what is called then finds all files open that it needs, whoever removes them meanwhile."""
        items, memory = self._wanted(cuts, wholes)
        self._opened.hold({self.metadata.storage_data[item.storage_index].relative_path for item in items})
        return partial(self._read, items, memory, {})

    def _wanted(
        self, cuts: Iterable[Cut], wholes: Mapping[str, torch.Tensor]
    ) -> tuple[list[ReadItem], dict[MetadataIndex, torch.Tensor]]:
        items: list[ReadItem] = []
        memory: dict[MetadataIndex, torch.Tensor] = {}
        for cut in cuts:
            named = {MetadataIndex(str(cut.name), box.offsets): cut.values(box) for box in cut.held()}
            items += self._items(str(cut.name), named)
            memory |= named
        for name, tensor in wholes.items():
            named = {MetadataIndex(name, (0,) * tensor.dim()): tensor}
            items += self._items(name, named)
            memory |= named
        return items, memory

    def whole(self, name: str) -> torch.Tensor:
        """One tensor."""
        entry = self.tensors[name]
        shape = tuple(entry.size)
        flat = torch.empty(entry.size.numel(), dtype=entry.properties.dtype)
        self.read([Cut(Name((name,)), shape, 0, len(flat), flat, 0)], {})
        return flat.view(shape)

    def _items(self, name: str, memory: Mapping[MetadataIndex, torch.Tensor]) -> list[ReadItem]:
        chunks = [ChunkStorageMetadata(index.offset or torch.Size(()), value.shape) for index, value in memory.items()]
        return create_read_items_for_chunk_list(name, self.tensors[name], chunks)

    def _read(
        self, items: Sequence[ReadItem], memory: Mapping[MetadataIndex, torch.Tensor], objects: dict[str, io.BytesIO]
    ) -> None:
        planner = _Planner(memory, objects)
        share = -(-len(items) // _THREADS) or 1
        plans = [LoadPlan(list(items[first : first + share])) for first in range(0, len(items), share)]
        tasks = [Task(partial(self._reader.read_data, plan, planner)) for plan in plans]
        for task in tasks:
            task.wait()  # all write to memory of the caller's, so none goes on when one has failed
        for task in tasks:
            task.result()

    def _bytes_of(self, name: str) -> set[tuple[str, int]]:
        if self._places is None:
            self._places = defaultdict(set)
            for index, at in self.metadata.storage_data.items():
                self._places[index.fqn].add((at.relative_path, at.offset))
        return self._places[name]

    def _holds(self, file: str) -> str:
        places = self.metadata.storage_data
        names = sorted({index.fqn for index, at in places.items() if at.relative_path == file})
        first = next((name for name in names if name.startswith("model.")), names[0] if names else "nothing")
        return f"which holds {first}" + (f" and {len(names) - 1} others" if len(names) > 1 else "")

    def _check(self, name: str, holds: Callable[[str], str], *, checksum: bool) -> None:
        entry, size = self.manifest.files[name], self._opened.size(name)
        if size is None:
            trouble = "is missing"
        elif size != entry.bytes:
            trouble = f"has {size} bytes, expected {entry.bytes}"
        elif checksum and self._measured(name) != entry:
            trouble = "has another checksum than when it was written"
        else:
            return
        raise Damaged(f"load: {self.path / name}, {holds(name)}, {trouble}")

    def _measured(self, name: str) -> Entry:
        with self._opened.stream(name) as file:
            return measured(file)


class _Planner(DefaultLoadPlanner):
    """Tells the reader where things go."""

    def __init__(self, memory: Mapping[MetadataIndex, torch.Tensor], objects: dict[str, io.BytesIO]) -> None:
        super().__init__()
        self._memory = memory
        self._objects = objects

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._memory[index]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self._objects[read_item.dest_index.fqn] = value


class _Files(FileSystem):
    """The files of an opened directory, by their names in it."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:  # noqa: ARG002
        return suffix

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:  # noqa: ARG002
        with self._opened.stream(str(path)) as stream:
            yield cast(io.IOBase, stream)
