"""Settings that make no sense are refused in one sentence, before anything is built."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mics_core as mics


def model() -> nn.Module:
    return mics.shard(nn.Sequential(nn.Linear(2, 2)), mics.Sharding.ddp())


def adamw(**settings: Any) -> Callable[[], object]:
    return lambda: mics.AdamW(model().parameters(), **settings)


def changed(**settings: Any) -> Callable[[], object]:
    """As by a schedule, after the optimizer was made."""

    def step() -> None:
        (sharded := model())(torch.ones(1, 2)).sum().backward()
        optimizer = mics.AdamW(sharded.parameters())
        optimizer.param_groups[0].update(settings)
        optimizer.step()

    return step


def shard(**settings: Any) -> Callable[[], object]:
    layers = nn.Sequential(nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.ones(2))]))
    return lambda: mics.shard(layers, mics.Sharding.ddp(), **settings)


def clip(norm: float) -> Callable[[], object]:
    return lambda: mics.clip_grad_norm_(model(), norm)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (adamw(lr=-1.0), "AdamW: lr is -1.0, expected a finite number from 0 up"),
        (adamw(lr=math.inf), "AdamW: lr is inf, expected"),
        (adamw(weight_decay=-0.1), "AdamW: weight_decay is -0.1, expected"),
        (adamw(weight_decay=math.nan), "AdamW: weight_decay is nan, expected"),
        (adamw(eps=-1e-8), "AdamW: eps is -1e-08, expected"),
        (adamw(betas=(0.9, 1.0)), "AdamW: betas are (0.9, 1.0), expected two numbers from 0 to below 1"),
        (adamw(betas=(0.9,)), "AdamW: betas are (0.9,), expected two numbers"),
        (clip(-1.0), "clip_grad_norm_: max_norm is -1.0, expected a norm from 0 up"),
        (clip(math.nan), "clip_grad_norm_: max_norm is nan, expected"),
        (adamw(lr="1e-3"), "AdamW: lr is 1e-3, expected a finite number from 0 up"),
        (adamw(eps=None), "AdamW: eps is None, expected"),
        (adamw(betas=0.9), "AdamW: betas are 0.9, expected two numbers"),
        (adamw(betas=("a", "b")), "AdamW: betas are ('a', 'b'), expected two numbers"),
        (changed(lr=math.nan), "AdamW: lr is nan, expected a finite number from 0 up"),
        (changed(weight_decay=math.inf), "AdamW: weight_decay is inf, expected"),
        (changed(betas=(2.0, 2.0)), "AdamW: betas are (2.0, 2.0), expected"),
        (lambda: mics.LossScale(initial=math.nan), "LossScale: initial is nan, expected a number from 1 up that is"),
        (lambda: mics.LossScale(initial="1"), "LossScale: initial is 1, expected"),  # type: ignore[arg-type]
        (lambda: mics.LossScale(largest=1e300), "LossScale: largest is 1e+300, expected a number from 1 up that is"),
        (lambda: mics.LossScale(largest=2.0), "LossScale: initial is 65536.0, expected no more than largest, 2.0"),
        (lambda: mics.LossScale(initial=0.0), "LossScale: initial is 0.0, expected"),
        (lambda: mics.LossScale(largest=0.0), "LossScale: largest is 0.0, expected"),
        (lambda: mics.LossScale(patience=0), "LossScale: patience is 0, expected a count of steps"),
        (shard(units=[]), "shard: units is [], expected a list of module classes"),
        (shard(units=0), "shard: units is 0, expected a list of module classes"),
        (shard(units=nn.Linear), "expected a list of module classes"),
        (shard(units=lambda *_: False), "shard: units is a predicate that takes no module of Sequential"),
        (shard(units=[nn.ParameterList]), "shard: units takes 1, a ParameterList, which has no forward"),
        (shard(units=lambda *_: True), "shard: units takes 1, a ParameterList, which has no forward"),
        (shard(ranks_per_node=True), "shard: ranks_per_node is True, expected a number of ranks"),
        (shard(prefetch_bytes=True), "shard: prefetch_bytes is True, expected a number of bytes"),
        (shard(ranks_per_node="2"), "shard: ranks_per_node is '2', expected a number of ranks"),
        (lambda: mics.shard(None, mics.Sharding.ddp()), "shard: the model is None, expected a torch.nn.Module"),
        (lambda: mics.shard(None, "auto"), "shard: the model is None, expected a torch.nn.Module"),  # type: ignore[type-var]
        (lambda: mics.Sharding(True, True, True).resolve(1), "Sharding: params is True, expected a count of pieces"),
        (lambda: mics.Sharding(1, 1, -2).resolve(1), "Sharding: optimizer is -2, expected a count of pieces"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(request_: Callable[[], object], sentence: str) -> None:
    with pytest.raises(mics.ConfigError, match=re.escape(sentence)) as caught:
        request_()
    assert "\n" not in str(caught.value)


def test_betas_may_be_a_list_as_torch_takes_them() -> None:
    optimizer = mics.AdamW((sharded := model()).parameters(), betas=[0.9, 0.95])  # type: ignore[arg-type]
    sharded(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
