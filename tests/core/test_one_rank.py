"""A world of one rank, in this process: what does not depend on how many there are."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mics_core as mics


def pair() -> tuple[nn.Module, nn.Module]:
    """A sharded model, and the same one as it was."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    sharded = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    sharded.load_state_dict(plain.state_dict())
    return mics.shard(sharded, mics.Sharding.ddp()), plain


def train(model: nn.Module, optimizer: Any, between: Callable[[Any, int], None], clip: Callable[..., Tensor]) -> None:
    x = torch.linspace(-1, 1, 18).view(3, 6)
    for step in range(4):
        between(optimizer, step)
        model(x).square().sum().backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()


def test_settings_of_the_optimizer_may_change_between_steps() -> None:
    sharded, plain = pair()

    def change(optimizer: Any, step: int) -> None:
        group = optimizer.param_groups[0]
        group["lr"] = 1e-2 / (step + 1)
        group["betas"] = (0.9 - 0.1 * step, 0.99)
        group["eps"] = 10.0 ** (-8 + step)
        group["weight_decay"] = 0.1 * step

    for model, kind in ((sharded, mics.AdamW), (plain, torch.optim.AdamW)):
        train(model, kind(model.parameters()), change, lambda: torch.zeros(()))
    for (name, found), expected in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.view_as(expected), expected, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [mics.AdamW, torch.optim.SGD])
def test_clipping_twice_clips_what_is_left(kind: type[torch.optim.Optimizer]) -> None:
    sharded, plain = pair()
    norms: list[float] = []

    def twice(clip: Callable[..., Tensor], target: Any) -> Callable[[], Tensor]:
        def clip_twice() -> Tensor:
            norms.extend([float(clip(target, 1.0)), float(clip(target, 0.25))])
            return torch.zeros(())

        return clip_twice

    ours = kind(sharded.parameters(), lr=0.1)  # type: ignore[call-arg]
    theirs = (torch.optim.AdamW if kind is mics.AdamW else kind)(plain.parameters(), lr=0.1)  # type: ignore[call-arg]
    train(sharded, ours, lambda *_: None, twice(mics.clip_grad_norm_, sharded))
    train(plain, theirs, lambda *_: None, twice(nn.utils.clip_grad_norm_, list(plain.parameters())))
    assert norms[: len(norms) // 2] == pytest.approx(norms[len(norms) // 2 :], rel=1e-4)
    for found, expected in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.view_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_what_is_put_in_a_parameters_place_inside_full_params_stays() -> None:
    model, _ = pair()
    with mics.full_params(model):
        model[0].weight = nn.Parameter(torch.full((9, 6), 2.0))  # type: ignore[operator]
        model[2].bias.data = torch.full((4,), 3.0)  # type: ignore[operator, union-attr]
    with mics.full_params(model):
        assert (model[0].weight == 2).all()  # type: ignore[operator]
        assert (model[2].bias == 3).all()  # type: ignore[operator]


def test_recurrent_layers_let_go_of_whole_weights_when_they_are_cut_and_when_full_params_ends() -> None:
    """They keep a list of their weights, beside their parameters."""
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity())
    whole = [weakref.ref(parameter) for parameter in model.parameters()]
    mics.shard(model, mics.Sharding.ddp())
    with mics.full_params(model):
        model[0](torch.ones(2, 4))
        whole += [weakref.ref(parameter) for parameter in model.parameters()]
    gc.collect()
    assert not [reference for reference in whole if reference() is not None]


def test_a_forecast_is_what_the_sharded_model_says() -> None:
    with torch.device("meta"):
        expected = mics.forecast(
            nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)),
            mics.Sharding.ddp(),
            ranks=1,
            ranks_per_node=1,
        )
    model, _ = pair()
    assert mics.ledger(model).formula == expected


def test_after_a_backward_that_raised_modules_have_their_parameters_again() -> None:
    model, _ = pair()
    x = torch.ones(2, 6, requires_grad=True)
    x.register_hook(lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    mics.AdamW(model.parameters()).zero_grad()
    model(torch.ones(2, 6)).sum().backward()
    assert model[0].weight is dict(model.named_parameters())["0.weight"]  # type: ignore[operator]


def test_a_step_that_clips_leaves_gradients_as_they_were() -> None:
    model, _ = pair()
    optimizer = mics.AdamW(model.parameters())
    model(torch.ones(2, 6)).square().sum().backward()
    mics.clip_grad_norm_(model, 1e-3)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(
        torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad is not None
    )


@pytest.mark.parametrize("precision", [mics.Precision.bf16(), mics.Precision.fp16()], ids=["bf16", "fp16"])
def test_a_default_device_of_the_users_changes_nothing(precision: mics.Precision) -> None:
    """`torch.set_default_device("cuda")` is common; the one here makes tensors without numbers."""
    batches = list(torch.linspace(-1, 1, 36).view(2, 3, 6))

    def trained(default: str) -> list[Tensor]:
        _, model = pair()
        with torch.device(default):
            mics.shard(model, mics.Sharding.ddp(), precision=precision)
            groups = [{"params": [p], "lr": 10.0**-number} for number, p in enumerate(model.parameters(), 1)]
            optimizer = mics.AdamW(groups)
            for _ in range(2):
                for batch in mics.accumulate(model, batches):
                    model(batch).square().mean().backward()
                mics.clip_grad_norm_(model, 1.0)
                optimizer.step()
                assert optimizer.state_dict()["state"][0]["step"].item() > 0
                optimizer.zero_grad()
            mics.check_replicas(model)
            with mics.full_params(model):
                return [parameter.detach().clone() for parameter in model.parameters()]

    for found, expected in zip(trained("meta"), trained("cpu"), strict=True):
        assert torch.equal(found, expected)
