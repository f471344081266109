"""Where a checkpoint lies, and how it gets there so that whoever is killed at any moment leaves one to load.

    runs/step-100            a checkpoint: a directory with a manifest
    runs/latest              the name of the newest one
    runs/.step-200.saving    being written, or left behind by a save that was killed
    runs/.step-100.replaced  an older one of this name, until the new one is in its place

A folder of checkpoints belongs to one training run at a time: each save removes what killed ones left there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mics_core.checkpoint.manifest import MANIFEST, Manifest
from mics_core.errors import ConfigError

LATEST = "latest"


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

    def prepare(self) -> None:
        """Remove what killed saves left, and make an empty directory to write to."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
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
        if self.replaced.exists():
            shutil.rmtree(self.replaced)

    def abandon(self) -> None:
        """The save has failed: give its space back, as far as that goes now; the next save does the rest."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def keep(self, count: int) -> None:
        """Remove all but the newest of the checkpoints here."""
        siblings = sorted(_siblings(self.path.parent))
        for _, name in siblings[: max(0, len(siblings) - count)]:
            going = self.path.parent / f".{name}.saving"  # no checkpoint from here on, whenever we are killed
            (self.path.parent / name).rename(going)
            shutil.rmtree(going)


def find(path: Path) -> Path:
    """The directory of a checkpoint, given itself or a folder whose `latest` names one."""
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
            f"load: the checkpoint {path} {there}, expected a directory with a {MANIFEST}, or one whose {LATEST} names "
            "such: give another path"
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


def _sync_directory(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
