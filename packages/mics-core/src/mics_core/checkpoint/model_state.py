"""A model's weights and buffers as a checkpoint holds them, under the names of its plain state dict."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from mics_core.checkpoint.contents import Cut, Name
from mics_core.errors import ConfigError
from mics_core.fingerprint import fingerprint
from mics_core.registry import Runtime
from mics_core.unit.shards import Shards


def weights(runtime: Runtime) -> dict[str, Cut]:
    """Every parameter, by its name: the masters of trained ones, and frozen ones, which have no other."""
    cuts: dict[str, Cut] = {}
    for unit in runtime.units:
        for shards in unit.parts:
            shards.check_in_place()
            cuts |= _cuts(runtime, shards, shards.master, "model")
    return cuts


def shown(runtime: Runtime) -> dict[str, Cut]:
    """The weights that forwards compute with, where these follow their masters in eight bits and so are state, too."""
    trained = [unit.trained for unit in runtime.units if unit.trained.sends_differences]
    return {name: cut for part in trained for name, cut in _cuts(runtime, part, part.refreshed, "shown").items()}


def _cuts(runtime: Runtime, shards: Shards, held: torch.Tensor, state: str) -> dict[str, Cut]:
    degree = runtime.sharding.optimizer if shards.is_trained else runtime.sharding.params
    at = runtime.ladder.range(shards.layout.size, degree)[0]
    return {
        slot.name: Cut(
            Name((state, slot.name)),
            slot.shape,
            slot.begin,
            shards.layout.size,
            held[begin:end],
            first=max(0, at - slot.begin),
        )
        for slot, (begin, end) in zip(shards.layout.slots, shards.spans, strict=True)
    }


@torch.no_grad()
def use_loaded(runtime: Runtime, *, shown: bool) -> None:
    """All masters were overwritten: bring the weights to where gathers start, and drop the gradients.

    With `shown` those that forwards compute with were loaded, too.
    """
    runtime.reducer.reset()
    for unit in runtime.units:
        for part in unit.parts:
            if shown and part.sends_differences:
                part.accept_writes()
            else:
                part.round_master()
        runtime.gatherer.refresh(unit, exact=True)


def aliases(model: nn.Module) -> dict[str, Name]:
    """The other names of tied weights, each with the first one."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {f"model.{other}": Name(("model", first)) for first, *others in names.values() for other in others}


def buffers(model: nn.Module, caller: str) -> dict[str, torch.Tensor]:
    """The buffers that belong to the model's state dict, each under all of its names."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ConfigError(
                f"{caller}: {path or 'the model'} ({type(module).__name__}) has a get_extra_state(), which checkpoints "
                "do not hold: pass what it gives to mics.save by a name of its own"
            )
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full = f"{path}.{name}" if path else name
                if any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)):
                    raise ConfigError(
                        f"{caller}: the buffer {full} is expanded, its elements share memory, expected one that can be "
                        "overwritten: register expanded.contiguous()"
                    )
                found[full] = buffer
    return found


def hash_of(found: Mapping[str, torch.Tensor]) -> bytes:
    """By which ranks find out whether their buffers are alike."""
    numbers = [fingerprint(buffer).tolist() for buffer in found.values()]
    return hashlib.sha256(repr(numbers).encode()).digest()
