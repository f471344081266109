"""Named shapes of models: some for a CPU, those that others published, and those that the runtime is measured with."""

from __future__ import annotations

from mics_models.bert import BERTConfig
from mics_models.gpt import GPTConfig

GPT2_VOCAB = 50257  # GPT-2's own size and not padded to a rounder one, so that its weights fit
ROBERTA_VOCAB = 50265
PAPER_VOCAB = 32008  # of the BERTs that the MiCS paper measures
PAPER_CONTEXT = 512  # of all models that it measures


def _gpt2(layers: int, width: int, heads: int, context: int = 1024, vocab: int = GPT2_VOCAB) -> GPTConfig:
    return GPTConfig(
        vocab=vocab, context=context, layers=layers, width=width, heads=heads, kv_heads=heads, hidden=4 * width
    )


def _bert(layers: int, width: int, heads: int, *, vocab: int, next_sentence: bool = False) -> BERTConfig:
    return BERTConfig(
        vocab=vocab,
        context=PAPER_CONTEXT,
        layers=layers,
        width=width,
        heads=heads,
        hidden=4 * width,
        next_sentence=next_sentence,
    )


def _llama3(layers: int, width: int, heads: int, hidden: int) -> GPTConfig:
    return GPTConfig(
        vocab=128256,
        context=8192,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=8,
        hidden=hidden,
        norm="rms",
        positions="rotary",
        mlp="swiglu",
        bias=False,
        tied=False,
        rotary_base=500_000.0,
    )


GPTS: dict[str, GPTConfig] = {
    "byte-tiny": GPTConfig(
        vocab=256,
        context=128,
        layers=4,
        width=128,
        heads=4,
        kv_heads=2,
        hidden=336,  # three matrices of SwiGLU in place of GELU's two: about 2/3 of 4 * width
        norm="rms",
        positions="rotary",
        mlp="swiglu",
        init_std=0.05,  # so narrow a model learns far faster from here than from 0.02
        bias=False,
    ),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-350m": _gpt2(24, 1024, 16),
    "gpt-1.3b": _gpt2(24, 2048, 16, context=2048),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "gpt2-20b": _gpt2(62, 5120, 40, PAPER_CONTEXT, ROBERTA_VOCAB),
    "gpt-30b": _gpt2(48, 7168, 56, context=2048),
    "gpt-100b": _gpt2(80, 10240, 80, context=2048),
    "gpt-175b": _gpt2(96, 12288, 96, context=2048),
    "llama3-8b": _llama3(32, 4096, 32, 14336),
    "llama3-70b": _llama3(80, 8192, 64, 28672),
}
"""The GPTs by name. Those named gpt are GPT-2 made wider and deeper, as the published comparisons are; Llama 3 is
that of 8192 tokens, for 3.1 scales its positions, which GPT cannot."""

BERTS: dict[str, BERTConfig] = {
    "bert-tiny": BERTConfig(
        vocab=257,  # the bytes, and 256 in place of a masked one
        context=128,
        layers=4,
        width=128,
        heads=4,
        hidden=512,
        types=1,
        init_std=0.05,  # as in byte-tiny
    ),
    "bert-base": _bert(12, 768, 12, vocab=30522, next_sentence=True),
    "bert-large": _bert(24, 1024, 16, vocab=30522, next_sentence=True),
    "bert-10b": _bert(127, 2560, 40, vocab=PAPER_VOCAB),
    "bert-15b": _bert(190, 2560, 40, vocab=PAPER_VOCAB),
    "bert-20b": _bert(64, 5120, 40, vocab=PAPER_VOCAB),
    "bert-50b": _bert(62, 8192, 64, vocab=PAPER_VOCAB),
    "roberta-20b": BERTConfig(
        vocab=ROBERTA_VOCAB,
        context=PAPER_CONTEXT,
        layers=62,
        width=5120,
        heads=40,
        hidden=20480,
        types=1,
        norm_eps=1e-5,
    ),
}
"""The BERTs by name. bert-base and bert-large are the published ones; the others have no sentence head."""
