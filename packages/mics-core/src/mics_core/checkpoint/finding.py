"""Which checkpoint a path means; and where it means none that can be loaded, what is there instead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mics_core.checkpoint.contents import own_name
from mics_core.checkpoint.folder import LATEST, replaced
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
_OF_OTHERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Errors of what is no checkpoint, such as a file or lost+found; any other leaves open what is there."""


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
    if (path / MANIFEST).is_file():
        return path
    if (replaced(path) / MANIFEST).is_file() and not path.exists():
        return replaced(path)  # killed between two renames
    if (path / MANIFEST).is_file():
        return path  # which a save under way has put there since the first look
    for folder in (path, path / _OF_A_RUN):
        seen = _seen(folder)
        if len(seen) == 1 and all((seen[0] / name).is_file() for name in (LATEST, MANIFEST)):
            return seen[0]  # of the first save here, killed before it moved that file
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
    there = _listed(path)
    none = "has no files of one" if there else "does not exist or is empty"
    lost = [name for name in (MANIFEST, INDEX) if not (path / name).is_file()]
    if INDEX in there and _is_of_others(path / INDEX):
        return RuntimeError(
            f"load: {path} is a torch.distributed.checkpoint without the {MANIFEST} of a complete one of mics.save, "
            f"expected that: {FOREIGN.format(path=path)}"
        )
    if _are_of_one(there):
        return RuntimeError(
            f"load: the checkpoint {path} lacks {' and '.join(lost)}, expected them beside its other files: "
            f"{_another(path)}"
        )
    if pointer.is_file():
        return RuntimeError(f"load: {pointer} names {path.name}, which {none}: {_another(path)}")
    for folder in (path, path / _OF_A_RUN):
        if seen := _seen(folder):
            whole = _complete(_manifests(folder))
            names = ", ".join(each.name for each in whole or seen)
            has, rest = f"{names}, none of them complete", "the error says what is wrong with that"
            if whole:
                has, rest = f"the complete ones {names}", f"the newest is {whole[-1]}"
            return RuntimeError(
                f"load: {folder} has no file {LATEST}, which names the checkpoint to load, and has {has}: give the "
                f"path of one; {rest}"
            )
    another = _another(path, "")
    return (RuntimeError if another else NoCheckpoint)(
        f"load: the checkpoint {path} {none}, expected a directory with a {MANIFEST}, or one whose {LATEST} or "
        f"{_OF_A_RUN}/{LATEST} names such: {another or 'give another path'}"
    )


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _seen(folder: Path) -> list[Path]:
    """What a folder has that looks like checkpoints, complete or damaged; who begins anew would write over them."""
    found = []
    for path in (folder / name for name in _listed(folder) if not name.startswith(".") or name.endswith(".replaced")):
        with suppress(*_OF_OTHERS):
            names = _listed(path)
            # Others have a manifest, too: our own folders of tokens, for one.
            if _are_of_one(names) or (MANIFEST in names and b'"crc32"' in (path / MANIFEST).read_bytes()):
                found.append(path)
    return found


def _manifests(folder: Path) -> dict[Path, Manifest]:
    """The checkpoints in a folder that have a sound manifest."""
    found = {}
    for path in _seen(folder):
        with suppress(RuntimeError, *_OF_OTHERS):
            found[path] = Manifest.read(path)
    return found


def _are_of_one(names: Sequence[str]) -> bool:
    """Whether a checkpoint has files of these names."""
    return INDEX in names or any(name.endswith(".distcp") for name in names)


def _is_of_others(index: Path) -> bool:
    try:
        return str(own_name(0)) not in read_index(index.read_bytes(), index).state_dict_metadata
    except Damaged:
        return False


def _another(path: Path, otherwise: str = "load another checkpoint") -> str:
    """What to do without this checkpoint: an older one is named, so that who follows never comes back."""
    found = _manifests(path.parent)
    whole, place = _complete(found), "beside it"
    if path in found:
        this = found[path]
        whole = [each for each in whole if found[each].number < this.number]
        ours = [each for each in whole if found[each].run in this.runs]
        whole, place = (ours, "before it") if ours else (whole, "before it, though of another run")
    if not whole:
        return otherwise
    return (
        f"load {whole[-1]}, the newest complete one {place}, by its path, or write its name into {path.parent / LATEST}"
    )


def _complete(found: Mapping[Path, Manifest]) -> list[Path]:
    """Those checkpoints that have all their files, from the oldest on; bytes are not compared."""
    return [path for path in sorted(found, key=lambda each: found[each].number) if _has_files(path, found[path])]


def _has_files(path: Path, manifest: Manifest) -> bool:
    return all(
        (path / name).is_file() and (path / name).stat().st_size == entry.bytes
        for name, entry in manifest.files.items()
    )
