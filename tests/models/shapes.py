"""The variants of GPT and BERT, small enough to test, and what fills them."""

import torch
from torch import Tensor, nn

from mics_models import BERT, GPT, BERTConfig, GPTConfig

GPT2 = GPTConfig(vocab=61, context=24, layers=2, width=32, heads=4, kv_heads=4, hidden=128)
LATER = GPTConfig(
    vocab=61,
    context=24,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    hidden=80,
    norm="rms",
    positions="rotary",
    mlp="swiglu",
    bias=False,
    tied=False,
)
VARIANTS = {"gpt2": GPT2, "later": LATER}

PAIRED = BERTConfig(vocab=61, context=24, layers=2, width=32, heads=4, hidden=80, next_sentence=True)
ROBERTA = BERTConfig(vocab=61, context=24, layers=2, width=32, heads=4, hidden=80, types=1, norm_eps=1e-5)
ENCODERS = {"bert": PAIRED, "roberta": ROBERTA}

MODELS = {**VARIANTS, **ENCODERS}


def build(config: GPTConfig | BERTConfig) -> GPT | BERT:
    return BERT(config) if isinstance(config, BERTConfig) else GPT(config)


def lively(module: nn.Module) -> nn.Module:
    """With weights and biases large enough for every path through the model to show in its output."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def tokens_for(config: GPTConfig | BERTConfig, samples: int = 2, length: int | None = None) -> Tensor:
    return torch.randint(config.vocab, (samples, length or config.context))
