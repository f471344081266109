"""A training step under each runtime, by the name that tables show, and the bytes that each one holds for it.

    plain PyTorch          a world of one rank
    DDP                    PyTorch's, gradients in views of its buckets, summed in the last micro-step
    FSDP2 full             cut over all ranks
    FSDP2 reshard N        the same, between forward and backward only over N ranks
    HSDP N                 FSDP2 in groups of N ranks, the sum over the groups in the last micro-step
    ZeRO-3                 DeepSpeed's, made to release a unit after its use, as it must with a model worth cutting
    mics P,G,O [OPTION]    ours; an option switches one mechanism off by what the public calls offer:
        flat               ranks_per_node=1: the ladder knows no nodes, and every gather is one all-to-all exchange
        no-prefetch        prefetch_bytes=0: a gather begins when its unit is needed
        no-overlap         no mics.accumulate: hop 2 begins at the clip, and no unit is kept between micro-steps
        int8               Precision(between_nodes=torch.int8)
        fp32-sums          in mixed precision gradients travel in float32
        fp32               all is float32, also in mixed precision

All clip the norm and step with AdamW. FSDP2 gathers the next unit in advance, in both directions: its best setting.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mics_core as mics
from bench.scenes.model import ROWS

Make = Callable[[], nn.Module]
LEARNING_RATE, LARGEST_NORM = 1e-3, 1.0
DEEPSPEED_ON_CPUS = {"DS_ACCELERATOR": "cpu"}
"""What DeepSpeed must find in its environment, where there may be no GPU."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "flat": {"ranks_per_node": 1},
    "no-prefetch": {"prefetch_bytes": 0},
    "no-overlap": {},
    "int8": {},
    "fp32-sums": {},
    "fp32": {},
}


@dataclass(frozen=True)
class Terms:
    """What the runtimes of a comparison share."""

    device: torch.device
    precision: str = "fp32"  # or bf16, of the computation; weights and the optimizer's state are float32 in any case

    def autocast(self) -> AbstractContextManager[Any]:
        """How runtimes that leave precision to torch compute in it."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, torch.bfloat16)

    def fsdp(self) -> MixedPrecisionPolicy:
        """How FSDP2 does; gradients travel in it, too."""
        return MixedPrecisionPolicy(param_dtype=None if self.precision == "fp32" else torch.bfloat16)

    def mics(self, options: Sequence[str] = ()) -> mics.Precision:
        """How ours does, likewise."""
        mixed = self.precision != "fp32" and "fp32" not in options
        chosen = mics.Precision.bf16() if mixed else mics.Precision.fp32()
        chosen = replace(chosen, reduce=torch.float32) if "fp32-sums" in options else chosen
        return replace(chosen, between_nodes=torch.int8) if "int8" in options else chosen


class Runtime(Protocol):
    """One way to train."""

    def accumulate(self, batches: Sequence[Tensor]) -> Tensor:
        """Forward and backward of all micro-batches; the loss, for which nobody waits."""

    def update(self) -> None:
        """Clip and step."""

    def finish(self) -> None:
        """Wait for what is still under way."""

    def held(self) -> int:
        """Between `accumulate` and `update`: bytes of parameters, gradients and optimizer state on this rank."""


ON_CPUS = Terms(torch.device("cpu"))


def left_out(name: str) -> str | None:
    """Why a runtime cannot run here; None if it can."""
    return _no_deepspeed() if name == "ZeRO-3" else None


@cache
def _no_deepspeed() -> str | None:
    """Tried in a process of its own: what it lacks shows when it is imported, and its import changes torch."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    tried = subprocess.run(
        [sys.executable, "-c", "import deepspeed"],
        env=os.environ | DEEPSPEED_ON_CPUS,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"deepspeed cannot be imported: {tried.stderr.splitlines()[-1]}" if tried.returncode else None


def runtime(name: str, make: Make, terms: Terms = ON_CPUS) -> Runtime:
    """The runtime of this name; `make` is called where the model should be."""
    kind, *rest = name.split()
    with terms.device:
        match kind, *rest:
            case ["plain", "PyTorch"]:
                return _Torch(make(), terms, autocast=True)
            case ["DDP"]:
                return _ddp(make(), terms)
            case ["FSDP2", "full"]:
                return _fsdp2(make(), terms, dist.get_world_size(), reshard=True)
            case ["FSDP2", "reshard", ranks]:
                return _fsdp2(make(), terms, dist.get_world_size(), reshard=int(ranks))
            case ["HSDP", ranks]:
                return _fsdp2(make(), terms, int(ranks), reshard=True)
            case ["ZeRO-3"]:
                return _ZeRO3(make())
            case ["mics", degrees, *options] if set(options) <= set(OPTIONS):
                return Ours(make(), terms, mics.Sharding(*map(int, degrees.split(","))), options)
    raise ValueError(f"runtime: got {name!r}, expected a name such as 'HSDP 4' or 'mics 2,2,4 flat'")


def storage(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the memory that these tensors lie in, on this rank; what several share counts once."""
    found = {}
    for tensor in tensors:
        if tensor is not None:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    states = optimizer.state_dict()["state"].values()
    kept = [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]
    parameters = list(model.parameters())
    return storage([*parameters, *(parameter.grad for parameter in parameters), *kept])


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


class Ours:
    """mics."""

    def __init__(self, model: nn.Module, terms: Terms, sharding: mics.Sharding, options: Sequence[str]) -> None:
        self.marked = "no-overlap" not in options
        told = {key: value for option in options for key, value in OPTIONS[option].items()}
        self.model = mics.shard(model, sharding, precision=terms.mics(options), **told)
        self._optimizer = mics.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def accumulate(self, batches: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=batches[0].device)
        for batch in mics.accumulate(self.model, batches) if self.marked else batches:
            loss = self.model(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    def update(self) -> None:
        mics.clip_grad_norm_(self.model, LARGEST_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def finish(self) -> None:
        mics.ledger(self.model)  # waits for the refresh, which would hide behind the next forward

    def held(self) -> int:
        return _state(self.model, self._optimizer)


class _Torch:
    """What plain PyTorch, DDP and FSDP2 have in common; `last` tells them whether the last micro-step comes."""

    def __init__(
        self, model: nn.Module, terms: Terms, *, autocast: bool, last: Callable[[bool], None] = lambda _: None
    ) -> None:
        self._model = model
        self._compute = terms.autocast() if autocast else nullcontext()
        self._last = last
        self._optimizer = _adamw(model.parameters())

    def accumulate(self, batches: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=batches[0].device)
        for number, batch in enumerate(batches, 1):
            self._last(number == len(batches))
            with self._compute:
                loss = self._model(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self._model.parameters(), LARGEST_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def finish(self) -> None:
        """A step leaves nothing under way."""

    def held(self) -> int:
        return _state(self._model, self._optimizer)


def _ddp(whole: nn.Module, terms: Terms) -> _Torch:
    model = DistributedDataParallel(whole, gradient_as_bucket_view=True)

    def last(is_last: bool) -> None:
        model.require_backward_grad_sync = is_last

    return _Torch(model, terms, autocast=True, last=last)


def _fsdp2(model: nn.Module, terms: Terms, shard: int, *, reshard: bool | int) -> _Torch:
    world = dist.get_world_size()
    if shard == world:
        mesh = init_device_mesh(terms.device.type, (world,))
    else:
        mesh = init_device_mesh(terms.device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))
    blocks: Any = model.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=terms.fsdp())
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, mp_policy=terms.fsdp())
    assert isinstance(model, FSDPModule)
    for one, other in pairwise(blocks):
        one.set_modules_to_forward_prefetch([other])
        other.set_modules_to_backward_prefetch([one])
    if terms.device.type == "cpu":  # where a prefetch overlaps with nothing otherwise
        for module in (model, *blocks):
            module._set_unshard_async_op(True)
    return _Torch(model, terms, autocast=False, last=model.set_requires_all_reduce)


class _ZeRO3:
    """DeepSpeed's stage 3, where it is installed."""

    def __init__(self, model: nn.Module) -> None:
        import deepspeed  # type: ignore[import-not-found]

        blocks: Any = model.blocks
        unit = sum(parameter.numel() for parameter in blocks[0].parameters())
        optimizer = _adamw(model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": LARGEST_NORM,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Its defaults keep up to a billion parameters whole, so all of so small a model.
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 2 * unit,
                "stage3_max_reuse_distance": unit,
                "stage3_prefetch_bucket_size": unit,
                "reduce_bucket_size": unit,
            },
        }
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._optimizer = optimizer

    def accumulate(self, batches: Sequence[Tensor]) -> Tensor:
        self._engine.set_train_batch_size(ROWS * len(batches) * dist.get_world_size())
        total = torch.zeros(())
        for number, batch in enumerate(batches, 1):
            # It would count micro-steps from the first one ever, however many a step has now.
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            loss = self._engine(batch)
            self._engine.backward(loss)
            total += loss.detach() / len(batches)
            if number < len(batches):
                self._engine.step()  # which only counts here
        return total

    def update(self) -> None:
        self._engine.step()

    def finish(self) -> None:
        """A step leaves nothing under way."""

    def held(self) -> int:
        zero = self._engine.optimizer
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [value for value in states if isinstance(value, Tensor) and value.dim()]
        pieces = [parameter.ds_tensor for parameter in self._engine.module.parameters()]
        return storage([*pieces, *zero.fp32_partitioned_groups_flat, zero.grad_partitions_flat_buffer, *tensors])
