"""What users may do with the slices that parameters of a sharded model are, and what is refused."""

import pytest
import torch
from torch import nn

import mics_core as mics


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4))


def sharded() -> nn.Module:
    return mics.shard(plain(), mics.Sharding.ddp())


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 6)).square().sum().backward()


@pytest.mark.parametrize("name", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_would_never_be_called_is_refused(name: str) -> None:
    model = plain()
    getattr(model[2].weight, name)(print)  # type: ignore[operator]
    with pytest.raises(mics.ConfigError, match=r"2\.weight has a hook that waits for its gradient"):
        mics.shard(model, mics.Sharding.ddp())
    model = sharded()
    getattr(model[2].weight, name)(print)  # type: ignore[operator]
    with pytest.raises(mics.LifecycleError, match=r"2\.weight: a hook waits for its gradient and would never be"):
        backward(model)


def test_a_penalty_on_slices_is_refused() -> None:
    model = sharded()
    with pytest.raises(mics.LifecycleError, match="compute the penalty in the forward of the module that holds it"):
        (model(torch.ones(2, 6)).sum() + sum(p.square().sum() for p in model.parameters())).backward()
