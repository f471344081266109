"""A checkpoint's weights, whole, in one process that is no rank."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mics_core.checkpoint.reading import Stored


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The model's weights and buffers by the names of its plain state dict; the whole model must fit in memory.

    `path` is a checkpoint of `save`, a folder whose `latest` names one, or the folder of a run of pretraining. All of
    its files are compared with their checksums first, and nothing that is pickled in it is run.
    """
    stored = Stored(Path(path))
    stored.verify(0, 1)
    return {name.removeprefix("model."): stored.whole(name) for name in stored.tensors if name.startswith("model.")}
