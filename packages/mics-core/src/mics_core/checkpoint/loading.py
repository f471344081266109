"""`load`: everything is checked before any memory is touched, then each rank reads what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mics_core import registry
from mics_core.checkpoint import model_state, optimizer_state
from mics_core.checkpoint.agreed import on_all_ranks, together
from mics_core.checkpoint.contents import Cut, Name, own_name
from mics_core.checkpoint.folder import path_of
from mics_core.checkpoint.optimizer_state import Wanted
from mics_core.checkpoint.random_numbers import of_numpy, restore
from mics_core.checkpoint.reading import Stored
from mics_core.checkpoint.runs import go_on_with
from mics_core.checkpoint.saving import EXTRA, wait_for_saves
from mics_core.errors import ConfigError
from mics_core.lifecycle import Phase
from mics_core.registry import Runtime


def load(path: str | Path, model: nn.Module, optimizer: Optimizer | None, *, verify: bool = True) -> dict[str, Any]:
    """Continue from a checkpoint of `save`, whatever sharding, number of ranks and precision wrote it; call it on every
    rank. Returns what was passed to `save` as extra.

    `path` is a checkpoint's directory, or a folder whose `latest` names one. Weights, buffers, the optimizer's state
    and settings (the learning rate, too) and the loss scale become those of the checkpoint; gradients are dropped. With
    as many ranks as wrote it, random numbers (torch's, Python's and numpy's) continue on each rank, and so do buffers
    that differ between ranks, and with the same sharding the next losses are those of a run that never stopped, bit for
    bit. With another number of ranks random numbers are left alone, and buffers become those of rank 0.
    Without an optimizer (None) only the model is loaded.

    Where there is no checkpoint yet, and no complete one beside the path, it raises mics.NoCheckpoint on every rank:
    begin anew. One that is damaged or of another format, or that some ranks do not see, raises another error, which
    names a complete one if there is one to load instead.

    Names, shapes and files are checked first; what does not fit raises on every rank and changes nothing. verify=False
    leaves out the checksums, so that every byte is read once; damage that reading finds then has overwritten a part of
    the model. What is read goes to where it is used: no rank needs memory for more than its own state and a few boxes.
    Beside a save that replaces or removes the checkpoint one of the two is loaded, whole, or all ranks raise before
    memory is touched.

    Nothing that a checkpoint holds is run. One that mics wrote when `extra` might hold any class loads if it holds only
    plain data and tensors. Else the error names a class, and a load inside `with torch.serialization.safe_globals(...)`
    takes the classes that this is given: save it again then.
    """
    runtime = registry.runtime_of(model, "load")
    world = runtime.world.with_own_group("checkpoint")

    def rest() -> None:
        runtime.lifecycle.require_rest("load")
        wait_for_saves()
        runtime.wait()

    together(world, "load", rest)
    stored = together(world, "load", lambda: Stored(path_of(path, "load")), "opening the checkpoint")
    told = on_all_ranks(
        world, "load", lambda: (hashlib.sha256(stored.manifest.render()).digest(), optimizer is not None, bool(verify))
    )
    versions, passed, verifies = zip(*told, strict=True)
    odd = [rank for rank, version in zip(world.ranks, versions, strict=True) if version != versions[0]]
    if odd:
        raise ConfigError(
            f"load: ranks {odd} find another checkpoint than rank {world.ranks[0]}: give one path, on a shared disk, "
            "or load again if a save replaced it meanwhile"
        )
    optimizer_state.check_passed("load", passed, world.ranks)
    if len(set(verifies)) > 1:
        verifying = [rank for rank, one in zip(world.ranks, verifies, strict=True) if one]
        raise ConfigError(
            f"load: ranks {verifying} passed verify=True and the others False, expected the same: ask alike everywhere"
        )
    if verify:
        together(world, "load", lambda: stored.verify(world.rank, world.size), "verifying its share of the files")
    job = together(world, "load", lambda: _Job(runtime, model, optimizer, stored), "opening its files")
    together(world, "load", job.read, "reading its part")
    together(world, "load", job.finish)
    return job.extra


class _Job:
    """A load that can no longer fail for what the checkpoint holds."""

    def __init__(self, runtime: Runtime, model: nn.Module, optimizer: Optimizer | None, stored: Stored) -> None:
        self._runtime = runtime
        self._optimizer = optimizer
        self._stored = stored
        self._weights = model_state.weights(runtime)
        self._buffers = model_state.buffers(model, "load")
        _check_model(self._weights, self._buffers, model_state.aliases(model), stored)
        about = stored.manifest.about
        self.extra: dict[str, Any] = stored.read_object(EXTRA)
        self._scale: dict[str, float] | None = about["loss_scale"]
        self._own: dict[str, Any] = {"random": {}, "buffers": {}}
        if about["ranks"] == runtime.world.size:
            self._own = stored.read_object(own_name(runtime.world.rank), of_numpy())
        self._settings: list[dict[str, Any]] = []
        self._wanted = Wanted({}, (), {})
        if optimizer is not None:
            groups = stored.read_object(optimizer_state.GROUPS)
            optimizer_state.check(runtime, optimizer, about["optimizer"], groups)
            dtypes = {name: entry.properties.dtype for name, entry in stored.tensors.items()}
            self._settings = optimizer_state.settings(runtime, optimizer, groups)
            self._wanted = optimizer_state.wanted(
                runtime, optimizer, self._weights, dtypes, set(about["single_numbers"])
            )
        shown = list(model_state.shown(runtime).values())
        # Else masters are rounded: it was written without `between_nodes`, or in another dtype.
        self._shown = bool(shown) and all(_has(stored, cut) for cut in shown)
        buffers = {f"model.{name}": buffer for name, buffer in self._buffers.items()}
        cuts = [*self._weights.values(), *self._wanted.cuts, *(shown if self._shown else ())]
        self._fill = stored.planned(cuts, buffers | self._wanted.wholes)

    def read(self) -> None:
        """Overwrite the masters, the buffers and the optimizer's state."""
        with self._runtime.lifecycle.within(Phase.LOADING):
            self._fill()
            for name, value in self._own["buffers"].items():
                self._buffers[name].copy_(value)

    def finish(self) -> None:
        """Bring the weights to where they are used, and let everything go on from there."""
        model_state.use_loaded(self._runtime, shown=self._shown)
        if self._optimizer is not None:
            numbers = set(self._stored.manifest.about["python_numbers"])
            self._optimizer.load_state_dict(self._wanted.state_dict(self._settings, numbers))
        if self._runtime.scaling is not None and self._scale is not None:
            self._runtime.scaling.restore(self._scale)
        restore(self._own["random"], self._runtime.world.device)
        go_on_with(self._runtime, self._stored.manifest.runs)


def _has(stored: Stored, cut: Cut) -> bool:
    entry = stored.tensors.get(str(cut.name))
    return entry is not None and (tuple(entry.size), entry.properties.dtype) == (cut.shape, cut.local.dtype)


def _check_model(
    weights: Mapping[str, Cut], buffers: Mapping[str, torch.Tensor], aliases: Mapping[str, Name], stored: Stored
) -> None:
    """Raise unless the checkpoint's model has the same names and shapes."""
    mine = {f"model.{name}": cut.shape for name, cut in weights.items()}
    mine |= {f"model.{name}": tuple(buffer.shape) for name, buffer in buffers.items()}
    theirs = {name: tuple(entry.size) for name, entry in stored.tensors.items() if name.startswith("model.")}
    for full, shape in mine.items():
        name = full.removeprefix("model.")
        if full not in theirs:
            raise ConfigError(f"load: {name} is missing in {stored.path}: it is a checkpoint of another model")
        if theirs[full] != shape:
            raise ConfigError(
                f"load: {name} has the shape {theirs[full]} in {stored.path}, expected {shape}: it is a checkpoint of "
                "another model"
            )
    for copy, original in aliases.items():
        if not stored.tied(copy, str(original)):
            raise ConfigError(
                f"load: {copy.removeprefix('model.')} and {str(original).removeprefix('model.')} are one parameter "
                f"here and two in {stored.path}: load into a model that does not tie them"
            )
    for full in theirs:
        if full not in mine and full not in aliases:
            raise ConfigError(
                f"load: {full.removeprefix('model.')} is in {stored.path} and not in this model: it is a checkpoint of "
                "another model"
            )
