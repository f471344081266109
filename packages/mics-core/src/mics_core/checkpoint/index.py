"""The index of a checkpoint, a pickle of torch's, read without running or changing what one could hide in it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mics_core.checkpoint.manifest import Damaged

_OF_METADATA = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
)
"""The classes of which an index has instances."""


def read_index(content: bytes, path: Path) -> metadata.Metadata:
    """The index of a checkpoint, of this path; Damaged, of one sentence, if it is anything else."""
    try:
        found = _Index(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Damaged(f"load: {path} is no index of a checkpoint and not to be trusted, {error}") from error
    if not isinstance(found, metadata.Metadata):
        raise Damaged(f"load: {path} holds a {type(found).__name__}, expected the index of a checkpoint")
    return found


_PATHS = ("pathlib", "pathlib._local")  # the latter in Python 3.13


class _Index(pickle.Unpickler):
    """Reads an index: exact names and nothing else, and none of the classes comes out changed.

    From protocol 4 on a name is followed through dots, so a prefix of an honest module would lead anywhere. And a
    pickle may set attributes of what it names: of a class they would stay.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The classes of an index, dtypes and shapes."""
        if module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype)):
            return vars(torch)[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: torch.serialization._get_layout(layout)  # type: ignore[no-untyped-call]
        if module in _PATHS and name in ("PosixPath", "WindowsPath"):
            return lambda *parts: PurePath(*parts)
        if (module, name) == ("builtins", "getattr"):
            return _member
        for known in _OF_METADATA:
            if (module, name) == (known.__module__, known.__name__):
                return known
        raise pickle.UnpicklingError(f"the index holds {module}.{name}, which no index holds")

    def load(self) -> Any:
        """What the file holds; raises, and leaves the classes as they were, if it changes one of them."""
        before = {known: dict(vars(known)) for known in _OF_METADATA}
        try:
            return super().load()
        finally:
            changed = [known.__name__ for known, attributes in before.items() if _put_back(known, attributes)]
            if changed:
                raise pickle.UnpicklingError(f"the index changes {', '.join(changed)}, which no index does")


def _member(kind: object, name: object) -> metadata._MEM_FORMAT_ENCODING:
    """What Python before 3.11.4 looks up as an attribute: a member of the enum of memory formats, and nothing else."""
    if kind is not metadata._MEM_FORMAT_ENCODING or name not in metadata._MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("the index holds builtins.getattr of another object, which no index holds")
    return metadata._MEM_FORMAT_ENCODING[str(name)]


def _put_back(known: type, attributes: dict[str, Any]) -> bool:
    """Give a class the attributes that it had; whether it had others."""
    now = dict(vars(known))
    different = {n for n in now.keys() | attributes.keys() if now.get(n, known) is not attributes.get(n, known)}
    for name in different:
        if name in attributes:
            setattr(known, name, attributes[name])
        else:
            delattr(known, name)
    return bool(different)
