"""Which parameters travel together: a model cut into units, each a module that is called as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mics_core.errors import ConfigError
from mics_core.spec.layout import Layout
from mics_core.spec.sharding import Precision

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that are never called."""

UnitRule = Sequence[type[nn.Module]] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Site:
    """A place in the model where a parameter is found: `module.name`, and its full name from the root."""

    module: nn.Module
    name: str
    path: str


@dataclass(frozen=True)
class Member:
    """A parameter of a unit. Tied weights are one member with several sites."""

    parameter: nn.Parameter
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """The first of its full names, which is what `named_parameters()` calls it."""
        return self.sites[0].path


@dataclass(frozen=True)
class UnitSpec:
    """A module whose parameters are gathered together; those that are trained and those that are frozen lie apart."""

    name: str
    module: nn.Module
    trained: tuple[Member, ...]
    frozen: tuple[Member, ...]

    def arranged(self, precision: Precision) -> UnitSpec:
        """The same, with what never travels in eight bits last."""
        if not precision.has_eight_bits:
            return self
        return replace(self, trained=tuple(sorted(self.trained, key=lambda member: _is_exact(member, precision))))

    def exact(self, precision: Precision) -> int:
        """Elements of trained parameters that would never travel in eight bits."""
        return sum(member.parameter.numel() for member in self.trained if _is_exact(member, precision))

    def __str__(self) -> str:
        return self.name or "the root"


def lay_out(members: Sequence[Member], pieces: int, precision: Precision | None = None) -> Layout:
    """Of members that are arranged; `precision` where they are trained."""
    shapes = [(member.name, tuple(member.parameter.shape)) for member in members]
    exact = None
    if precision is not None and precision.has_eight_bits:
        exact = sum(not _is_exact(member, precision) for member in members)
    return Layout.plan(shapes, pieces, exact)


def _is_exact(member: Member, precision: Precision) -> bool:
    return any(precision.is_exact(site.path, member.parameter.dim()) for site in member.sites)


def find(model: nn.Module, rule: UnitRule | None) -> list[UnitSpec]:
    """Cut the model into units: the modules that the rule names, and the root for what is left.

    Without a rule they are the children of every ModuleList. A parameter belongs to the innermost unit that holds all
    its sites. The root comes first, the others in the order of the model.
    """
    modules = _chosen(model, rule)
    names = {id(module): name for name, module in modules.items()}
    sites: dict[int, dict[tuple[int, str], Site]] = defaultdict(dict)  # by parameter, then by place
    chains: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    parameters: dict[int, nn.Parameter] = {}
    for path, chain, module in _walk(model, names):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                key = id(parameter)
                parameters[key] = parameter
                site = Site(module, name, f"{path}.{name}" if path else name)
                sites[key].setdefault((id(module), name), site)  # a shared module is one place, by its first path
                chains[key].append(chain)
    members: dict[tuple[str, bool], list[Member]] = defaultdict(list)
    for key, parameter in parameters.items():
        owner = _common(chains[key])
        _check_called(owner, modules[owner])
        members[owner, parameter.requires_grad].append(Member(parameter, tuple(sites[key].values())))
    return [
        UnitSpec(name, module, tuple(members[name, True]), tuple(members[name, False]))
        for name, module in modules.items()
        if members[name, True] or members[name, False] or not name  # the root is a unit, even with none of its own
    ]


def _chosen(model: nn.Module, rule: UnitRule | None) -> dict[str, nn.Module]:
    inner = [(name, module) for name, module in model.named_modules() if name]
    if rule is None:
        lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        inner = [
            (name, module)
            for name, module in inner
            if name.rpartition(".")[0] in lists and not isinstance(module, _CONTAINERS)
        ]
    elif not _is_rule(rule):
        raise ConfigError(
            f"shard: units is {rule!r}, expected a list of module classes, or a predicate of name and module: leave it "
            "out for the children of every ModuleList"
        )
    elif callable(rule):
        inner = [(name, module) for name, module in inner if rule(name, module)]
        if not inner:
            raise ConfigError(
                f"shard: units is a predicate that takes no module of {type(model).__name__}, expected some, or the "
                "whole model is gathered at once: mend it, or leave units out"
            )
    else:
        inner = [(name, module) for name, module in inner if isinstance(module, tuple(rule))]
        for kind in rule:
            if not any(isinstance(module, kind) for _, module in inner):
                raise ConfigError(
                    f"shard: units names {kind.__name__}, but {type(model).__name__} holds no such module: name a "
                    "class of modules inside the model, or leave units out"
                )
    return {"": model, **dict(inner)}


def _check_called(name: str, module: nn.Module) -> None:
    """Raise if a unit with parameters has no forward, such as a list; the root may be used by its parts."""
    if name and getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise ConfigError(
            f"shard: units takes {name}, a {type(module).__name__}, which has no forward, so nothing would gather its "
            "parameters: take the modules inside it, or the one around it"
        )


def _is_rule(rule: object) -> bool:
    """Whether it is a predicate, or classes, at least one."""
    if isinstance(rule, Sequence):
        return bool(rule) and all(isinstance(kind, type) for kind in rule)
    return callable(rule) and not isinstance(rule, type)


def _walk(
    module: nn.Module, units: dict[int, str], path: str = "", chain: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    """Every path to every module, with the units around it from the outside in."""
    if id(module) in units:
        chain = (*chain, units[id(module)])
    yield path, chain, module
    for name, child in module.named_children():
        yield from _walk(child, units, f"{path}.{name}" if path else name, chain)


def _common(chains: Sequence[tuple[str, ...]]) -> str:
    """The innermost unit that all chains go through."""
    first = chains[0]
    return max(
        (
            first[: depth + 1]
            for depth in range(len(first))
            if all(c[: depth + 1] == first[: depth + 1] for c in chains)
        ),
        key=len,
    )[-1]
