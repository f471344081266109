"""A checkpoint on the disk, read in parts: into boxes of a rank's memory, tensor by tensor, object by object."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mics_core.checkpoint.contents import Cut, Name
from mics_core.checkpoint.folder import find
from mics_core.checkpoint.index import read_index
from mics_core.checkpoint.manifest import Manifest, measure
from mics_core.checkpoint.writing import INDEX

_THREADS = 4
"""What is read is copied twice, so one thread is slower than a disk."""


class Stored:
    """A checkpoint whose manifest and index are sound, and whose files have the right lengths."""

    def __init__(self, path: Path) -> None:
        self.path = find(path)
        self.manifest = Manifest.read(self.path)
        self._check(INDEX, "which says where all parameters lie", checksum=True)
        self._reader = _Reader(self.path)
        self.metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self.metadata, True)
        self._places: dict[str, set[tuple[str, int]]] | None = None
        for name in self.manifest.files:
            self._check(name, self._holds(name), checksum=False)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The tensors, whole, by name."""
        stored = self.metadata.state_dict_metadata
        return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}

    def verify(self, share: int, shares: int) -> None:
        """Raise if one of this share of the files does not have the checksum that it had when written."""
        for name in sorted(self.manifest.files)[share::shares]:
            self._check(name, self._holds(name), checksum=True)

    def tied(self, name: str, other: str) -> bool:
        """Whether these are two names of the same bytes."""
        return self._bytes_of(name) == self._bytes_of(other)

    def read_object(self, name: Name, *, plain: bool = False) -> Any:
        """Something that was pickled; None if there is none. If it should be plain, nothing but tensors, numbers, texts
        and collections of them is made, and what holds anything else raises a pickle.UnpicklingError.
        """
        if not isinstance(self.metadata.state_dict_metadata.get(str(name)), BytesStorageMetadata):
            return None
        index = MetadataIndex(str(name))
        empty = torch.Size([0])
        objects: dict[str, io.BytesIO] = {}
        self._read([ReadItem(LoadItemType.BYTE_IO, index, empty, index, empty, empty)], {}, objects)
        return torch.load(objects[str(name)], map_location="cpu", weights_only=plain)

    def read(self, cuts: Iterable[Cut], wholes: Mapping[str, torch.Tensor]) -> None:
        """Fill what this rank holds of these tensors."""
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
        self._read(items, memory, {})

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
        with ThreadPoolExecutor(_THREADS) as threads:
            for done in [threads.submit(self._reader.read_data, plan, planner) for plan in plans]:
                done.result()

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

    def _check(self, name: str, holds: str, *, checksum: bool) -> None:
        path, entry = self.path / name, self.manifest.files[name]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            trouble = "is missing"
        elif size != entry.bytes:
            trouble = f"has {size} bytes, expected {entry.bytes}"
        elif checksum and measure(path) != entry:
            trouble = "has another checksum than when it was written"
        else:
            return
        raise RuntimeError(f"load: {path}, {holds}, {trouble}: load another checkpoint")


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


class _Reader(FileSystemReader):
    """Reads the index as one that an attacker may have written."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        found = read_index(Path(self.path) / INDEX)
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found
