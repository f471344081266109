"""Reference models in plain torch, one file each; `python -m mics_models.pretrain` trains one."""

from collections.abc import Mapping
from typing import TypeVar

from mics_models.bert import BERT, BERTConfig
from mics_models.configs import BERTS, GPTS
from mics_models.gpt import GPT, GPTConfig
from mics_models.loss import chunked_cross_entropy
from mics_models.sampling import sample

__version__ = "0.1.0"

Config = TypeVar("Config")

__all__ = ["BERT", "BERTS", "GPT", "GPTS", "BERTConfig", "GPTConfig", "bert", "chunked_cross_entropy", "gpt", "sample"]


def gpt(name: str) -> GPT:
    """The GPT of this name in GPTS, such as "gpt-100b", or "100b" for short."""
    return GPT(_named(GPTS, name, "gpt"))


def bert(name: str) -> BERT:
    """The BERT of this name in BERTS, such as "bert-10b", or "10b" for short."""
    return BERT(_named(BERTS, name, "bert"))


def _named(known: Mapping[str, Config], name: str, kind: str) -> Config:
    config = known.get(name) or known.get(f"{kind}-{name}")
    if config is None:
        raise ValueError(f"{kind}: there is no {name!r}, expected one of {', '.join(known)}: choose one")
    return config
