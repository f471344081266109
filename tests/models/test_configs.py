import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mics_models import BERTS, GPTS, BERTConfig, GPTConfig
from shapes import GPT2, MODELS, PAIRED, build, tokens_for

README = Path(__file__).parents[2] / "packages" / "mics-models" / "README.md"
NAMED: dict[str, GPTConfig | BERTConfig] = {**GPTS, **BERTS}


@pytest.mark.parametrize("name", NAMED)
def test_every_named_config_builds_on_meta_with_the_parameters_its_formula_says(name: str) -> None:
    with torch.device("meta"):
        model = build(NAMED[name])
    assert len(model.blocks) == NAMED[name].layers
    assert model.num_params() == NAMED[name].num_params()


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (GPT2, {}),
        (GPT2, {"bias": False}),
        (GPT2, {"tied": False}),
        (GPT2, {"norm": "rms"}),
        (GPT2, {"positions": "rotary"}),
        (GPT2, {"mlp": "swiglu"}),
        (GPT2, {"kv_heads": 1}),
        (PAIRED, {}),
        (PAIRED, {"types": 1}),
        (PAIRED, {"next_sentence": False}),
    ],
    ids=str,
)
def test_the_formula_counts_every_variants_parameters(config: GPTConfig | BERTConfig, change: dict[str, Any]) -> None:
    changed = dataclasses.replace(config, **change)
    assert build(changed).num_params() == changed.num_params()


def test_the_named_configs_have_their_published_sizes() -> None:
    assert GPTS["gpt2-124m"].num_params() == 124_439_808  # GPT-2's own, to the parameter
    assert GPTS["gpt2-350m"].num_params() == 354_823_168
    assert GPTS["gpt2-1.5b"].num_params() == 1_557_611_200
    assert GPTS["llama3-8b"].num_params() == 8_030_261_248  # Meta's own, to the parameter
    assert GPTS["llama3-70b"].num_params() == 70_553_706_496
    assert BERTS["bert-base"].num_params() == 110_106_428  # BERT's own with both heads
    assert BERTS["bert-large"].num_params() == 336_226_108
    billions = {"gpt-1.3b": 1.3, "gpt2-20b": 20, "gpt-30b": 30, "gpt-100b": 100, "gpt-175b": 175}
    billions |= {"bert-10b": 10, "bert-15b": 15, "bert-20b": 20, "bert-50b": 50, "roberta-20b": 20}
    for name, size in billions.items():
        assert NAMED[name].num_params() / 1e9 == pytest.approx(size, rel=0.02), name


@pytest.mark.parametrize(
    "config",
    [GPTS["byte-tiny"], BERTS["bert-tiny"], *MODELS.values()],
    ids=["byte-tiny", "bert-tiny", *MODELS],
)
@pytest.mark.parametrize("seq", [8, 24])
def test_the_flops_are_those_that_torch_counts(config: GPTConfig | BERTConfig, seq: int) -> None:
    model = build(config)
    tokens = tokens_for(config, samples=3, length=seq)
    # The fused attention's backward computes q @ k.T again, which the formula leaves out: count the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == pytest.approx(model.flops_per_token(seq), rel=0.001)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (GPT2, {"width": 33}, "GPTConfig: width 33 is no multiple of heads 4: change one of them"),
        (GPT2, {"kv_heads": 3}, "GPTConfig: heads 4 is no multiple of kv_heads 3: change one of them"),
        (GPT2, {"layers": 0}, "GPTConfig: layers is 0, expected at least 1: give it a size"),
        (GPT2, {"norm": "batch"}, "GPTConfig: norm is 'batch', expected one of ('layer', 'rms'): choose one"),
        (
            GPT2,
            {"width": 12, "positions": "rotary"},
            "GPTConfig: a head is 3 wide, expected an even width to rotate in pairs: change heads",
        ),
        (GPT2, {"init_std": -1.0}, "GPTConfig: init_std is -1.0, expected a finite number from 0 up: change it"),
        (GPT2, {"norm_eps": math.nan}, "GPTConfig: norm_eps is nan, expected a finite number from 0 up: change it"),
        (GPT2, {"rotary_base": 0.0}, "GPTConfig: rotary_base is 0.0, expected a finite number above 0: change it"),
        (PAIRED, {"init_std": math.inf}, "BERTConfig: init_std is inf, expected a finite number from 0 up: change it"),
        (PAIRED, {"width": 33}, "BERTConfig: width 33 is no multiple of heads 4: change one of them"),
        (PAIRED, {"types": 0}, "BERTConfig: types is 0, expected at least 1: give it a size"),
    ],
    ids=str,
)
def test_an_impossible_config_says_what_to_change(
    config: GPTConfig | BERTConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(config, **change)


def test_the_readmes_table_has_every_config_with_its_figures() -> None:
    row = r"^\| `(.+?)` \| (\d+) \| (\d+) \| (\d+)[^|]* \| (\d+) \| (.+?) \| (.+?) \|$"
    rows = re.findall(row, README.read_text(), re.M)
    assert [name for name, *_ in rows] == list(NAMED)
    for name, *shape, parameters, flops in rows:
        config = NAMED[name]
        assert [int(number) for number in shape] == [config.layers, config.width, config.heads, config.context], name
        assert parameters == short(config.num_params() / 1e6, "MB"), name
        assert flops == short(config.flops_per_token() / 1e6, "MGT"), name


def short(millions: float, units: str) -> str:
    """Three digits, such as 1.32 B for 1320 and the units M and B."""
    return f"{millions:.3g} {units[0]}" if millions < 1000 else short(millions / 1000, units[1:])


def test_the_readmes_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
