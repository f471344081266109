"""Weights and configs from and to Hugging Face's formats: GPT-2, Llama, BERT with its heads, RoBERTa.

    config = config_from_hf(json.loads(Path("config.json").read_text()))
    model = GPT(config)
    model.load_state_dict(load_safetensors("model.safetensors", config))

Our models have no dropout: theirs is not read, and written as 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike

import torch
from torch import Tensor

from mics_models.bert import BERTConfig
from mics_models.gpt import GPTConfig
from mics_models.hf_config import config_from_hf, config_to_hf
from mics_models.hf_names import layout_of

__all__ = ["config_from_hf", "config_to_hf", "from_hf", "load_safetensors", "save_safetensors", "to_hf"]

BUFFERS = (".attn.bias", ".attn.masked_bias", "position_ids", "token_type_ids", "inv_freq")
"""Ends of the names of what Hugging Face's models compute, and some of their files hold nevertheless."""

RENAMED = {".gamma": ".weight", ".beta": ".bias"}
"""What norms called their parameters in the first BERTs."""


def from_hf(state: Mapping[str, Tensor], config: GPTConfig | BERTConfig) -> dict[str, Tensor]:
    """Our model's state dict from theirs, with names as of the whole model or of the part without heads.

    Tensors are views of the given ones, apart from those that are joined: queries, keys and values, and Llama's two
    layers up. Tied weights may be there twice, mask buffers are left out; any other name too many or too few raises.
    """
    layout = layout_of(config)
    given = {}
    for name, tensor in state.items():
        if not name.endswith(BUFFERS):
            plain = name.removeprefix(layout.prefix)
            for old, new in RENAMED.items():
                if plain.endswith(old):
                    plain = plain.removesuffix(old) + new
            given[plain] = tensor
    for copy, original in layout.copies.items():
        if copy in given:
            tensor = given.pop(copy)
            if not torch.equal(tensor, given.setdefault(original, tensor)):
                raise ValueError(
                    f"from_hf: {copy} differs from {original}, expected the same as this config ties them: "
                    "give the config of these weights"
                )
    _expect_names("from_hf", given, [name for place in layout.places for name in place.theirs])
    return {place.ours: place.read(given) for place in layout.places}


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


def save_safetensors(state: Mapping[str, Tensor], path: str | PathLike[str], config: GPTConfig | BERTConfig) -> None:
    """Write our model's state dict to a file as theirs; beside config_to_hf() as config.json, transformers reads it.

    GPT-2's matrices are transposed in memory for it: a second copy of most of the model.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in to_hf(state, config).items()}
    save_file(tensors, path, metadata={"format": "pt"})  # without which transformers 4 refuses it


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
