"""A checkpoint on the disk, read in parts: into boxes of a rank's memory, tensor by tensor, object by object."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
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
from mics_core.checkpoint.manifest import Manifest, measure
from mics_core.checkpoint.writing import INDEX


class Stored:
    """A checkpoint whose manifest and index are sound, and whose files have the right lengths."""

    def __init__(self, path: Path) -> None:
        self.path = find(path)
        self.manifest = Manifest.read(self.path)
        self._check(INDEX, "which says where all parameters lie", checksum=True)
        self._reader = FileSystemReader(self.path)
        self.metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self.metadata, True)
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

    def read_object(self, name: Name) -> Any:
        """Something that was pickled; None if there is none."""
        if not isinstance(self.metadata.state_dict_metadata.get(str(name)), BytesStorageMetadata):
            return None
        index = MetadataIndex(str(name))
        empty = torch.Size([0])
        objects: dict[str, Any] = {}
        self._read([ReadItem(LoadItemType.BYTE_IO, index, empty, index, empty, empty)], {}, objects)
        return objects[str(name)]

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
        self, items: Sequence[ReadItem], memory: Mapping[MetadataIndex, torch.Tensor], objects: dict[str, Any]
    ) -> None:
        with torch.no_grad():
            self._reader.read_data(LoadPlan(list(items)), _Planner(memory, objects)).wait()

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

    def __init__(self, memory: Mapping[MetadataIndex, torch.Tensor], objects: dict[str, Any]) -> None:
        super().__init__()
        self._memory = memory
        self._objects = objects

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._memory[index]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self._objects[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=False)
