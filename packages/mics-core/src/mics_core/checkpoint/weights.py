"""`load_weights`: begin with weights from elsewhere, of which each rank reads what it holds."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mics_core import registry
from mics_core.checkpoint import model_state
from mics_core.checkpoint.agreed import on_all_ranks, together
from mics_core.checkpoint.safetensors import Files
from mics_core.checkpoint.saving import wait_for_saves
from mics_core.checkpoint.weight_files import open_weights
from mics_core.errors import ConfigError
from mics_core.lifecycle import Phase
from mics_core.registry import Runtime


def load_weights(source: str | Path | Mapping[str, Tensor], model: nn.Module) -> None:
    """Overwrite the model's weights and persistent buffers with those of `source`; call it on every rank.

    `source` is a .safetensors file; an index of several, such as model.safetensors.index.json; a folder that has
    model.safetensors or that index; a full state dict of torch.save, .pt or .bin; or a mapping from the names of the
    model's plain state dict to tensors, which may make each when it is asked for it.

    No rank reads the whole model. Files are mapped into memory, and read where this rank has a part. A mapping is asked
    for tensors that this rank has a part of, one at a time, twice: for their shapes, and to read them. If it has a
    method `meta(name)`, which gives a tensor on the meta device, that is asked for shapes.

    Weights are kept in the master dtype, frozen ones in the compute dtype, whatever they come in. Tied weights may be
    there under one of their names or under several, with the same values. Gradients are dropped; the optimizer's state
    and the loss scale stay as they are, so call it before training. (`load` continues from a checkpoint of `save`.)

    Names, shapes and dtypes are checked first; what does not fit raises on every rank and changes nothing. Weights have
    no checksums: a file that is as long as it says is taken for whole.
    """
    runtime = registry.runtime_of(model, "load_weights")
    world = runtime.world.with_own_group("checkpoint")

    def rest() -> None:
        runtime.lifecycle.require_rest("load_weights")
        wait_for_saves()  # one that is under way talks to the same ranks
        runtime.wait()

    together(world, "load_weights", rest)
    given = together(world, "load_weights", lambda: _Given.of(source), "opening the weights")
    digests = on_all_ranks(world, "load_weights", given.digest)
    odd = [rank for rank, digest in zip(world.ranks, digests, strict=True) if digest != digests[0]]
    if odd:
        raise ConfigError(
            f"load_weights: ranks {odd} are given other names than rank {world.ranks[0]}: give the same on every rank"
        )
    job = together(world, "load_weights", lambda: _Job(runtime, model, given), "looking at the weights")
    together(world, "load_weights", job.read, "reading its part")
    together(world, "load_weights", lambda: model_state.use_loaded(runtime, shown=False))


@runtime_checkable
class _Tells(Protocol):
    """A mapping that knows shapes without making tensors."""

    def meta(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Given:
    """The source, opened."""

    tensors: Mapping[str, Tensor]
    names: frozenset[str]
    called: str

    @classmethod
    def of(cls, source: str | Path | Mapping[str, Tensor]) -> _Given:
        if isinstance(source, Mapping):
            return cls(source, frozenset(source), "the mapping")
        tensors = open_weights(source)
        return cls(tensors, frozenset(tensors), str(source))

    def digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self.names)).encode()).hexdigest()

    def meta(self, name: str) -> Tensor:
        return self.tensors.meta(name) if isinstance(self.tensors, _Tells) else self.tensors[name]

    def where(self, name: str) -> str:
        """What holds a tensor, for a sentence."""
        return str(self.tensors.path(name)) if isinstance(self.tensors, Files) else self.called


@dataclass(frozen=True)
class _Target:
    """A parameter or buffer."""

    names: tuple[str, ...]  # several if it is tied
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[Tensor, tuple[slice | EllipsisType, ...]], ...]
    """Memory of this rank, each with which part of the whole it is for."""


class _Job:
    """Reading that can no longer fail for what is given."""

    def __init__(self, runtime: Runtime, model: nn.Module, given: _Given) -> None:
        self._runtime = runtime
        self._given = given
        targets = [*_weights(runtime, model), *_buffers(model)]
        _check_names(targets, given)
        # The others are checked by the ranks that hold them.
        self._targets = [target for target in targets if target.parts or not prod(target.shape)]
        for target in self._targets:
            names = self._names(target)
            for name in names:
                _check(target, name, given)
            for name in names[1:]:
                _check_equal(target, names[0], name, given)

    @torch.no_grad()
    def read(self) -> None:
        """Overwrite what this rank holds."""
        with self._runtime.lifecycle.within(Phase.LOADING):
            for target in self._targets:
                _fill(target, self._given.tensors[self._names(target)[0]])  # which is gone before the next is made

    def _names(self, target: _Target) -> list[str]:
        return [name for name in target.names if name in self._given.names]


_USUAL = frozenset({"model", "module", "state_dict", "model_state_dict"})
"""What programs call the weights among other things that they save."""


def _check_names(targets: list[_Target], given: _Given) -> None:
    for target in targets:
        if given.names.isdisjoint(target.names):
            for key in sorted(given.names & _USUAL):
                if isinstance(given.tensors[key], Mapping):
                    raise ConfigError(
                        f"load_weights: {given.called} has a dictionary under {key!r}, expected tensors by their "
                        f"names: give torch.load(FILE, mmap=True)[{key!r}]"
                    )
            raise ConfigError(
                f"load_weights: {' or '.join(target.names)} is missing in {given.called}, expected all weights and "
                "buffers of the model: give those of this model"
            )
    unknown = given.names.difference(*(target.names for target in targets))
    if unknown:
        name = min(unknown)
        raise ConfigError(
            f"load_weights: {name} is in {given.where(name)} and not in this model, expected its weights and buffers "
            "alone: give those of this model"
        )


def _check(target: _Target, name: str, given: _Given) -> None:
    value, where = given.meta(name), given.where(name)
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise ConfigError(f"load_weights: {name} is no dense tensor in {where}, expected one: give a plain state dict")
    if tuple(value.shape) != target.shape:
        raise ConfigError(
            f"load_weights: {name} has the shape {tuple(value.shape)} in {where}, expected {target.shape}: give the "
            "weights of this model"
        )
    floating = value.dtype.is_floating_point and target.dtype.is_floating_point
    if value.dtype != target.dtype and not floating:
        kind = "floating point" if target.dtype.is_floating_point else target.dtype
        raise ConfigError(f"load_weights: {name} is {value.dtype} in {where}, expected {kind}: convert it")


def _check_equal(target: _Target, one: str, other: str, given: _Given) -> None:
    first, second = given.tensors[one], given.tensors[other]
    for _, place in target.parts:
        if not torch.equal(first[place].to(target.dtype), second[place].to(target.dtype)):
            raise ConfigError(
                f"load_weights: {one} and {other} differ in {given.where(other)}, expected the same values, as this "
                "model ties them: give one of them alone, or a model that does not tie them"
            )


def _fill(target: _Target, value: Tensor) -> None:
    for memory, place in target.parts:
        memory.copy_(value[place])


def _weights(runtime: Runtime, model: nn.Module) -> list[_Target]:
    others: dict[str, list[str]] = defaultdict(list)
    for other, first in model_state.aliases(model).items():
        others[first.keys[-1]].append(other.removeprefix("model."))
    targets = []
    for name, cut in model_state.weights(runtime).items():
        parts = tuple(
            (cut.values(box), tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True)))
            for box in cut.held()
        )
        targets.append(_Target((name, *others[name]), cut.shape, cut.local.dtype, parts))
    return targets


def _buffers(model: nn.Module) -> list[_Target]:
    found = model_state.buffers(model, "load_weights")
    names: dict[int, list[str]] = defaultdict(list)
    for name, buffer in found.items():
        names[id(buffer)].append(name)
    return [
        _Target(tuple(tied), tuple(buffer.shape), buffer.dtype, ((buffer, (...,)),))
        for tied in names.values()
        for buffer in [found[tied[0]]]
    ]
