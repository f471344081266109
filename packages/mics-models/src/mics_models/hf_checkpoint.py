"""What `mics export --names hf` asks: how the tensors of a checkpoint of ours are called by Hugging Face."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mics_models.hf_config import config_to_hf
from mics_models.hf_names import layout_of
from mics_models.hf_tokenizer import tokenizer_to_hf
from mics_models.sentences import sentence
from mics_models.training.batches import configure
from mics_models.training.settings import ModelSettings


def names(extra: Mapping[str, Any]) -> tuple[Callable[[str, Tensor], dict[str, Tensor]], dict[str, str]]:
    """A function from the name of one of our tensors, and the tensor, to theirs; and the texts of config.json and of
    the tokenizer's files. Where the data is not there that the model was trained on, a line tells what to copy.

    `extra` is what pretrain saves with a checkpoint. ValueError if it is another program's, or if Hugging Face has no
    such model. The function takes tensors on the meta device, too.
    """
    settings = extra.get("settings")
    if not isinstance(settings, Mapping) or "model.name" not in settings:
        raise ValueError(
            "hf: the checkpoint does not say which model it is of, expected one of mics_models.pretrain: export "
            "without names, and convert that with mics_models.hf.save_safetensors"
        )
    config = configure(ModelSettings(name=settings["model.name"], config=settings["model.config"]))
    layout = layout_of(config)
    places = {place.ours: place for place in layout.places}

    def rename(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {layout.full(theirs): value for theirs, value in places[name].write(tensor).items()}

    theirs, files = config_to_hf(config), {}
    folder = str(settings["data.folder"])
    try:
        tokenizer = tokenizer_to_hf(folder, config.context)
    except (ValueError, OSError, ImportError) as error:
        print(
            f"hf: no tokenizer is written, because {sentence(error)}: export where {folder} is, or copy its "
            "tokenizer.json beside config.json",
            file=sys.stderr,
        )
    else:
        theirs |= {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.start}
        files = tokenizer.files
    return rename, {"config.json": json.dumps(theirs, indent=2) + "\n", **files}
