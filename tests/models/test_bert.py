import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mics_models import BERT, BERTConfig
from mics_models.bert import Block
from mics_models.loss import IGNORED
from shapes import ENCODERS, PAIRED, ROBERTA, lively, tokens_for

each_encoder = pytest.mark.parametrize("config", ENCODERS.values(), ids=ENCODERS)


def lively_bert(config: BERTConfig) -> BERT:
    """Large weights, but norms near 1: a stack of post-norm blocks with tiny scales forgets its inputs."""
    model = BERT(config)
    lively(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(1)
    return model


def gradients(model: BERT, tokens: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, **inputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_block_is_torchs_own_transformer_layer() -> None:
    block = lively(Block(PAIRED))
    layer = nn.TransformerEncoderLayer(32, 4, 80, dropout=0, activation="gelu", batch_first=True, layer_norm_eps=1e-12)
    parts = {
        "self_attn.in_proj_": block.attention.qkv,
        "self_attn.out_proj.": block.attention.out,
        "norm1.": block.attention_norm,
        "linear1.": block.mlp.up,
        "linear2.": block.mlp.down,
        "norm2.": block.mlp_norm,
    }
    layer.load_state_dict({name + kind: t for name, part in parts.items() for kind, t in part.state_dict().items()})
    x = torch.randn(2, 24, 32)
    close(block(x), layer(x))


@each_encoder
def test_every_token_sees_every_other(config: BERTConfig) -> None:
    model, tokens = lively_bert(config), tokens_for(config)
    before = model(tokens).tokens
    for place in (0, 11, 23):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % config.vocab
        assert (model(changed).tokens - before).abs().amax(dim=2).min() > 1e-4


@each_encoder
def test_the_loss_is_the_mean_over_the_masked_tokens(config: BERTConfig) -> None:
    model, tokens = lively_bert(config), tokens_for(config)
    targets = torch.full_like(tokens, IGNORED)
    targets[0, 3], targets[1, 9:12] = 5, torch.tensor([1, 0, 60])
    expected = F.cross_entropy(model(tokens).tokens.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets=targets), expected)


def test_the_sentence_heads_loss_is_added() -> None:
    model, tokens, follows = lively_bert(PAIRED), tokens_for(PAIRED, samples=3), torch.tensor([True, False, True])
    logits = model(tokens).follows
    right = logits.softmax(dim=1)[torch.arange(3), torch.tensor([0, 1, 0])]  # entry 0: it follows
    expected = model(tokens, targets=tokens) - right.log().mean()
    torch.testing.assert_close(model(tokens, targets=tokens, follows=follows), expected)
    assert "sentence_head.pooler.weight" in gradients(model, tokens, targets=tokens, follows=follows)
    assert BERT(ROBERTA)(tokens).follows is None


def test_types_and_places_tell_equal_tokens_apart() -> None:
    model, tokens = lively_bert(PAIRED), torch.full((1, 24), 7)
    types = torch.arange(24)[None] // 12
    plain, typed = model(tokens).tokens, model(tokens, types=types).tokens
    assert (plain - typed).abs().max() > 1e-2
    close(model(tokens, types=torch.zeros_like(types)).tokens, plain)
    assert torch.cdist(plain[0], plain[0]).add(torch.eye(24)).min() > 1e-2


@each_encoder
def test_padding_changes_neither_what_real_tokens_give_nor_gradients(config: BERTConfig) -> None:
    model = lively_bert(config)
    lengths = (24, 15, 1)
    tokens = tokens_for(config, samples=3)
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    targets = tokens.where(mask, IGNORED)
    other = tokens.where(mask, (tokens + 1) % config.vocab)
    padded = model(tokens, mask=mask)
    assert torch.equal(model(other, mask=mask).tokens[mask], padded.tokens[mask])
    wanted = gradients(model, tokens, mask=mask, targets=targets)
    for name, gradient in gradients(model, other, mask=mask, targets=targets).items():
        assert torch.equal(gradient, wanted[name]), name
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])
        close(padded.tokens[row, :length], alone.tokens[0])
        if config.next_sentence:
            close(padded.follows[row], alone.follows[0])
    assert padded.tokens.isfinite().all()


@each_encoder
def test_packed_documents_give_what_they_give_one_by_one(config: BERTConfig) -> None:
    model, tokens = lively_bert(config), tokens_for(config)
    documents = torch.tensor([[3] * 5 + [4] * 18 + [7], [0] * 12 + [1] * 2 + [0] * 10])  # a number may come again
    alone = [(0, 0, 5), (0, 5, 23), (0, 23, 24), (1, 0, 12), (1, 12, 14), (1, 14, 20)]  # row, begin, end
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 20:] = False
    packed = model(tokens, documents=documents, mask=mask).tokens
    for row, begin, end in alone:
        close(packed[row, begin:end], model(tokens[row : row + 1, begin:end]).tokens[0])
    targets = tokens.where(mask, IGNORED)
    summed: dict[str, Tensor] = {}
    for row, begin, end in alone:
        part = tokens[row : row + 1, begin:end]
        for name, gradient in gradients(model, part, targets=part).items():
            summed[name] = summed.get(name, 0) + gradient * (end - begin) / mask.sum()
    for name, gradient in gradients(model, tokens, documents=documents, mask=mask, targets=targets).items():
        close(gradient, summed[name])


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (PAIRED, {"mask": torch.ones(24, dtype=torch.bool)}, r"mask has the shape \(24,\), expected \(2, 24\)"),
        (PAIRED, {"documents": torch.zeros(2, 23)}, r"documents has the shape \(2, 23\), expected \(2, 24\)"),
        (PAIRED, {"mask": torch.ones(2, 24)}, r"mask is of torch.float32, expected torch.bool: pass mask.bool\(\)"),
        (PAIRED, {"follows": torch.zeros(2, dtype=torch.bool)}, "got follows, expected it with targets"),
        (ROBERTA, {"follows": torch.zeros(2, dtype=torch.bool), "targets": torch.zeros(2, 24)}, "got follows"),
        (dataclasses.replace(PAIRED, context=23), {}, "got sequences of 24 tokens, expected at most context = 23"),
    ],
    ids=["mask", "documents", "float", "targets", "head", "context"],
)
def test_a_call_that_would_mean_something_else_is_refused(
    config: BERTConfig, inputs: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^BERT: {message}"):
        BERT(config)(tokens_for(PAIRED), **inputs)
