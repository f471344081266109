"""Degrees and dtypes that users ask for."""

import doctest
import importlib
import pkgutil
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mics_core
from mics_core import ConfigError, Precision, Sharding

MODULES = sorted(module.name for module in pkgutil.walk_packages(mics_core.__path__, "mics_core."))


def test_the_examples_of_the_docstrings_give_what_they_show() -> None:
    results = {name: doctest.testmod(importlib.import_module(name), raise_on_error=False) for name in MODULES}
    assert not {name: result for name, result in results.items() if result.failed}
    assert sum(result.attempted for result in results.values()) > 1


@pytest.mark.parametrize(
    ("sharding", "degrees"),
    [
        (Sharding.ddp(), (1, 1, 1)),
        (Sharding.zero1(), (1, 1, 16)),
        (Sharding.zero2(), (1, 16, 16)),
        (Sharding.zero3(), (16, 16, 16)),
        (Sharding.mics(8), (8, 8, 8)),
        (Sharding(params=2, grads=4, optimizer=-1), (2, 4, 16)),
    ],
    ids=str,
)
def test_degrees_by_their_names(sharding: Sharding, degrees: tuple[int, int, int]) -> None:
    assert sharding.resolve(16) == Sharding(*degrees)


@given(degrees=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 8, 12])] * 3), world=st.sampled_from([1, 2, 4, 6, 12, 24]))
def test_degrees_that_do_not_divide_each_other_are_refused(degrees: tuple[int, int, int], world: int) -> None:
    p, g, o = degrees
    if g % p or o % g or world % o:
        with pytest.raises(ConfigError, match="which does not divide"):
            Sharding(p, g, o).resolve(world)
    else:
        assert Sharding(p, g, o).resolve(world) == Sharding(p, g, o)


@pytest.mark.parametrize("degree", [0, -2, 2.0, "2"], ids=repr)
def test_a_degree_is_a_count(degree: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"grads is {degree!r}, expected a count of pieces")):
        Sharding(1, degree, 4).resolve(4)


def test_precisions_by_their_names() -> None:
    assert Precision.fp32() == Precision(torch.float32, torch.float32, torch.float32)
    assert Precision.bf16() == Precision(torch.bfloat16, torch.bfloat16, torch.float32)
    assert Precision.bf16(torch.float32).reduce == torch.float32
    fp16 = Precision.fp16()
    assert (fp16.compute, fp16.reduce, fp16.master) == (torch.float16, torch.float32, torch.float32)
    assert fp16.loss_scale is not None


@pytest.mark.parametrize(
    ("dtypes", "sentence"),
    [
        ({"compute": torch.int32}, "compute is torch.int32, expected float64, float32, bfloat16 or float16"),
        ({"reduce": torch.float8_e4m3fn}, "reduce is torch.float8_e4m3fn, expected"),
        ({"reduce": "bf16"}, "reduce is 'bf16', expected"),
        ({"master": torch.bfloat16}, "master is torch.bfloat16, expected float32 or float64"),
        (dict.fromkeys(("compute", "master"), torch.bfloat16), "master is torch.bfloat16, expected float32 or float64"),
        ({"compute": torch.float64}, "no narrower than compute, torch.float64"),
    ],
    ids=str,
)
def test_dtypes_that_lose_too_much_are_refused(dtypes: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Precision(**dtypes)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"between_nodes": torch.float16}, "between_nodes is torch.float16, expected torch.int8"),
        ({"hop1_between_nodes": "int8"}, "hop1_between_nodes is 'int8', expected torch.int8"),
        ({"between_nodes": torch.int8, "master": torch.float64}, "beside float64"),
        ({"exact": "*.bias"}, "exact is '\\*.bias', expected a tuple"),
    ],
)
def test_eight_bits_that_cannot_be_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Precision(**words)
