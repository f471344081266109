"""The two variants of GPT, small enough to test."""

from mics_models import GPTConfig

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
