"""BERT: an encoder in plain torch that learns to restore masked tokens, read from top to bottom.

The layers are those of the published BERT: a norm after each sum, GELU, learned positions, token types, and a head that
shares the embedding. There is no dropout. RoBERTa is the same with one token type and without the sentence head.
Letters in the shape comments: B samples, T tokens of one, C width, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mics_models.documents import expect_rows, positions_within, visible
from mics_models.layers import Embedding, Linear
from mics_models.loss import chunked_cross_entropy


@dataclass(frozen=True, kw_only=True)
class BERTConfig:
    """The shape of a BERT."""

    vocab: int
    context: int  # tokens of the longest sequence
    layers: int
    width: int
    heads: int
    hidden: int  # width inside the MLP
    types: int = 2  # kinds of tokens, such as first and second sentence; 1 tells none apart, as in RoBERTa
    next_sentence: bool = False  # a second head tells whether the second sentence follows the first
    checkpoint_blocks: bool = False  # keep only each block's input, and compute the rest again in the backward
    norm_eps: float = 1e-12
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "width", "heads", "hidden", "types"):
            if getattr(self, name) < 1:
                raise ValueError(f"BERTConfig: {name} is {getattr(self, name)}, expected at least 1: give it a size")
        for name in ("init_std", "norm_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"BERTConfig: {name} is {getattr(self, name)}, expected a finite number from 0 up: change it"
                )
        if self.width % self.heads:
            raise ValueError(f"BERTConfig: width {self.width} is no multiple of heads {self.heads}: change one of them")

    def num_params(self) -> int:
        """Parameters; the embedding, which is the output projection too, counts once."""
        norm = 2 * self.width
        embeddings = (self.vocab + self.context + self.types) * self.width + norm
        block = self._block_weights() + 5 * self.width + self.hidden + 2 * norm  # biases of qkv, out, up and down
        head = self.width * self.width + self.width + norm + self.vocab
        sentence = self.width * self.width + self.width + 2 * self.width + 2
        return embeddings + self.layers * block + head + (sentence if self.next_sentence else 0)

    def flops_per_token(self, seq: int | None = None) -> int:
        """FLOPs of forward and backward for one token of a sequence of `seq` tokens (default: the context).

        Matrix products only. The head's product with the vocabulary counts for every token, masked or not, as it is
        computed for every token. Left out are the sentence head, which reads one token of a row, and what checkpointing
        computes again.
        """
        seq = self.context if seq is None else seq
        weights = self.layers * self._block_weights() + self.width * self.width + self.vocab * self.width
        attention = self.layers * 2 * seq * self.width  # q @ k.T and p @ v, T * C multiplications each
        return 3 * 2 * (weights + attention)  # 2: multiply, add; 3: forward, and two products as large in the backward

    def _block_weights(self) -> int:
        """Elements of one block's matrices."""
        return 4 * self.width * self.width + 2 * self.width * self.hidden


class Predictions(NamedTuple):
    """What a BERT says without targets."""

    tokens: Tensor  # logits [B, T, V]
    follows: Tensor | None  # logits [B, 2] of a config with next_sentence: it follows, it does not


def make_norm(config: BERTConfig) -> nn.LayerNorm:
    """LayerNorm over the width."""
    return nn.LayerNorm(config.width, eps=config.norm_eps)


class Attention(nn.Module):
    """Self-attention in both directions."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, std=config.init_std)
        self.out = Linear(config.width, config.width, std=config.init_std)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; without `seen` [B, 1, T, T] each token sees all."""
        q, k, v = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, h=self.heads)  # [B, H, T, D] each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # [B, H, T, D]
        out: Tensor = self.out(rearrange(x, "b h t d -> b t (h d)"))
        return out


class MLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.hidden, std=config.init_std)
        self.down = Linear(config.hidden, config.width, std=config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """One layer: attention and MLP, each added to its input and followed by a norm."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = make_norm(config)
        self.mlp = MLP(config)
        self.mlp_norm = make_norm(config)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x = self.attention_norm(x + self.attention(x, seen))
        out: Tensor = self.mlp_norm(x + self.mlp(x))
        return out


class TokenHead(nn.Module):
    """What stands between the last block and the logits, and the logits' bias; their weight is the embedding's."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.transform = Linear(config.width, config.width, std=config.init_std)
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.empty(config.vocab))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to zero again."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C], to be multiplied with the embedding."""
        out: Tensor = self.norm(F.gelu(self.transform(x)))
        return out


class SentenceHead(nn.Module):
    """Tells from a row's first token whether its second sentence follows the first."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.pooler = Linear(config.width, config.width, std=config.init_std)
        self.out = Linear(config.width, 2, std=config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> logits [B, 2]: it follows, it does not."""
        out: Tensor = self.out(self.pooler(x[:, 0]).tanh())
        return out


class BERT(nn.Module):
    """The encoder. `model(tokens)` returns Predictions, `model(tokens, targets=...)` the mean loss in nats.

    `mask` [B, T] is True where a token is real: what padding holds changes nothing elsewhere. `types` [B, T] says of
    which kind each token is, all of kind 0 without it. `documents` [B, T] numbers the documents packed into each row,
    anew wherever the number changes: each is then computed as if it were alone in its row.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab, config.width, std=config.init_std)
        self.positions = Embedding(config.context, config.width, std=config.init_std)
        self.types = Embedding(config.types, config.width, std=config.init_std)
        self.norm = make_norm(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.token_head = TokenHead(config)
        self.sentence_head = SentenceHead(config) if config.next_sentence else None

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        follows: Tensor | None = None,
    ) -> Predictions | Tensor:
        """Tokens [B, T] -> Predictions, or with targets the loss [].

        The loss is the mean over those `targets` [B, T] that are not -100, and with `follows` [B], True where a second
        sentence follows the first, the mean of the sentence head's losses in addition.
        """
        self._check(tokens, mask, documents, targets, follows)
        if mask is None and documents is None:
            places, seen = torch.arange(tokens.shape[1], device=tokens.device), None  # [T]
        else:
            documents = torch.zeros_like(tokens) if documents is None else documents
            places, seen = positions_within(documents), visible(documents, mask)  # [B, T], [B, 1, T, T]
        kinds = self.types.weight[0] if types is None else self.types(types)  # [C] or [B, T, C]
        x = self.norm(self.embedding(tokens) + self.positions(places) + kinds)  # [B, T, C]
        for block in self.blocks:
            if self.config.checkpoint_blocks:
                x = checkpoint(block, x, seen, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, seen)
        hidden = self.token_head(x)  # [B, T, C]
        weight, bias = self.embedding.weight, self.token_head.bias  # [V, C], [V]
        if targets is None:
            return Predictions(
                F.linear(hidden, weight, bias), None if self.sentence_head is None else self.sentence_head(x)
            )
        loss = chunked_cross_entropy(hidden, weight, targets, bias)
        if follows is None or self.sentence_head is None:
            return loss
        return loss + F.cross_entropy(self.sentence_head(x).float(), (~follows).long())

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place, with torch.compile's options; the root stays as it is."""
        for block in self.blocks:
            block.compile(**options)

    def num_params(self) -> int:
        """Parameters, counted; BERTConfig.num_params() gives the same number without a model."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq: int | None = None) -> int:
        """As BERTConfig.flops_per_token()."""
        return self.config.flops_per_token(seq)

    def _check(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        targets: Tensor | None,
        follows: Tensor | None,
    ) -> None:
        """Refuse what would be computed as something else than was meant."""
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"BERT: got sequences of {tokens.shape[1]} tokens, expected at most context = {self.config.context}: "
                "cut them, or build the model with a longer context"
            )
        if documents is not None:
            expect_rows("BERT", "documents", documents, tokens)
        if mask is not None:
            expect_rows("BERT", "mask", mask, tokens)
        for name, truths in (("mask", mask), ("follows", follows)):
            if truths is not None and truths.dtype != torch.bool:
                raise ValueError(f"BERT: {name} is of {truths.dtype}, expected torch.bool: pass {name}.bool()")
        if follows is not None and (targets is None or self.sentence_head is None or documents is not None):
            raise ValueError(
                "BERT: got follows, expected it with targets, without documents and from a config with next_sentence: "
                "leave it out, or change those"
            )
