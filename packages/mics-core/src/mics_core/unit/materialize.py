"""How weights come into a sharded model: the model's own, or drawn unit by unit for a model on the meta device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from mics_core.comm.world import World
from mics_core.errors import ConfigError
from mics_core.fingerprint import fingerprint
from mics_core.spec.units import Member, UnitSpec


def check_meta(model: nn.Module) -> None:
    """Raise if a module on the meta device cannot draw its weights."""
    for name, module in model.named_modules():
        if _on_meta(module) and not callable(getattr(module, "reset_parameters", None)):
            raise ConfigError(
                f"shard: {name or 'the model'} ({type(module).__name__}) is on the meta device and has no "
                "reset_parameters() to fill its parameters and buffers: write one, or build the model in memory"
            )


def draw(unit: UnitSpec, model: nn.Module, device: torch.device, seed: int) -> None:
    """Bring the unit's modules from the meta device to memory, one by one, each with a generator of its own.

    So the weights depend on the seed and on the module's place in the model, and on nothing else.
    """
    needed = {id(site.module) for member in (*unit.trained, *unit.frozen) for site in member.sites}
    for number, module in enumerate(model.modules()):
        if id(module) in needed and _on_meta(module):
            _draw_module(module, device, seed + number)


def bring_buffers(model: nn.Module, device: torch.device, seed: int) -> None:
    """Put all buffers on the device, drawn if they are on the meta device; they stay whole on every rank."""
    for number, module in enumerate(model.modules()):
        if _on_meta(module):
            _draw_module(module, device, seed + number)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def whole_values(members: Sequence[Member], device: torch.device) -> list[torch.Tensor]:
    """The members' values, whole, on the device."""
    return [_present(member).detach().to(device) for member in members]


@torch.no_grad()
def make_equal(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's parameters and buffers where any rank's differ, as DDP does.

    What is on the meta device will be drawn alike.
    """
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    if world.size == 1 or not tensors:
        return
    mine = [fingerprint(tensor).tolist() for tensor in tensors]
    if len(set(world.all_gather_object(hashlib.sha256(repr(mine).encode()).digest(), "shard"))) == 1:
        return  # so many ranks do not tell each other all of it
    sums = world.all_gather_object(mine, "shard")
    for index, tensor in enumerate(tensors):
        if any(other[index] != sums[0][index] for other in sums):
            contiguous = tensor.contiguous()
            world.broadcast(contiguous)
            tensor.copy_(contiguous)


def _on_meta(module: nn.Module) -> bool:
    return any(
        tensor is not None and tensor.is_meta for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def _draw_module(module: nn.Module, device: torch.device, seed: int) -> None:
    """Give one module memory and let it fill it, without touching the caller's generators."""
    if device.type == "meta":
        return  # it is a stand-in, of which only sizes are wanted
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        module.to_empty(device=device, recurse=False)
        tensors = {**module._parameters, **module._buffers}
        floats = {name: t for name, t in tensors.items() if t is not None and t.is_floating_point()}
        for tensor in floats.values():
            tensor.detach().fill_(torch.nan)  # to see what is not filled
        module.reset_parameters()  # type: ignore[operator]
        for name in floats:
            if getattr(module, name).isnan().any():
                raise ConfigError(
                    f"shard: reset_parameters() of {type(module).__name__} leaves its {name} unfilled, and the model "
                    "is on the meta device: fill all parameters and buffers there"
                )


def _present(member: Member) -> torch.Tensor:
    """The parameter as it is now: on the meta device, its module has made a new one."""
    site = member.sites[0]
    parameter = site.module._parameters[site.name]
    assert parameter is not None
    return parameter
