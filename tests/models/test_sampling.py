import pytest
import torch

from mics_models import GPT, sample
from shapes import LATER


def test_a_sample_follows_the_prompt_beyond_the_context_and_is_the_seeds() -> None:
    model = GPT(LATER)
    prompt = torch.tensor([3, 1, 4])
    first = sample(model, prompt, 30, seed=7)
    assert len(first) == 33 > LATER.context
    assert torch.equal(first[:3], prompt)
    assert torch.equal(sample(model, prompt, 30, seed=7), first)
    assert not torch.equal(sample(model, prompt, 30, seed=8), first)


def test_without_temperature_each_token_is_the_likeliest() -> None:
    model = GPT(LATER)
    tokens = sample(model, torch.tensor([3, 1, 4]), 10, temperature=0)
    logits = model(tokens[None])[0]  # causal: one forward predicts every token
    assert torch.equal(logits[2:-1].argmax(dim=-1), tokens[3:])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt has no tokens, expected at least 1"):
        sample(GPT(LATER), torch.tensor([]), 1)
