"""One forward and backward on the meta device, in which a unit that is like one before it is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mics_core import trees
from mics_core.planner.live import FusedAttention, Live
from mics_core.spec.units import UnitSpec

_PLAIN = (bool, int, float, str, tuple, FunctionType, BuiltinFunctionType)
"""Of attributes that tell one unit from another."""


@dataclass(eq=False)
class _Kind:
    """What is known of units that are alike: see `describe`."""

    flops: float
    kept: int  # bytes beyond inputs and outputs that live from forward to backward
    forward: int  # most further bytes while the forward runs
    outputs: Any
    inputs: int
    backward: int = 0  # most further bytes while the backward runs


class Pass:
    """A forward and backward of a model on the meta device, whose units' gradients go as soon as all are there."""

    def __init__(
        self, model: nn.Module, units: Sequence[UnitSpec], described: Sequence[object], *, recompute: bool
    ) -> None:
        self._model = model
        self._units = units
        self._described = described
        self._recompute = recompute
        self._kinds: dict[object, _Kind] = {}
        self._of_unit: dict[int, _Kind] = {}  # by the number of the unit, in the order of their first calls
        self._stood: list[tuple[int, int]] = []  # bytes held when a stand-in's backward began, and its unit
        self._most = 0  # of what stand-ins stand for, in forwards
        self._inside: list[float] = []  # flops of units inside the one that runs
        self._alone: dict[int, float] = {}
        self._open: tuple[_Kind, int, int] | None = None  # a backward under way: its kind, where it began, bytes then
        self._live = Live([*model.parameters(), *model.buffers()])
        self._after = 0

    @property
    def peak(self) -> int:
        """The most bytes that were held, parameters and inputs apart."""
        stood = [before + self._of_unit[number].backward for before, number in self._stood]
        return max(self._live.most(0), self._most, *stood, 0)

    def order(self) -> list[int]:
        """The numbers of the units, without the root, in the order of their first use."""
        used = list(self._of_unit)
        return [*used, *(number for number in range(1, len(self._units)) if number not in self._of_unit)]

    def work(self, number: int, gradients: int) -> tuple[float, int, int, int]:
        """Of a unit: FLOPs of its forward, bytes kept, bytes of its inputs, and further bytes at most."""
        if number == 0:
            units = sum(kind.kept + kind.inputs for kind in self._of_unit.values())
            flops = self._live.flops - sum(self._alone.values())
            return flops, max(self._after - units, 0), 0, max(self.peak - self._after - gradients, 0)
        kind = self._of_unit.get(number)
        if kind is None:
            return 0.0, 0, 0, 0
        further = max(kind.forward, kind.backward - gradients, 0)
        return self._alone[number], kind.kept + kind.inputs, kind.inputs, further

    def run(self, sample: Any) -> None:
        """Do it, once."""
        handles = [handle for unit in self._units for handle in _drop_gradients(unit)]
        own = {number: unit.module.forward for number, unit in enumerate(self._units) if number}
        for number, forward in own.items():
            self._units[number].module.forward = self._instead(number, forward)
        try:
            with self._live:
                with FusedAttention():
                    outputs = self._call(sample)
                self._after = self._live.bytes
                flops = self._live.flops
                differentiable = [tensor for tensor in trees.tensors(outputs) if tensor.requires_grad]
                if differentiable:
                    torch.autograd.backward(differentiable, [torch.empty_like(tensor) for tensor in differentiable])
                self._close()
                self._live.flops = flops
        finally:
            for number in own:
                del self._units[number].module.forward
            for handle in handles:
                handle.remove()
            self._model.zero_grad()

    def _call(self, sample: Any) -> Any:
        if isinstance(sample, Mapping):
            return self._model(**sample)
        return self._model(*sample) if isinstance(sample, tuple) else self._model(sample)

    def _instead(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def fused(*args: Any, **kwargs: Any) -> Any:
            with FusedAttention():  # here, because a mode around a backward does not reach what that computes again
                return forward(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() != -1:
                return self._compute(fused, args, kwargs)  # again, for a checkpoint of the model's own
            key = (self._described[number], _signature((args, kwargs)), torch.is_grad_enabled())
            inputs = [tensor for tensor in trees.tensors((args, kwargs)) if tensor.requires_grad]
            if key in self._kinds:
                return self._stand_in(number, self._kinds[key], inputs)
            return self._first(number, key, fused, (args, kwargs), inputs)

        return call

    def _first(
        self, number: int, key: object, forward: Callable[..., Any], given: tuple[Any, Any], inputs: list[Tensor]
    ) -> Any:
        live, begin = self._live, len(self._live.history)
        before, flops = live.bytes, live.flops
        self._inside.append(0.0)
        args, kwargs = given
        out = self._compute(forward, args, kwargs)
        returned = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in trees.tensors(out)}
        kind = _Kind(
            live.flops - flops,
            max(live.bytes - before - sum(returned.values()), 0),
            max(live.most(begin) - before, 0),
            trees.convert(out, lambda tensor: tensor.detach().new_empty(()).expand(tensor.shape)),  # shapes alone
            sum(tensor.nbytes for tensor in inputs),
        )
        self._kinds[key] = kind
        self._note(number, kind, self._inside.pop())
        for tensor in trees.tensors(out):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._begin(kind))  # type: ignore[no-untyped-call]
        for tensor in inputs:
            tensor.register_hook(lambda _: self._close(kind))  # type: ignore[no-untyped-call]
        return out

    def _compute(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    def _stand_in(self, number: int, kind: _Kind, inputs: list[Tensor]) -> Any:
        self._live.flops += kind.flops
        self._most = max(self._most, self._live.bytes + kind.forward)
        self._note(number, kind, 0.0)
        shapes = list(trees.tensors(kind.outputs))
        anchor = torch.empty(0, device="meta", requires_grad=True)
        out = iter(_StandIn.apply(anchor, lambda: self._stood_in(number), kind.kept, shapes, *inputs))  # type: ignore[no-untyped-call]
        return trees.convert(kind.outputs, lambda _: next(out))

    def _stood_in(self, number: int) -> None:
        self._close()
        self._stood.append((self._live.bytes, number))

    def _note(self, number: int, kind: _Kind, inside: float) -> None:
        self._of_unit.setdefault(number, kind)
        self._alone[number] = self._alone.get(number, 0.0) + kind.flops - inside
        if self._inside:
            self._inside[-1] += kind.flops

    def _begin(self, kind: _Kind) -> None:
        if self._open is None or self._open[0] is not kind:
            self._close()
            self._open = (kind, len(self._live.history), self._live.bytes)

    def _close(self, only: _Kind | None = None) -> None:
        if self._open is not None and only in (None, self._open[0]):
            kind, begin, before = self._open
            kind.backward = max(kind.backward, self._live.most(begin) - before)
            self._open = None


class _StandIn(torch.autograd.Function):
    """Outputs like those of a unit before, from nothing; keeps as much memory as that unit did."""

    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, begin: Callable[[], None], kept: int, shapes: Sequence[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.begin = begin
        ctx.save_for_backward(torch.empty(kept, dtype=torch.uint8, device="meta"), *inputs)
        ctx.likes = [(tensor.shape, tensor.dtype) for tensor in inputs]
        return tuple([torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in shapes])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        ctx.begin()
        grads = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.likes]
        return (None, None, None, None, *grads)


def _drop_gradients(unit: UnitSpec) -> list[Any]:
    """Let a unit's gradients go when the last of them is there, as they do once they are packed."""
    parameters = [member.parameter for member in unit.trained]
    missing = len(parameters)

    def hook(_: Tensor) -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            for parameter in parameters:
                parameter.grad = None

    return [p.register_post_accumulate_grad_hook(hook) for p in parameters]  # type: ignore[no-untyped-call]


def describe(unit: UnitSpec) -> object:
    """What units must share to be alike: parameters, and the classes and plain settings of all modules inside."""
    members = [(tuple(m.parameter.shape), m.parameter.requires_grad) for m in (*unit.trained, *unit.frozen)]
    own = unit.name.rpartition(".")[2]
    modules = [(path, type(module), _settings(module, own)) for path, module in unit.module.named_modules()]
    return tuple(members), tuple(modules)


def _settings(module: nn.Module, own: str) -> tuple[object, ...]:
    """Numbers, texts and functions among its attributes. A layer that knows its own place in the list is no other."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return tuple((name, "its place" if repr(value) == own else repr(value)) for name, value in sorted(found.items()))


def _signature(value: Any) -> object:
    """The shapes and dtypes of tensors, in a value, and all else by how it is written."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, list | tuple):
        return tuple(_signature(part) for part in value)
    if isinstance(value, Mapping):
        return tuple((key, _signature(part)) for key, part in value.items())
    return repr(value)
