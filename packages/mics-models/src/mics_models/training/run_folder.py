"""The folder of a run: found before anything slow is done, and written once the run is sure to go on."""

from __future__ import annotations

import time
from pathlib import Path

from mics_models.data.replacing import replacing
from mics_models.training import journal
from mics_models.training.settings import Settings, to_toml
from mics_models.training.together import everyone, together


def find(settings: Settings, rank: int) -> Path:
    """The run's folder, which rank 0 can write to and has no other run."""
    folder = Path(everyone(settings.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{settings.model.name}")[0])

    def try_it() -> None:
        if rank == 0:
            if settings.checkpoint.resume == "never" and (folder / journal.LOG).exists():
                raise FileExistsError(
                    f"output {folder} has a run already, expected a new folder: name another, or go on with "
                    "checkpoint.resume=always"
                )
            folder.mkdir(parents=True, exist_ok=True)
            trial = folder / "settings.toml.partial"
            trial.touch()
            trial.unlink()

    together(try_it)
    return folder


def write(folder: Path, settings: Settings, rank: int) -> None:
    """Write down in the folder, which all ranks must see, what the run was told."""
    text = to_toml(settings)

    def put() -> None:
        if rank == 0:
            with replacing(folder / "settings.toml") as file:
                file.write(text.encode())

    def look() -> None:
        path = folder / "settings.toml"
        if not path.is_file() or path.read_text() != text:
            raise ValueError(
                f"output {folder} is not what rank 0 sees, expected a folder on a disk that all ranks share"
            )

    together(put)
    together(look)
