"""Where a checkpoint lies, and how it gets there so that whoever is killed at any moment leaves one to load.

    runs/step-100            a checkpoint: a directory with a manifest
    runs/latest              the name of the newest one
    runs/.step-200.saving    being written, or left behind by a save that was killed
    runs/.step-100.replaced  an older one of this name, until the new one is in its place
    runs/.lock               locked by the process that is saving here

A folder of checkpoints belongs to one training run at a time: each save removes what killed ones left there. What
cannot be removed is a warning: no save fails for an old checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from mics_core.checkpoint.manifest import MANIFEST, Manifest
from mics_core.errors import ConfigError

LATEST = "latest"
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def path_of(given: str | os.PathLike[str], caller: str) -> Path:
    """A path as users give it."""
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"{caller}: the path is {given!r}, expected a text or a Path: name a file or folder")
    return Path(given)


def replaced(path: Path) -> Path:
    """Where an older checkpoint of this path waits for its end."""
    return path.parent / f".{path.name}.replaced"


@dataclass(frozen=True)
class Place:
    """A checkpoint's own directory. Only rank 0 calls what changes anything."""

    path: Path

    def __post_init__(self) -> None:
        name = self.path.name
        if name in ("", LATEST, MANIFEST) or name.startswith(".") or name != name.strip() or not name.isprintable():
            raise ConfigError(
                f"save: the path ends in {name!r}, expected a directory of the checkpoint's own such as runs/step-100: "
                "name one"
            )

    @property
    def temporary(self) -> Path:
        """Where it is written."""
        return self.path.parent / f".{self.path.name}.saving"

    @property
    def replaced(self) -> Path:
        """Where an older one of this name waits for its end."""
        return replaced(self.path)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from saving here meanwhile; one that is killed claims nothing any more."""
        folder = self.path.parent
        _make_durably(folder)
        with (folder / _LOCK).open("a") as lock:
            locked = False
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
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
                if locked:
                    fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a process was forked meanwhile

    def prepare(self) -> None:
        """Remove what killed saves left, and make an empty directory to write to."""
        folder = self.path.parent
        if self.path.exists() and not (self.path / MANIFEST).is_file():
            raise ConfigError(f"save: {self.path} exists and is no checkpoint, expected a new name: choose another")
        for old in list(folder.glob(".*.replaced")):
            rightful = folder / old.name.removeprefix(".").removesuffix(".replaced")
            if rightful.exists():
                self._remove(old)
            else:
                old.rename(rightful)
        for left in list(folder.glob(".*.saving")):
            self._remove(left)
        if self.temporary.exists():
            self.temporary.rename(self._unused(self.path.name))
        self.temporary.mkdir()

    def next_number(self) -> int:
        """One more than any checkpoint here has."""
        return 1 + max((each.number for _, each in checkpoints_in(self.path.parent)), default=0)

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

    def tidy(self, keep: int | None, runs: Sequence[str]) -> None:
        """Remove what this checkpoint replaced, and all but so many of the newest here that are of these runs."""
        if self.replaced.exists():
            self._remove(self.replaced)
        ours = sorted((each.number, path.name) for path, each in checkpoints_in(self.path.parent) if each.run in runs)
        for _, name in ours[: 0 if keep is None else max(0, len(ours) - keep)]:
            self._remove(self.path.parent / name)

    def abandon(self) -> None:
        """The save has failed: give its space back, as far as that goes now; the next save does the rest."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _remove(self, old: Path) -> None:
        """Remove a directory, or warn."""
        going = old
        is_checkpoint = not (old.name.startswith(".") and old.suffix == ".saving")
        try:
            if is_checkpoint:  # and no longer from here on, whenever we are killed
                going = old.rename(self._unused(old.name.removeprefix(".").removesuffix(".replaced")))
            shutil.rmtree(going)
        except OSError as error:
            file = "" if error.filename is None else f"{Path(error.filename).name}: "
            warnings.warn(
                f"save: {going}, which is old, cannot be removed while {self.path} is saved ({file}{error.strerror}); "
                "the next save tries again",
                RuntimeWarning,
                stacklevel=1,
            )

    def _unused(self, name: str) -> Path:
        """What a directory is to be called that is going to be removed."""
        names = (f".{name}{'.' * (number > 0)}{number or ''}.saving" for number in count())
        return next(path for path in map(self.path.parent.joinpath, names) if not path.exists())


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk."""
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the disk say which file they are about, which those of writing do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def checkpoints_in(folder: Path) -> list[tuple[Path, Manifest]]:
    """The checkpoints in a folder; what has no sound manifest is not ours to count or remove."""
    found = []
    for path in folder.glob("[!.]*/" + MANIFEST):
        try:
            found.append((path.parent, Manifest.read(path.parent)))
        except (RuntimeError, OSError):  # damaged, or another's; loading it says so
            continue
    return found


def _make_durably(folder: Path) -> None:
    """Make a directory and those above it, so that they are there after the power fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    above = missing[-1].parent if missing else folder
    if not above.is_dir():
        raise ConfigError(f"save: {above} is a file, expected a folder to save in: choose another path")
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
