"""Tensors inside what users pass around."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mics_core import trees

Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Output:
    """As models return it."""

    value: Any
    name: str = "output"


class Batch(dict):  # type: ignore[type-arg]
    """A mapping that carries more than its items."""

    device = "here"


LEAVES = st.one_of(st.integers(-9, 9).map(torch.tensor), st.none(), st.text(max_size=2), st.booleans())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner),
        st.dictionaries(st.sampled_from("abc"), inner).map(OrderedDict),
        st.dictionaries(st.sampled_from("abc"), inner).map(Batch),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        inner.map(Output),
    ),
    max_leaves=8,
)


def plain(value: Any) -> Any:
    """The value with tensors as texts, and with all types."""
    if isinstance(value, Tensor):
        return f"tensor {value.item()}"
    if isinstance(value, Output):
        return Output, plain(value.value), value.name
    if isinstance(value, dict):
        return type(value), [(key, plain(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [plain(part) for part in value]
    return value


@given(value=VALUES)
def test_every_tensor_is_found_and_changed_and_nothing_else(value: Any) -> None:
    before = plain(value)
    found = [tensor.item() for tensor in trees.tensors(value)]
    changed = trees.convert(value, lambda tensor: tensor + 100)
    assert [tensor.item() for tensor in trees.tensors(changed)] == [number + 100 for number in found]
    assert plain(trees.convert(changed, lambda tensor: tensor - 100)) == before
    assert plain(value) == before, "the caller's value was changed"


def test_attributes_of_other_objects_are_found_but_not_those_of_modules() -> None:
    normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    assert {tensor.sum().item() for tensor in trees.tensors([normal])} == {0.0, 2.0}
    assert not list(trees.tensors([nn.Linear(2, 2), nn.Linear, "text", 3]))


def test_what_torch_returns_keeps_its_type() -> None:
    largest = torch.max(torch.tensor([[1.0, 2.0]]), dim=1)
    changed = trees.convert(largest, lambda tensor: tensor + 1)
    assert type(changed) is type(largest)
    assert (changed.values.item(), changed.indices.item()) == (3.0, 2)
