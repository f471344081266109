"""GPT: a decoder-only transformer in plain torch, read from top to bottom.

One configuration covers GPT-2 (LayerNorm, GELU, learned positions, biases, tied embedding) and the later variant
(RMSNorm, SwiGLU, rotary positions, grouped queries, no biases). Letters in the shape comments: B samples, T tokens of
one, C width, H heads, K key-value heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mics_models.documents import expect_rows, positions_within, visible
from mics_models.layers import Embedding, Linear
from mics_models.loss import chunked_cross_entropy

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, [1, T, D / 2] each, or [B, 1, T, D / 2] where rows hold documents."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT; the variants default to GPT-2's."""

    vocab: int
    context: int  # tokens of the longest sequence
    layers: int
    width: int
    heads: int
    kv_heads: int  # fewer than heads: each serves a group of query heads
    hidden: int  # width inside the MLP
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["learned", "rotary"] = "learned"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    tied: bool = True  # the embedding is the output projection, too
    checkpoint_blocks: bool = False  # keep only each block's input, and compute the rest again in the backward
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "width", "heads", "kv_heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}, expected at least 1: give it a size")
        for name in ("init_std", "norm_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"GPTConfig: {name} is {getattr(self, name)}, expected a finite number from 0 up: change it"
                )
        if not 0 < self.rotary_base < math.inf:
            raise ValueError(
                f"GPTConfig: rotary_base is {self.rotary_base}, expected a finite number above 0: change it"
            )
        for name, allowed in (
            ("norm", ("layer", "rms")),
            ("positions", ("learned", "rotary")),
            ("mlp", ("gelu", "swiglu")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, expected one of {allowed}: choose one")
        if self.width % self.heads:
            raise ValueError(f"GPTConfig: width {self.width} is no multiple of heads {self.heads}: change one of them")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"GPTConfig: heads {self.heads} is no multiple of kv_heads {self.kv_heads}: change one of them"
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(
                f"GPTConfig: a head is {self.head_width} wide, expected an even width to rotate in pairs: change heads"
            )

    @property
    def head_width(self) -> int:
        """D, the width of one head."""
        return self.width // self.heads

    def num_params(self) -> int:
        """Parameters; a tied embedding counts once."""
        norm = self.width * (2 if self.norm == "layer" and self.bias else 1)
        biases = (self.heads + 2 * self.kv_heads) * self.head_width + self.width  # of qkv and out
        biases += self.hidden * (2 if self.mlp == "swiglu" else 1) + self.width  # of the MLP's two layers
        block = self._block_weights() + 2 * norm + (biases if self.bias else 0)
        embeddings = self.vocab * self.width * (1 if self.tied else 2)
        if self.positions == "learned":
            embeddings += self.context * self.width
        return embeddings + self.layers * block + norm

    def flops_per_token(self, seq: int | None = None) -> int:
        """FLOPs of forward and backward for one token of a sequence of `seq` tokens (default: the context).

        Matrix products only. Attention counts as if it were not causal, and what checkpointing computes again is left
        out: so MFU is comparable with published ones, whatever the kernels save and the settings repeat.
        """
        seq = self.context if seq is None else seq
        weights = self.layers * self._block_weights() + self.vocab * self.width
        attention = self.layers * 2 * seq * self.width  # q @ k.T and p @ v, T * C multiplications each
        return 3 * 2 * (weights + attention)  # 2: multiply, add; 3: forward, and two products as large in the backward

    def _block_weights(self) -> int:
        """Elements of one block's matrices."""
        attention = self.width * (self.heads + 2 * self.kv_heads) * self.head_width + self.width * self.width
        return attention + self.width * self.hidden * (3 if self.mlp == "swiglu" else 2)


def make_norm(config: GPTConfig) -> nn.Module:
    """The configured norm over the width."""
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)


def residual_std(config: GPTConfig) -> float:
    """Of layers that add to the residual stream: 2 * layers of them add up, and the sum is to keep its scale."""
    return config.init_std / math.sqrt(2 * config.layers)


def rotation(config: GPTConfig, positions: Tensor) -> Rotation:
    """The angles by which positions [...] turn queries and keys: [..., D / 2]."""
    # Computed in each forward, and in float32: a buffer would have to be filled again after a build on the meta
    # device, and bfloat16 cannot tell the positions of a long sequence apart.
    pairs = torch.arange(0, config.head_width, 2, device=positions.device, dtype=torch.float32)  # [D / 2]
    frequencies = config.rotary_base ** (-pairs / config.head_width)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + D / 2]) by its angle, so that q . k depends on the distance of their positions."""
    cos, sin = by
    first, second = x.chunk(2, dim=-1)  # [B, H, T, D / 2] each
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; with fewer key-value heads than heads, each serves a group of consecutive heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.grouped = config.kv_heads < config.heads
        self.widths = [n * config.head_width for n in (config.heads, config.kv_heads, config.kv_heads)]
        self.qkv = Linear(config.width, sum(self.widths), bias=config.bias, std=config.init_std)
        self.out = Linear(config.width, config.width, bias=config.bias, std=residual_std(config))

    def forward(self, x: Tensor, by: Rotation | None, seen: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; without `seen` [B, 1, T, T] each token sees itself and all before it."""
        q, k, v = (
            rearrange(part, "b t (h d) -> b h t d", d=self.head_width)  # [B, H, T, D], [B, K, T, D] twice
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        if by is not None:
            q, k = rotate(q, by), rotate(k, by)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=self.grouped
        )  # [B, H, T, D]
        out: Tensor = self.out(rearrange(x, "b h t d -> b t (h d)"))
        return out


class MLP(nn.Module):
    """Two layers with GELU between, or SwiGLU: a SiLU gate times a linear layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        inner = 2 * config.hidden if self.gated else config.hidden
        self.up = Linear(config.width, inner, bias=config.bias, std=config.init_std)
        self.down = Linear(config.hidden, config.width, bias=config.bias, std=residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x = self.up(x)  # [B, T, hidden], twice that if gated
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x, approximate="tanh")  # the approximation is GPT-2's own
        out: Tensor = self.down(x)
        return out


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, by: Rotation | None, seen: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x = x + self.attention(self.attention_norm(x), by, seen)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """The decoder. `model(tokens)` returns logits, `model(tokens, targets)` the mean loss in nats per token.

    Padding at the end of a row needs no mask: no real token sees what follows it, and targets of -100 keep the padding
    out of the loss. `documents` [B, T] numbers the documents packed into each row, anew wherever the number changes:
    each is then computed as if it were alone in its row.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab, config.width, std=config.init_std)
        self.positions = (
            Embedding(config.context, config.width, std=config.init_std) if config.positions == "learned" else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        # A tied head is no second Parameter: one that two modules own is easily cut in two when they are moved.
        self.head = None if config.tied else Linear(config.width, config.vocab, bias=False, std=config.init_std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """[B, T] -> logits [B, T, V], or with targets [B, T] -> the loss []; targets of -100 do not count.

        With `documents` attention reads a mask of B * T * T bytes instead of knowing that it is causal.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"GPT: got sequences of {length} tokens, expected at most context = {self.config.context}: cut them, "
                "or build the model with a longer context"
            )
        if documents is None:
            places, seen = torch.arange(length, device=tokens.device), None  # [T]
        else:
            expect_rows("GPT", "documents", documents, tokens)
            places = positions_within(documents)  # [B, T]
            seen = visible(documents).tril()  # [B, 1, T, T]
        x = self.embedding(tokens)  # [B, T, C]
        by = None
        if self.positions is not None:
            x = x + self.positions(places)
        else:
            by = rotation(self.config, places[..., None, :])  # one for all heads
        for block in self.blocks:
            if self.config.checkpoint_blocks:
                x = checkpoint(block, x, by, seen, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, by, seen)
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight  # [V, C]
        if targets is None:
            return F.linear(x, weight)
        return chunked_cross_entropy(x, weight, targets)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place, with torch.compile's options; the root stays as it is."""
        for block in self.blocks:
            block.compile(**options)

    def num_params(self) -> int:
        """Parameters, counted; GPTConfig.num_params() gives the same number without a model."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq: int | None = None) -> int:
        """As GPTConfig.flops_per_token()."""
        return self.config.flops_per_token(seq)
