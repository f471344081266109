"""Weights and configs from and to Hugging Face's formats: GPT-2, Llama, BERT with its heads, RoBERTa.

    config = config_from_hf(json.loads(Path("config.json").read_text()))
    model = GPT(config)
    model.load_state_dict(load_safetensors("model.safetensors", config))

For a model that fits on no single device, open_safetensors() makes our tensors one by one, as they are asked for.

Our models have no dropout: theirs is not read, and written as 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mics_models.bert import BERTConfig
from mics_models.gpt import GPTConfig
from mics_models.hf_config import config_from_hf, config_to_hf
from mics_models.hf_names import layout_of

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "from_hf",
    "from_hf_lazily",
    "load_safetensors",
    "open_safetensors",
    "save_safetensors",
    "to_hf",
]

BUFFERS = (".attn.bias", ".attn.masked_bias", "position_ids", "token_type_ids", "inv_freq")
"""Ends of the names of what Hugging Face's models compute, and some of their files hold nevertheless."""

RENAMED = {".gamma": ".weight", ".beta": ".bias"}
"""What norms called their parameters in the first BERTs."""


def from_hf(state: Mapping[str, Tensor], config: GPTConfig | BERTConfig) -> dict[str, Tensor]:
    """Our model's state dict from theirs, with names as of the whole model or of the part without heads.

    Tensors are views of the given ones, apart from those that are joined: queries, keys and values, and Llama's two
    layers up. Tied weights may be there twice, mask buffers are left out; any other name too many or too few raises.
    """
    return dict(from_hf_lazily(state, config))


def from_hf_lazily(state: Mapping[str, Tensor], config: GPTConfig | BERTConfig) -> Mapping[str, Tensor]:
    """What from_hf() gives, as a mapping that makes each tensor anew when it is asked for it.

    So theirs may be made on demand, too. Names are checked now, and tied weights that are there twice are compared.
    """
    return _Ours(state, config)


class _Ours(Mapping[str, Tensor]):
    """Our tensors, from theirs."""

    def __init__(self, state: Mapping[str, Tensor], config: GPTConfig | BERTConfig) -> None:
        layout = layout_of(config)
        given = _plain_names(state, layout.prefix)
        for copy, original in layout.copies.items():
            if copy in given:
                name = given.pop(copy)
                if not torch.equal(state[name], state[given.setdefault(original, name)]):
                    raise ValueError(
                        f"from_hf: {copy} differs from {original}, expected the same as this config ties them: "
                        "give the config of these weights"
                    )
        _expect_names("from_hf", given, [name for place in layout.places for name in place.theirs])
        self._state = state
        self._given = given
        self._places = {place.ours: place for place in layout.places}

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return place.read({theirs: self._state[self._given[theirs]] for theirs in place.theirs})

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def meta(self, name: str) -> Tensor:
        """One without memory, for its shape and dtype: nothing is joined."""
        place = self._places[name]
        return place.read({theirs: self._state[self._given[theirs]].to("meta") for theirs in place.theirs})


def to_hf(state: Mapping[str, Tensor], config: GPTConfig | BERTConfig) -> dict[str, Tensor]:
    """Their state dict from our model's, with names as of the whole model, and tied weights once.

    Tensors are views of the given ones, apart from RoBERTa's positions; GPT-2's matrices are transposed views.
    """
    layout = layout_of(config)
    _expect_names("to_hf", state, [place.ours for place in layout.places])
    return {
        layout.full(name): tensor for place in layout.places for name, tensor in place.write(state[place.ours]).items()
    }


def load_safetensors(path: str | PathLike[str], config: GPTConfig | BERTConfig) -> dict[str, Tensor]:
    """Our model's state dict from one of their files, in the file's dtypes; needs the extra `mics-models[hf]`."""
    from safetensors.torch import load_file  # here, so that nothing else needs the package

    return from_hf(load_file(path), config)


def open_safetensors(path: str | PathLike[str], config: GPTConfig | BERTConfig) -> Mapping[str, Tensor]:
    """Our model's tensors from their file, index of several files, or folder with either; needs the same extra.

    Files are mapped into memory, and nothing is read but the tensors that are asked for, each when it is.
    """
    return from_hf_lazily(_Opened(Path(path)), config)


class _Opened(Mapping[str, Tensor]):
    """The tensors of their files."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        files: list[Any] = [safe_open(file, "pt") for file in _files(path)]
        self._places = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)  # in mapped memory
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        path = index if index.is_file() else path / "model.safetensors"
    if path.suffix != ".json":
        return [path]
    return [path.with_name(name) for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))]


def save_safetensors(state: Mapping[str, Tensor], path: str | PathLike[str], config: GPTConfig | BERTConfig) -> None:
    """Write our model's state dict to a file as theirs; beside config_to_hf() as config.json, transformers reads it.

    GPT-2's matrices are transposed in memory for it: a second copy of most of the model.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in to_hf(state, config).items()}
    save_file(tensors, path, metadata={"format": "pt"})  # without which transformers 4 refuses it


def _plain_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Names of tensors as in the layouts, each with what it is called here."""
    given = {}
    for name in names:
        if not name.endswith(BUFFERS):
            plain = name.removeprefix(prefix)
            for old, new in RENAMED.items():
                if plain.endswith(old):
                    plain = plain.removesuffix(old) + new
            given[plain] = name
    return given


def _expect_names(function: str, given: Iterable[str], expected: Iterable[str]) -> None:
    unknown, missing = sorted(set(given) - set(expected)), sorted(set(expected) - set(given))
    if unknown or missing:
        raise ValueError(
            f"{function}: got {_some(unknown)} too many and {_some(missing)} too few, expected the tensors of the "
            "config's model: give the config of these weights"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
