"""Named shapes of models: one for a CPU, and those that the runtime is measured with."""

from __future__ import annotations

from mics_models.gpt import GPTConfig


def _gpt2(layers: int, width: int, heads: int, context: int = 1024) -> GPTConfig:
    # The vocabulary is GPT-2's own size and not padded to a rounder one, so that its weights fit.
    return GPTConfig(
        vocab=50257, context=context, layers=layers, width=width, heads=heads, kv_heads=heads, hidden=4 * width
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
    "gpt-30b": _gpt2(48, 7168, 56, context=2048),
    "gpt-100b": _gpt2(80, 10240, 80, context=2048),
    "gpt-175b": _gpt2(96, 12288, 96, context=2048),
}
"""The GPTs by name. The larger ones are GPT-2 made wider and deeper, as the published comparisons are."""
