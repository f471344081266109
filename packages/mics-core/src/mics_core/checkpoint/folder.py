"""Where a checkpoint lies, and how it gets there so that whoever is killed at any moment leaves one to load.

    runs/step-100            a checkpoint: a directory with a manifest
    runs/latest              the name of the newest one
    runs/.step-200.saving    being written, or left behind by a save that was killed
    runs/.step-100.replaced  an older one of this name, until the new one is in its place
    runs/.lock               locked by the process that is saving here

A folder of checkpoints belongs to one training run at a time: each save removes what killed ones left there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mics_core.checkpoint.manifest import MANIFEST, Manifest
from mics_core.errors import ConfigError

LATEST = "latest"
_OF_A_RUN = "checkpoints"  # where a run's folder has them
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@dataclass(frozen=True)
class Place:
    """A checkpoint's own directory. Only rank 0 calls what changes anything."""

    path: Path

    def __post_init__(self) -> None:
        if self.path.name in ("", LATEST) or self.path.name.startswith("."):
            raise ConfigError(
                f"save: the path ends in {self.path.name!r}, expected a directory of the checkpoint's own such as "
                "runs/step-100: name one"
            )

    @property
    def temporary(self) -> Path:
        """Where it is written."""
        return self.path.parent / f".{self.path.name}.saving"

    @property
    def replaced(self) -> Path:
        """Where an older one of this name waits for its end."""
        return self.path.parent / f".{self.path.name}.replaced"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from saving here meanwhile; one that is killed claims nothing any more."""
        folder = self.path.parent
        _make_durably(folder)
        with (folder / _LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"save: another process is saving in {folder}, expected a folder of this training's own: choose "
                    "another path"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:  # some network disks lock nothing: there the rule above must do
                    raise
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a process was forked meanwhile

    def prepare(self) -> None:
        """Remove what killed saves left, and make an empty directory to write to."""
        folder = self.path.parent
        if self.path.exists() and not (self.path / MANIFEST).is_file():
            raise ConfigError(f"save: {self.path} exists and is no checkpoint, expected a new name: choose another")
        for old in list(folder.glob(".*.replaced")):
            rightful = folder / old.name.removeprefix(".").removesuffix(".replaced")
            if rightful.exists():
                shutil.rmtree(old)
            else:
                old.rename(rightful)
        for left in list(folder.glob(".*.saving")):
            shutil.rmtree(left)
        self.temporary.mkdir()

    def next_number(self) -> int:
        """One more than any checkpoint here has."""
        return 1 + max((number for number, _ in _siblings(self.path.parent)), default=0)

    def publish(self, manifest: Manifest) -> None:
        """All files are on the disk: make them the checkpoint of this name, and the latest one."""
        write_durably(self.temporary / LATEST, f"{self.path.name}\n".encode())
        write_durably(self.temporary / MANIFEST, manifest.render())
        _sync_directory(self.temporary)
        if self.path.exists():
            self.path.rename(self.replaced)
        self.temporary.rename(self.path)
        _sync_directory(self.path.parent)
        (self.path / LATEST).replace(self.path.parent / LATEST)
        _sync_directory(self.path.parent)

    def tidy(self, keep: int | None) -> None:
        """Remove what this checkpoint replaced, and all but so many of the newest here."""
        if self.replaced.exists():
            shutil.rmtree(self.replaced)
        siblings = sorted(_siblings(self.path.parent))
        for _, name in siblings[: 0 if keep is None else max(0, len(siblings) - keep)]:
            going = self.path.parent / f".{name}.saving"  # no checkpoint from here on, whenever we are killed
            (self.path.parent / name).rename(going)
            shutil.rmtree(going)

    def abandon(self) -> None:
        """The save has failed: give its space back, as far as that goes now; the next save does the rest."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def find(path: Path) -> Path:
    """The directory of a checkpoint, given itself, a folder whose `latest` names one, that file, or a run's folder."""
    if path.name == LATEST and path.is_file():
        path = path.parent
    if not (path / MANIFEST).is_file() and (path / _OF_A_RUN / LATEST).is_file():
        path = path / _OF_A_RUN
    pointer = path / LATEST
    if not (path / MANIFEST).is_file() and pointer.is_file():
        name = pointer.read_text(errors="replace").strip()
        path = path / name
        if not name or path.name != name:
            raise RuntimeError(f"load: {pointer} is damaged, expected a name: give the path of a checkpoint itself")
    replaced = Place(path).replaced if path.name and not path.name.startswith(".") else path
    if not path.exists() and (replaced / MANIFEST).is_file():
        return replaced  # killed between two renames
    if not (path / MANIFEST).is_file():
        there = "is not complete" if path.is_dir() and any(path.iterdir()) else "does not exist or is empty"
        raise RuntimeError(
            f"load: the checkpoint {path} {there}, expected a directory with a {MANIFEST}, or one whose {LATEST} or "
            f"{_OF_A_RUN}/{LATEST} names such: give another path"
        )
    return path


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _siblings(folder: Path) -> list[tuple[int, str]]:
    """Number and name of the checkpoints in a folder; what has no sound manifest is not ours to count or remove."""
    found = []
    for path in folder.glob("[!.]*/" + MANIFEST):
        try:
            found.append((Manifest.read(path.parent).number, path.parent.name))
        except RuntimeError:  # damaged; loading it says so
            continue
    return found


def _make_durably(folder: Path) -> None:
    """Make a directory and those above it, so that they are there after the power fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
