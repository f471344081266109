"""The files by which transformers' AutoTokenizer has the tokens that a model was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mics_models.data.byte_tokens import Bytes
from mics_models.data.prepared import Manifest, read_tokenizer
from mics_models.data.tokenizer import MASK, START, Tokenizer


@dataclass(frozen=True)
class TheirTokenizer:
    """Texts of files by name, and the number of the token between documents."""

    files: dict[str, str]
    start: int


def tokenizer_to_hf(data_folder: str, context: int) -> TheirTokenizer:
    """For a folder of prepared data; an empty name stands for the default data, where a token is a byte."""
    folder = Path(data_folder)
    ours = read_tokenizer(folder, Manifest.read(folder)) if data_folder else Bytes()
    if isinstance(ours, Tokenizer):
        text, start, mask = ours.content.decode(), _name(ours, ours.start), _name(ours, ours.mask)
    else:
        text, start, mask = json.dumps(_byte_level(ours)) + "\n", START, MASK
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": start,
        **({"mask_token": mask} if mask else {}),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    return TheirTokenizer(files, ours.start)


def _name(tokenizer: Tokenizer, number: int | None) -> str | None:
    return None if number is None else str(tokenizer.model.id_to_token(number))


def _byte_level(ours: Bytes) -> dict[str, Any]:
    """A tokenizer.json whose tokens are the bytes: byte-level BPE that merges none."""
    special = {ours.start: START, ours.mask: MASK}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": name, **added} for number, name in special.items()],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {special.get(byte, name): byte for byte, name in enumerate(_characters())},
            "merges": [],
        },
    }


def _characters() -> list[str]:
    """What byte-level BPE writes for each byte: itself if it can be seen, else the next character beyond 255."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + others.index(byte)) for byte in range(256)]
