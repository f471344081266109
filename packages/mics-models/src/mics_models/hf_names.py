"""Where Hugging Face's models keep our tensors: GPT-2 and Llama for a GPT, BERT and RoBERTa for a BERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mics_models.bert import BERTConfig
from mics_models.gpt import GPTConfig

Family = Literal["gpt2", "llama", "bert", "roberta"]

ROBERTA_UNUSED = 2
"""Positions at the begin of RoBERTa's table that no token has: they are counted from after the padding token, 1."""

_BOTH = ("weight", "bias")
_GPT2 = {  # ours -> theirs
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_LLAMA = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
_BERT = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "mlp.up": ("intermediate.dense",),
    "mlp.down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}


@dataclass(frozen=True)
class Place:
    """Where one of our tensors is kept."""

    ours: str
    theirs: tuple[str, ...]  # the rows of several follow one another in ours
    rows: tuple[int, ...] = ()  # of each, if there are several
    transposed: bool = False
    unused: int = 0  # rows at the begin of theirs that ours has not

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Ours, a view of theirs unless several are joined."""
        parts = [state[name] for name in self.theirs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.t() if self.transposed else whole)[self.unused :]

    def write(self, tensor: Tensor) -> dict[str, Tensor]:
        """Theirs, views of ours unless rows are put in front."""
        if self.transposed:
            tensor = tensor.t()
        if self.unused:
            tensor = torch.cat((tensor.new_zeros(self.unused, *tensor.shape[1:]), tensor))
        return dict(zip(self.theirs, torch.split(tensor, list(self.rows)) if self.rows else (tensor,), strict=True))


@dataclass(frozen=True)
class Layout:
    """All places of a model."""

    family: Family
    prefix: str  # of all names but the heads'; theirs below are without it
    places: tuple[Place, ...]
    copies: dict[str, str] = field(default_factory=dict)  # tensors that are others once more, and may be absent

    def full(self, name: str) -> str:
        """A name of theirs with its prefix."""
        return name if name.startswith(("cls.", "lm_head.")) else self.prefix + name


def family_of(config: GPTConfig | BERTConfig) -> Family:
    """The model of Hugging Face that computes what this config does; ValueError if none does."""
    if isinstance(config, BERTConfig):
        return "roberta" if config.types == 1 and not config.next_sentence else "bert"
    parts = (config.norm, config.positions, config.mlp, config.bias)
    if parts == ("layer", "learned", "gelu", True) and config.kv_heads == config.heads:
        return "gpt2"
    if parts == ("rms", "rotary", "swiglu", False):
        return "llama"
    raise ValueError(
        f"hf: got a GPTConfig with norm, positions, mlp and bias {parts} and {config.kv_heads} of {config.heads} heads "
        "for keys and values, expected all of GPT-2's or all of Llama's parts: such a model exists in neither form"
    )


def layout_of(config: GPTConfig | BERTConfig) -> Layout:
    """Where the tensors of a config's model are kept."""
    family = family_of(config)
    if isinstance(config, BERTConfig):
        return _bert(config, family)
    return _gpt2(config) if family == "gpt2" else _llama(config)


def _gpt2(config: GPTConfig) -> Layout:
    places = [
        Place("embedding.weight", ("wte.weight",)),
        Place("positions.weight", ("wpe.weight",)),
        *_modules({"norm": ("ln_f",)}),
    ]
    for layer in range(config.layers):
        for ours, theirs in _GPT2.items():
            for kind in _BOTH:
                transposed = kind == "weight" and "norm" not in ours  # their linear layers keep [inputs, outputs]
                name = f"h.{layer}.{theirs}.{kind}"
                places.append(Place(f"blocks.{layer}.{ours}.{kind}", (name,), transposed=transposed))
    return Layout("gpt2", "transformer.", *_head(config, places, "wte.weight"))


def _llama(config: GPTConfig) -> Layout:
    kv_width = config.kv_heads * config.head_width
    rows = {"attention.qkv": (config.width, kv_width, kv_width), "mlp.up": (config.hidden, config.hidden)}
    places = [
        Place("embedding.weight", ("embed_tokens.weight",)),
        *_modules({"norm": ("norm",)}, kinds=("weight",)),
    ]
    for layer in range(config.layers):
        places += _modules(_LLAMA, f"blocks.{layer}.", f"layers.{layer}.", rows, ("weight",))
    return Layout("llama", "model.", *_head(config, places, "embed_tokens.weight"))


def _head(config: GPTConfig, places: list[Place], embedding: str) -> tuple[tuple[Place, ...], dict[str, str]]:
    if config.tied:
        return tuple(places), {"lm_head.weight": embedding}
    return (*places, Place("head.weight", ("lm_head.weight",))), {}


def _bert(config: BERTConfig, family: Family) -> Layout:
    table = "embeddings.word_embeddings.weight"
    rows = {"attention.qkv": (config.width,) * 3}
    places = [
        Place("embedding.weight", (table,)),
        Place(
            "positions.weight",
            ("embeddings.position_embeddings.weight",),
            unused=ROBERTA_UNUSED if family == "roberta" else 0,
        ),
        Place("types.weight", ("embeddings.token_type_embeddings.weight",)),
        *_modules({"norm": ("embeddings.LayerNorm",)}),
    ]
    for layer in range(config.layers):
        places += _modules(_BERT, f"blocks.{layer}.", f"encoder.layer.{layer}.", rows)
    if family == "roberta":
        head, bias = "lm_head", "lm_head.bias"
        places += _modules({"token_head.transform": ("lm_head.dense",), "token_head.norm": ("lm_head.layer_norm",)})
    else:
        head, bias = "cls.predictions", "cls.predictions.bias"
        transform = f"{head}.transform"
        places += _modules(
            {"token_head.transform": (f"{transform}.dense",), "token_head.norm": (f"{transform}.LayerNorm",)}
        )
    if config.next_sentence:
        places += _modules({"sentence_head.pooler": ("pooler.dense",), "sentence_head.out": ("cls.seq_relationship",)})
    places.append(Place("token_head.bias", (bias,)))
    copies = {f"{head}.decoder.weight": table, f"{head}.decoder.bias": bias}
    return Layout(family, f"{family}.", tuple(places), copies)


def _modules(
    names: Mapping[str, tuple[str, ...]],
    ours: str = "",
    theirs: str = "",
    rows: Mapping[str, tuple[int, ...]] | None = None,
    kinds: Sequence[str] = _BOTH,
) -> list[Place]:
    """The places of the weights and biases of modules."""
    return [
        Place(f"{ours}{name}.{kind}", tuple(f"{theirs}{part}.{kind}" for part in parts), (rows or {}).get(name, ()))
        for name, parts in names.items()
        for kind in kinds
    ]
