"""Weights as others keep them on disks: what is in a file or folder, read where it is used."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mics_core.checkpoint.finding import FOREIGN
from mics_core.checkpoint.folder import path_of
from mics_core.checkpoint.manifest import INDEX as DCP_INDEX
from mics_core.checkpoint.manifest import MANIFEST
from mics_core.checkpoint.safetensors import Files
from mics_core.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What a folder of weights holds one of."""


def open_weights(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a file or folder that `load_weights` takes, by name, in mapped memory."""
    path = path_of(path, "load_weights")
    if path.is_dir():
        there = [name for name in (SINGLE, INDEX) if (path / name).is_file()]
        if len(there) != 1:
            remedy = "name the file"
            if (path / MANIFEST).is_file():
                remedy = f"it is a checkpoint of mics.save, so run `mics export {path} {SINGLE}`, or use mics.load"
            elif (path / DCP_INDEX).is_file():
                remedy = FOREIGN.format(path=path)
            raise ConfigError(
                f"load_weights: the folder {path} has {' and '.join(there) or 'neither'}, expected {SINGLE} or "
                f"{INDEX}: {remedy}"
            )
        path /= there[0]
    if not path.is_file():
        raise ConfigError(f"load_weights: {path} is not there, expected a file or folder of weights: give another path")
    if path.suffix == ".safetensors":
        return Files([path])
    if path.suffix == ".json":
        return _open_index(path)
    if path.suffix in (".pt", ".bin"):
        return _open_state_dict(path)
    raise ConfigError(f"load_weights: got {path}, expected a .safetensors, .json, .pt or .bin file: convert it to one")


def _open_index(path: Path) -> Files:
    try:
        places = {name: path.with_name(file) for name, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"load_weights: {path} is damaged, expected a weight_map of tensors and files: fetch or write it again"
        ) from error
    paths = sorted(set(places.values()))
    for file in paths:
        if not file.is_file():
            raise ConfigError(
                f"load_weights: {file} is not there, expected all files of {path}: fetch or write it again"
            )
    files = Files(paths)
    found = {name: files.path(name) for name in files}
    for name in sorted(places.keys() | found.keys()):
        if places.get(name) != found.get(name):
            raise ConfigError(
                f"load_weights: {name} is not where {path} says, expected the files that were written with it: fetch "
                "or write them again"
            )
    return files


def _open_state_dict(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"load_weights: {path} cannot be read ({reason}), expected a state dict of torch.save: write it again"
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"load_weights: {path} holds a {type(state).__name__}, expected a state dict: save that alone"
        )
    return state
