import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mics_models import GPT, GPTConfig
from mics_models.gpt import MLP, Attention, Block, rotate, rotation
from mics_models.loss import IGNORED
from shapes import GPT2, LATER, VARIANTS, lively, tokens_for

each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def gradients(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(*inputs), tuple(model.parameters()))


@each_variant
def test_a_later_token_never_changes_earlier_logits_and_an_earlier_one_does_change_later(config: GPTConfig) -> None:
    model = lively(GPT(config))
    tokens = tokens_for(config)
    before = model(tokens)
    for place in (1, 11, config.context - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % config.vocab
        moved = (model(changed) - before).abs().amax(dim=(0, 2))  # [T]
        assert moved[:place].max() < 1e-5
        assert moved[place:].min() > 1e-3


def test_learned_positions_tell_equal_tokens_apart() -> None:
    logits = lively(GPT(GPT2))(torch.full((1, 24), 7))[0]  # without positions every place would see the same
    assert torch.cdist(logits, logits).add(torch.eye(24)).min() > 1e-2


@each_variant
def test_the_loss_is_the_cross_entropy_of_the_logits(config: GPTConfig) -> None:
    model = lively(GPT(config))
    tokens, targets = tokens_for(config), tokens_for(config)
    targets[0, 3:9] = IGNORED
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected)


def test_a_gpt2_block_is_torchs_own_transformer_layer() -> None:
    block = lively(Block(GPT2))
    layer = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0, activation=nn.GELU("tanh"), batch_first=True, norm_first=True
    )
    parts = {
        "norm1": block.attention_norm,
        "self_attn.in_proj_": block.attention.qkv,
        "self_attn.out_proj": block.attention.out,
        "norm2": block.mlp_norm,
        "linear1": block.mlp.up,
        "linear2": block.mlp.down,
    }
    layer.load_state_dict(
        {
            f"{name}{'' if name.endswith('_') else '.'}{kind}": tensor
            for name, part in parts.items()
            for kind, tensor in part.state_dict().items()
        }
    )
    x = torch.randn(2, 24, 32)
    expected = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(24), is_causal=True)
    torch.testing.assert_close(block(x, None), expected, rtol=1e-4, atol=1e-4)


def test_swiglu_gates_one_half_with_the_other() -> None:
    mlp = lively(MLP(LATER))
    gate, up = mlp.up.weight[:80], mlp.up.weight[80:]
    x = torch.randn(2, 24, 32)
    gated = (x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(mlp(x), gated @ mlp.down.weight.T, rtol=1e-4, atol=1e-4)


def test_rotated_queries_and_keys_know_only_their_distance() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    cos, sin = (part.double() for part in rotation(LATER, torch.arange(24)))

    def score(query_at: int, key_at: int) -> float:
        turned = rotate(q, (cos[query_at], sin[query_at])) * rotate(k, (cos[key_at], sin[key_at]))
        return turned.sum().item()

    assert score(3, 3) == pytest.approx((q * k).sum().item(), abs=1e-6)
    for distance in (1, 5, 13):
        scores = [score(distance + at, at) for at in range(24 - distance)]
        assert max(scores) - min(scores) < 1e-5
    assert abs(score(13, 0) - score(5, 0)) > 1e-2
    assert abs(score(5, 0) - score(0, 5)) > 1e-2


def test_attention_with_rotation_is_the_same_wherever_the_sequence_begins() -> None:
    attention = lively(Attention(LATER))
    cos, sin = rotation(LATER, torch.arange(24))
    x = torch.randn(2, 12, 32)
    early, late = (attention(x, (cos[at : at + 12], sin[at : at + 12])) for at in (0, 9))
    torch.testing.assert_close(early, late, rtol=1e-4, atol=1e-5)
    stretched = attention(x, (cos[::2], sin[::2]))
    assert (stretched - early).abs().max() > 1e-2


def test_grouped_queries_equal_full_heads_whose_keys_and_values_are_repeated() -> None:
    grouped = lively(Attention(LATER))
    full = Attention(dataclasses.replace(LATER, kv_heads=4))
    q, k, v = grouped.qkv.weight.split(grouped.widths)

    def repeated(weight: Tensor) -> Tensor:  # heads 0 and 1 share the first of the two, heads 2 and 3 the second
        return weight.reshape(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)

    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat((q, repeated(k), repeated(v))))
        full.out.weight.copy_(grouped.out.weight)
    x, by = torch.randn(2, 24, 32), rotation(LATER, torch.arange(24))
    torch.testing.assert_close(grouped(x, by), full(x, by), rtol=1e-4, atol=1e-5)


def test_weights_begin_with_the_scale_that_their_place_needs() -> None:
    config = dataclasses.replace(GPT2, width=256, hidden=1024, layers=8)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got sequences of 25 tokens, expected at most context = 24: cut them"):
        GPT(GPT2)(tokens_for(GPT2, length=25))


@each_variant
def test_padding_at_the_end_changes_neither_logits_nor_gradients(config: GPTConfig) -> None:
    model = lively(GPT(config))
    tokens, targets = tokens_for(config, length=15), tokens_for(config, length=15)
    padded = F.pad(tokens, (0, 9), value=7), F.pad(targets, (0, 9), value=IGNORED)
    torch.testing.assert_close(model(padded[0])[:, :15], model(tokens), rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients(model, *padded), gradients(model, tokens, targets), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@each_variant
def test_packed_documents_have_the_logits_and_gradients_that_they_have_one_by_one(config: GPTConfig) -> None:
    model = lively(GPT(config))
    tokens, targets = tokens_for(config), tokens_for(config)
    documents = torch.tensor([[3] * 5 + [4] * 18 + [7], [0] * 12 + [1] * 2 + [0] * 10])  # a number may come again
    alone = [(0, 0, 5), (0, 5, 23), (0, 23, 24), (1, 0, 12), (1, 12, 14), (1, 14, 24)]  # row, begin, end
    packed = model(tokens, documents=documents)
    for row, begin, end in alone:
        logits = model(tokens[row : row + 1, begin:end])[0]
        torch.testing.assert_close(packed[row, begin:end], logits, rtol=1e-4, atol=1e-4)
    assert (packed - model(tokens)).abs().max() > 1e-2
    summed = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for row, begin, end in alone:
        part = (slice(row, row + 1), slice(begin, end))
        for total, gradient in zip(summed, gradients(model, tokens[part], targets[part]), strict=True):
            total += gradient * (end - begin) / tokens.numel()
    for got, wanted in zip(gradients(model, tokens, targets, documents), summed, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_documents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^GPT: documents has the shape \(24,\), expected \(2, 24\) as tokens: give "):
        GPT(GPT2)(tokens_for(GPT2), documents=torch.zeros(24))
