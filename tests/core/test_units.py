"""Which modules become units, and which parameters are theirs."""

import re

import pytest
import torch
from torch import nn

from mics_core import ConfigError, Precision
from mics_core.spec.units import UnitRule, find


class Model(nn.Module):
    """Two lists, one inside a unit of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.towers = nn.ModuleList(
            nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(2, 2)]), "norm": nn.LayerNorm(2)}) for _ in range(2)
        )
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])


def cut(model: nn.Module, rule: UnitRule | None = None) -> dict[str, list[str]]:
    """The names of each unit's parameters."""
    return {unit.name: [member.name for member in (*unit.trained, *unit.frozen)] for unit in find(model, rule)}


def test_the_children_of_every_module_list_are_units() -> None:
    found = cut(Model())
    assert found == {
        "": ["scale", "towers.0.norm.weight", "towers.0.norm.bias", "towers.1.norm.weight", "towers.1.norm.bias"],
        "towers.0.inner.0": ["towers.0.inner.0.weight", "towers.0.inner.0.bias"],  # a ModuleDict is never called
        "towers.1.inner.0": ["towers.1.inner.0.weight", "towers.1.inner.0.bias"],
        "blocks.0": ["blocks.0.weight", "blocks.0.bias"],  # a ReLU has nothing to gather
        "blocks.2": ["blocks.2.0.weight", "blocks.2.0.bias", "blocks.2.1.weight", "blocks.2.1.bias"],
    }
    assert {name for names in found.values() for name in names} == {name for name, _ in Model().named_parameters()}


def test_units_are_classes_or_what_a_predicate_says() -> None:
    assert list(cut(Model(), [nn.Sequential])) == ["", "blocks.2"]
    assert list(cut(Model(), (nn.Sequential, nn.Linear))) == [
        "",
        "towers.0.inner.0",
        "towers.1.inner.0",
        "blocks.0",
        "blocks.2.0",
        "blocks.2.1",
    ]
    assert list(cut(Model(), lambda name, module: name.endswith(".1") and isinstance(module, nn.Linear))) == [
        "",
        "blocks.2.1",
    ]


def test_a_class_that_the_model_does_not_hold() -> None:
    sentence = "units names LSTM, but Model holds no such module: name a class of modules inside the model"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        find(Model(), [nn.Linear, nn.LSTM])


def test_a_parameter_belongs_to_the_innermost_unit_that_holds_all_its_places() -> None:
    model = nn.Module()
    model.outer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model.last = nn.Linear(2, 2)
    model.outer[1].weight = model.outer[0].weight  # in two units of one
    model.last.bias = model.outer[1].bias  # in a unit and outside
    units = {unit.name: unit for unit in find(model, lambda name, _: name in ("outer", "outer.0", "outer.1"))}
    assert {name: [m.name for m in unit.trained] for name, unit in units.items()} == {
        "": ["outer.1.bias", "last.weight"],
        "outer": ["outer.0.weight", "outer.2.weight"],
        "outer.0": ["outer.0.bias"],
    }
    tied = units["outer"].trained[0]
    assert [site.path for site in tied.sites] == ["outer.0.weight", "outer.1.weight"]
    assert [site.module for site in tied.sites] == [model.outer[0], model.outer[1]]


def test_a_module_in_two_places_is_one_place() -> None:
    layer = nn.Linear(2, 2, bias=False)
    (root, unit) = find(nn.ModuleDict({"list": nn.ModuleList([layer, layer])}), None)
    assert not root.trained
    assert [site.path for site in unit.trained[0].sites] == ["list.0.weight"]


def test_frozen_parameters_lie_apart() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (root,) = find(model, None)
    assert ([m.name for m in root.trained], [m.name for m in root.frozen]) == (["weight"], ["bias"])
    assert str(root) == "the root"


def test_a_model_without_parameters_has_a_root() -> None:
    assert cut(nn.ReLU()) == {"": []}


@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
def test_any_name_of_a_tied_weight_keeps_it_exact(name: str) -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    (root,) = find(model, None)
    assert root.exact(Precision()) == 4  # the bias
    assert root.exact(Precision(exact=(name,))) == 4 + 16
