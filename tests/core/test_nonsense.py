"""Settings that make no sense are refused in one sentence, before anything is built."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
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


def clip(norm: Any) -> Callable[[], object]:
    return lambda: mics.clip_grad_norm_(model(), norm)


class Tokens(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, tokens: Any, targets: Any) -> Any:
        return super().forward((tokens + targets).unsqueeze(-1).expand(-1, -1, 2).float()).mean()


def save(**settings: Any) -> Callable[[], object]:
    return lambda: mics.save(Path("/dev/null/checkpoint"), model(), **({"optimizer": None} | settings))


def forecast(**settings: Any) -> Callable[[], object]:
    asked = {"model": nn.Linear(2, 2), "sharding": mics.Sharding.ddp(), "ranks": 2, "ranks_per_node": 1, **settings}
    return lambda: mics.forecast(**asked)


def plan(**settings: Any) -> Callable[[], object]:
    asked = {"model": Tokens(), "cluster": mics.Cluster.preset("p4d.24xlarge"), "global_batch": 8, "seq": 4}
    return lambda: mics.plan(**(asked | settings))


def cluster(**settings: Any) -> Callable[[], object]:
    return lambda: replace(mics.Cluster.preset("p4d.24xlarge"), **settings)


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
        (clip(None), "clip_grad_norm_: max_norm is None, expected a norm from 0 up"),
        (clip("x"), "clip_grad_norm_: max_norm is 'x', expected"),
        (adamw(lr="1e-3"), "AdamW: lr is '1e-3', expected a finite number from 0 up"),
        (adamw(eps=None), "AdamW: eps is None, expected"),
        (adamw(betas=0.9), "AdamW: betas are 0.9, expected two numbers"),
        (adamw(betas="0.9, 0.99"), "AdamW: betas are '0.9, 0.99', expected two numbers"),
        (adamw(betas=("a", "b")), "AdamW: betas are ('a', 'b'), expected two numbers"),
        (changed(lr=math.nan), "AdamW: lr is nan, expected a finite number from 0 up"),
        (changed(weight_decay=math.inf), "AdamW: weight_decay is inf, expected"),
        (changed(betas=(2.0, 2.0)), "AdamW: betas are (2.0, 2.0), expected"),
        (lambda: mics.LossScale(initial=math.nan), "LossScale: initial is nan, expected a number from 1 up that is"),
        (lambda: mics.LossScale(initial="1"), "LossScale: initial is '1', expected"),  # type: ignore[arg-type]
        (lambda: mics.LossScale(largest=1e300), "LossScale: largest is 1e+300, expected a number from 1 up that is"),
        (lambda: mics.LossScale(largest=2.0), "LossScale: initial is 65536.0, expected no more than largest, 2.0"),
        (lambda: mics.LossScale(initial=0.0), "LossScale: initial is 0.0, expected"),
        (lambda: mics.LossScale(largest=0.0), "LossScale: largest is 0.0, expected"),
        (lambda: mics.LossScale(patience=0), "LossScale: patience is 0, expected a count of steps"),
        (lambda: mics.LossScale(patience="9"), "LossScale: patience is '9', expected"),  # type: ignore[arg-type]
        (lambda: mics.Precision("float32"), "Precision: compute is 'float32', expected float64"),  # type: ignore[arg-type]
        (shard(units=[]), "shard: units is [], expected a list of module classes"),
        (shard(units=0), "shard: units is 0, expected a list of module classes"),
        (shard(units=nn.Linear), "expected a list of module classes"),
        (shard(units=lambda *_: False), "shard: units is a predicate that takes no module of Sequential"),
        (shard(units=[nn.ParameterList]), "shard: units takes 1, a ParameterList, which has no forward"),
        (shard(units=lambda *_: True), "shard: units takes 1, a ParameterList, which has no forward"),
        (shard(ranks_per_node=True), "shard: ranks_per_node is True, expected a number of ranks"),
        (shard(prefetch_bytes=True), "shard: prefetch_bytes is True, expected a number of bytes"),
        (shard(ranks_per_node="2"), "shard: ranks_per_node is '2', expected a number of ranks"),
        (shard(group="x"), "shard: group is 'x', expected a process group of torch.distributed that holds this rank"),
        (shard(group=-100), "shard: group is -100, expected"),  # what torch gives to ranks that are not in a group
        (shard(precision=[]), "shard: precision is [], expected a mics.Precision"),
        (lambda: mics.init(None), "init: timeout is None, expected a timedelta above 0"),  # type: ignore[arg-type]
        (lambda: mics.init("60"), "init: timeout is '60', expected a timedelta above 0"),  # type: ignore[arg-type]
        (lambda: mics.init(timedelta(-1)), "init: timeout is datetime.timedelta(days=-1), expected a timedelta above"),
        (lambda: next(mics.accumulate(model(), None)), "accumulate: micro_batches is None, expected"),  # type: ignore[arg-type]
        (lambda: mics.shape_of(("weight", torch.ones(2))), "shape_of: got a tuple, expected a parameter"),  # type: ignore[arg-type]
        (lambda: mics.Precision(loss_scale=2.0), "Precision: loss_scale is 2.0, expected a mics.LossScale"),  # type: ignore[arg-type]
        (lambda: mics.Sharding.ddp().resolve("2"), "Sharding: the number of ranks is '2', expected a count"),  # type: ignore[arg-type]
        (forecast(model=None), "forecast: the model is None, expected a torch.nn.Module"),
        (forecast(sharding="ddp"), "forecast: sharding is 'ddp', expected a mics.Sharding"),
        (forecast(precision="bf16"), "forecast: precision is 'bf16', expected a mics.Precision"),
        (forecast(ranks=None), "Sharding: the number of ranks is None, expected a count"),
        (forecast(ranks_per_node="x"), "ranks_per_node is 'x', expected a divisor of the 2 ranks"),
        (plan(model=None), "plan: the model is None, expected a torch.nn.Module"),
        (plan(cluster="p4d.24xlarge"), "plan: cluster is 'p4d.24xlarge', expected a mics.Cluster"),
        (plan(global_batch="8"), "plan: global_batch is '8', expected a multiple of the 8 ranks"),
        (plan(seq=4.0), "plan: seq is 4.0, expected the tokens of a sample"),
        (plan(precision="bf16"), "plan: precision is 'bf16', expected one mics.Precision"),
        (plan(precision=16), "plan: precision is 16, expected one mics.Precision"),
        (cluster(nodes="2"), "Cluster: nodes is '2', expected a whole number"),
        (cluster(nodes=1.5), "Cluster: nodes is 1.5, expected a whole number"),
        (cluster(memory=None), "Cluster: memory is None, expected a number"),
        (cluster(flops=1e12), "Cluster: flops is 1000000000000.0, expected a table"),
        (cluster(intra=1e9), "Cluster: intra is 1000000000.0, expected a Link"),
        (lambda: mics.Cluster.preset([]), "cluster: there is no preset []"),  # type: ignore[arg-type]
        (lambda: mics.Cluster.parse(None), "cluster: there is no preset 'None'"),  # type: ignore[arg-type]
        (lambda: mics.open_weights(None), "load_weights: the path is None, expected a text or a Path"),  # type: ignore[arg-type]
        (lambda: mics.load_weights(1, model()), "load_weights: the path is 1, expected a text or a Path"),  # type: ignore[arg-type]
        (lambda: mics.load(None, model(), None), "load: the path is None, expected a text or a Path"),  # type: ignore[arg-type]
        (lambda: mics.save(None, model(), None), "save: the path is None, expected a text or a Path"),  # type: ignore[arg-type]
        (save(keep=1.5), "save: keep is 1.5, expected a count from 1 up"),
        (save(keep="2"), "save: keep is '2', expected a count from 1 up"),
        (save(optimizer=1e-3), "the optimizer is 0.001, expected a torch optimizer, or None"),
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
