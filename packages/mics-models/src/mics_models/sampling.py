"""Sampling from a model that has learned."""

from __future__ import annotations

import torch
from torch import Tensor

from mics_models.gpt import GPT


@torch.no_grad()
def sample(model: GPT, prompt: Tensor, length: int, *, temperature: float = 0.8, seed: int = 0) -> Tensor:
    """`prompt` [tokens] with `length` tokens more, drawn one at a time; temperature 0 takes the likeliest.

    Each token costs a whole forward over what fits in the context: fine for a paragraph of a small model.
    """
    if len(prompt) < 1:
        raise ValueError("sample: the prompt has no tokens, expected at least 1: give the model something to follow")
    if length < 0 or temperature < 0:
        raise ValueError(f"sample: length is {length} and temperature {temperature}, expected 0 or more: raise them")
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    tokens = prompt.to(device, torch.int64)
    for _ in range(length):
        logits = model(tokens[None, -model.config.context :])[0, -1].float()  # [V]
        if temperature == 0:
            drawn = logits.argmax()[None]
        else:
            drawn = torch.multinomial(
                ((logits - logits.max()) / temperature).softmax(dim=0), 1, generator=random
            )  # [1]
        tokens = torch.cat((tokens, drawn))
    return tokens
