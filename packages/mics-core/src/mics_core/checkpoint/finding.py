"""Which checkpoint a path means; and where it means none that can be loaded, what is there instead."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mics_core.checkpoint.contents import own_name
from mics_core.checkpoint.folder import LATEST, Place, checkpoints_in
from mics_core.checkpoint.index import read_index
from mics_core.checkpoint.manifest import INDEX, MANIFEST, Damaged, Manifest
from mics_core.errors import NoCheckpoint

FOREIGN = (
    "to begin with the weights of another program's checkpoint run `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch {path} all.pt`, then "
    "mics.load_weights(torch.load('all.pt', mmap=True)['model'], model) if its model was saved as 'model'"
)
"""What to do with a torch.distributed.checkpoint that is not ours."""
_OF_A_RUN = "checkpoints"  # where a run's folder has them


def find(path: Path) -> Path:
    """The directory of a checkpoint, given itself, a folder whose `latest` names one, that file, or a run's folder."""
    if path.name == LATEST and not path.is_dir():
        path = path.parent
    if not (path / MANIFEST).is_file() and (path / _OF_A_RUN / LATEST).is_file():
        path = path / _OF_A_RUN
    pointer = path / LATEST
    if not (path / MANIFEST).is_file() and pointer.is_file():
        name = pointer.read_text(errors="replace").strip()
        path = path / name
        if not name or path.name != name:
            raise RuntimeError(f"load: {pointer} is damaged, expected a name: {_another(pointer)}")
    replaced = Place(path).replaced if path.name and not path.name.startswith(".") else path
    if not path.exists() and (replaced / MANIFEST).is_file():
        return replaced  # killed between two renames
    if (path / MANIFEST).is_file():
        return path
    whole = _complete(path)
    if len(whole) == 1 and (whole[0] / LATEST).is_file():
        return whole[0]  # of the first save here, killed before it moved that file
    raise _instead(path, pointer)


@contextmanager
def or_another(path: Path) -> Iterator[None]:
    """Let the error of a damaged checkpoint name one that can be loaded."""
    try:
        yield
    except Damaged as error:
        raise RuntimeError(f"{error}: {_another(path)}") from error


def _instead(path: Path, pointer: Path) -> RuntimeError:
    """What to say of a path without a manifest; `pointer` is the `latest` that has named it, if it is there."""
    try:
        there = set(os.listdir(path))
    except FileNotFoundError:
        there = set()
    none = "has no files of one" if there else "does not exist or is empty"
    lost = [name for name in (MANIFEST, INDEX) if not (path / name).is_file()]
    if INDEX in there and not _is_ours(path / INDEX):
        return RuntimeError(
            f"load: {path} is a torch.distributed.checkpoint without the {MANIFEST} of a complete one of mics.save, "
            f"expected that: {FOREIGN.format(path=path)}"
        )
    if INDEX in there or any(name.endswith(".distcp") for name in there):
        return RuntimeError(
            f"load: the checkpoint {path} lacks {' and '.join(lost)}, expected them beside its other files: "
            f"{_another(path)}"
        )
    if pointer.is_file():
        return RuntimeError(f"load: {pointer} names {path.name}, which {none}: {_another(path)}")
    for folder in (path, path / _OF_A_RUN):
        if whole := _complete(folder):
            return RuntimeError(
                f"load: {folder} has no file {LATEST}, which names the checkpoint to load, and has the complete ones "
                f"{', '.join(each.name for each in whole)}: give the path of one; the newest is {whole[-1]}"
            )
    return NoCheckpoint(
        f"load: the checkpoint {path} {none}, expected a directory with a {MANIFEST}, or one whose {LATEST} or "
        f"{_OF_A_RUN}/{LATEST} names such: {_another(path, 'give another path')}"
    )


def _is_ours(index: Path) -> bool:
    try:
        return str(own_name(0)) in read_index(index.read_bytes(), index).state_dict_metadata
    except Damaged:  # or of classes that only others have in theirs
        return False


def _another(path: Path, otherwise: str = "load another checkpoint") -> str:
    """What to do without this checkpoint: an older one is named, so that who follows never comes back."""
    others = _complete(path.parent, before=path)
    if not others:
        return otherwise
    return (
        f"load {others[-1]}, the newest complete one before it, by its path, or write its name into "
        f"{path.parent / LATEST}"
    )


def _complete(folder: Path, before: Path | None = None) -> list[Path]:
    """The checkpoints in a folder that have all their files, from the oldest on; bytes are not compared."""
    found = dict(checkpoints_in(folder))
    end = found[before].number if before in found else math.inf
    whole = [(each.number, path) for path, each in found.items() if each.number < end and _has_files(path, each)]
    return [path for _, path in sorted(whole)]


def _has_files(path: Path, manifest: Manifest) -> bool:
    return all(
        (path / name).is_file() and (path / name).stat().st_size == entry.bytes
        for name, entry in manifest.files.items()
    )
