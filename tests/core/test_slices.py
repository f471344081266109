"""What users may do with the slices that parameters of a sharded model are, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mics_core as mics


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4))


def sharded() -> nn.Module:
    return mics.shard(plain(), mics.Sharding.ddp())


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 6)).square().sum().backward()


def by_dimensions(model: nn.Module, dimensions: Callable[[Tensor], int]) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if dimensions(p) > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if dimensions(p) < 2], "weight_decay": 0.0},
    ]


def test_a_slice_knows_the_shape_of_its_parameter() -> None:
    model, whole = sharded(), plain()
    shapes = [p.shape for p in whole.parameters()]
    assert [mics.shape_of(p) for p in model.parameters()] == shapes
    assert [mics.shape_of(p) for p in whole.parameters()] == shapes
    with mics.full_params(model):
        assert [mics.shape_of(p) for p in model.parameters()] == shapes


@pytest.mark.parametrize("kind", [mics.AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_groups_sorted_by_the_dimensions_of_slices_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = sharded()
    backward(model)
    with pytest.raises(mics.ConfigError, match=r"matrices are in one that does not: .*len\(mics\.shape_of\(p\)\)"):
        kind(by_dimensions(model, Tensor.dim)).step()


@pytest.mark.parametrize("kind", [mics.AdamW, torch.optim.AdamW])
def test_an_empty_group_is_no_mistake_where_matrices_decay(kind: type[torch.optim.Optimizer]) -> None:
    model = sharded()
    backward(model)
    kind([{"params": list(model.parameters())}, {"params": [], "weight_decay": 0.0}]).step()
    kind([{"params": list(model.parameters()), "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}]).step()


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


@pytest.mark.parametrize("units", [None, [nn.Sequential]])
def test_hooks_on_modules_see_what_they_see_in_one_process(units: list[type[nn.Module]] | None) -> None:
    def watched(model: nn.Module) -> tuple[list[str], list[Tensor]]:
        names, seen = [], []

        def see(name: str, *values: Tensor) -> None:
            names.append(name)
            seen.extend(value.detach().clone() for value in values)

        for name, layer in model[0].named_children():  # type: ignore[operator, union-attr]
            layer.register_forward_hook(lambda m, x, y, at=name: see(f"forward of {at}", m.weight, x[0], y))
            layer.register_full_backward_pre_hook(lambda m, dy, at=name: see(f"before {at}", m.weight, dy[0]))
            layer.register_full_backward_hook(lambda m, dx, dy, at=name: see(f"after {at}", m.weight, dx[0], dy[0]))
        model(torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()).square().sum().backward()
        return names, seen

    names, expected = watched(nn.Sequential(plain()))
    ours, found = watched(mics.shard(nn.Sequential(plain()), mics.Sharding.ddp(), units=units))
    assert ours == names
    torch.testing.assert_close(found, expected)


def test_a_penalty_on_slices_is_refused() -> None:
    model = sharded()
    with pytest.raises(mics.LifecycleError, match="compute the penalty in the forward of the module that holds it"):
        (model(torch.ones(2, 6)).sum() + sum(p.square().sum() for p in model.parameters())).backward()


@pytest.mark.parametrize("name", ["Shampoo", "SingleDeviceMuon", "LAMB"])
def test_optimizers_that_look_at_whole_tensors_are_refused_by_name(name: str) -> None:
    model = sharded()
    backward(model)
    with pytest.raises(mics.ConfigError, match=f"step: {name} looks at whole tensors"):
        type(name, (torch.optim.SGD,), {})(model.parameters(), lr=0.1).step()


def test_a_state_dict_of_slices_warns_once_and_can_be_loaded_again() -> None:
    model = sharded()
    with pytest.warns(UserWarning, match="state_dict: it holds this rank's 1-D slices"):
        state = {name: tensor.clone() for name, tensor in model[2].state_dict().items()}  # type: ignore[operator]
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[operator, union-attr]
    model[2].load_state_dict(state)  # type: ignore[operator]
    assert all(torch.equal(model.state_dict()[f"2.{name}"], tensor) for name, tensor in state.items())


def test_a_state_dict_of_whole_parameters_does_not_warn(tmp_path: Path) -> None:
    model = sharded()
    with mics.full_params(model):
        torch.save(model.state_dict(), tmp_path / "whole.pt")
    mics.save(tmp_path / "checkpoint", model, None)
    mics.load(tmp_path / "checkpoint", model, None)
    plain().load_state_dict(torch.load(tmp_path / "whole.pt"))
