"""Configs from and to the content of Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mics_models.bert import BERTConfig
from mics_models.gpt import GPTConfig
from mics_models.hf_names import ROBERTA_UNUSED, family_of

_ENCODER = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
    "is_decoder": (False,),
}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "type_vocab_size": (1,), "pad_token_id": (ROBERTA_UNUSED - 1,)},
}
"""What our models compute in one way only, and the default of each family: it may be absent."""


def config_from_hf(hf: Mapping[str, Any]) -> GPTConfig | BERTConfig:
    """Our config of the model that a config.json describes; ValueError if our models cannot compute it.

    A BERT has the sentence head if `architectures` names BertForPreTraining. Dropout is not read: ours have none.
    """
    family = hf.get("model_type")
    if family not in _FIXED:
        raise ValueError(
            f"config_from_hf: model_type is {family!r}, expected one of {', '.join(_FIXED)}: only these are built here"
        )
    for key, allowed in _FIXED[family].items():
        if hf.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"config_from_hf: {key} is {hf[key]!r}, expected {' or '.join(map(repr, allowed))} in a {family}: "
                "our model cannot compute this one"
            )
    try:
        return _gpt2(hf) if family == "gpt2" else _llama(hf) if family == "llama" else _bert(hf)
    except KeyError as absent:
        raise ValueError(f"config_from_hf: {absent} is absent, expected a size: give the whole config.json") from None


def config_to_hf(config: GPTConfig | BERTConfig) -> dict[str, Any]:
    """The content of a config.json with which transformers builds the same model, without dropout."""
    family = family_of(config)
    shared = {"model_type": family, "vocab_size": config.vocab, "initializer_range": config.init_std}
    if isinstance(config, BERTConfig):
        return shared | _bert_to_hf(config)
    shared["tie_word_embeddings"] = config.tied
    return shared | (_gpt2_to_hf(config) if family == "gpt2" else _llama_to_hf(config))


def _gpt2(hf: Mapping[str, Any]) -> GPTConfig:
    return GPTConfig(
        vocab=hf["vocab_size"],
        context=hf["n_positions"],
        layers=hf["n_layer"],
        width=hf["n_embd"],
        heads=hf["n_head"],
        kv_heads=hf["n_head"],
        hidden=hf.get("n_inner") or 4 * hf["n_embd"],
        tied=hf.get("tie_word_embeddings", True),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        init_std=hf.get("initializer_range", 0.02),
    )


def _gpt2_to_hf(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _llama(hf: Mapping[str, Any]) -> GPTConfig:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # named so from transformers 5 on, and before
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config_from_hf: rope_type is {kind!r}, expected 'default': our model cannot scale positions")
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if (hf.get("head_dim") or width // heads) != width // heads:
        raise ValueError(
            f"config_from_hf: head_dim is {hf['head_dim']}, expected {width // heads} for {heads} heads of a width of "
            f"{width}: our heads together are as wide as the model"
        )
    return GPTConfig(
        vocab=hf["vocab_size"],
        context=hf["max_position_embeddings"],
        layers=hf["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        hidden=hf["intermediate_size"],
        norm="rms",
        positions="rotary",
        mlp="swiglu",
        bias=False,
        tied=hf.get("tie_word_embeddings", False),
        rotary_base=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        init_std=hf.get("initializer_range", 0.02),
    )


def _llama_to_hf(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rotary_base,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }


def _bert(hf: Mapping[str, Any]) -> BERTConfig:
    config = BERTConfig(
        vocab=hf["vocab_size"],
        context=hf["max_position_embeddings"] - (ROBERTA_UNUSED if hf["model_type"] == "roberta" else 0),
        layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        hidden=hf["intermediate_size"],
        types=hf["type_vocab_size"],
        next_sentence="BertForPreTraining" in (hf.get("architectures") or ()),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        init_std=hf.get("initializer_range", 0.02),
    )
    if family_of(config) != hf["model_type"]:
        raise ValueError(
            "config_from_hf: type_vocab_size is 1 in a bert without sentence head, expected 2 or more: a BERTConfig "
            "with one type stands for a roberta"
        )
    return config


def _bert_to_hf(config: BERTConfig) -> dict[str, Any]:
    roberta = family_of(config) == "roberta"
    bert = "BertForPreTraining" if config.next_sentence else "BertForMaskedLM"
    return {
        "architectures": ["RobertaForMaskedLM" if roberta else bert],
        "max_position_embeddings": config.context + (ROBERTA_UNUSED if roberta else 0),
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": "gelu",
        "type_vocab_size": config.types,
        "layer_norm_eps": config.norm_eps,
        "pad_token_id": ROBERTA_UNUSED - 1 if roberta else None,  # no token of ours is padding
        "tie_word_embeddings": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
