"""Tensors inside what users pass around: tuples, lists, dicts and dataclasses of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in a value."""
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from tensors(part)


def convert(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same value with every tensor changed; what holds none that changes stays the same object."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        parts = [convert(part, change) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        entries = {key: convert(part, change) for key, part in value.items()}
        if all(entries[key] is part for key, part in value.items()):
            return value
        mapping: Any = copy.copy(value)  # keeps its type, and what else it carries
        for key, part in entries.items():
            mapping[key] = part
        return mapping
    if is_dataclass(value) and not isinstance(value, type):
        instance = copy.copy(value)
        for field in fields(value):
            object.__setattr__(instance, field.name, convert(getattr(value, field.name), change))
        return instance
    return value


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, Mapping):
        yield from value.values()
    elif is_dataclass(value):
        yield from (getattr(value, field.name) for field in fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        yield from vars(value).values()
