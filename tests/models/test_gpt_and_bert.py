"""What holds for every model alike: how it is built, checkpointed, compiled and imported."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mics_models import BERTConfig, GPTConfig
from shapes import LATER, MODELS, build, tokens_for

Config = GPTConfig | BERTConfig
CPU = torch.device("cpu")
# Dynamo reads .grad of all inputs and hides torch's warning, but not one that the tests turn into an error.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@each_model
def test_checkpointing_blocks_changes_no_bit_and_keeps_less(config: Config) -> None:
    tokens, documents = tokens_for(config), torch.arange(24).expand(2, 24) // 10
    gradients, kept = {}, {}
    for checkpoint_blocks in (False, True):
        torch.manual_seed(1)
        model = build(dataclasses.replace(config, checkpoint_blocks=checkpoint_blocks))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            loss = model(tokens, targets=tokens, documents=documents)
        loss.backward()
        kept[checkpoint_blocks] = sum(sizes)
        gradients[checkpoint_blocks] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert kept[True] < kept[False] / 2
    assert len(gradients[True]) == len(gradients[False]) > 10
    for name, plain in gradients[False].items():
        assert torch.equal(plain, gradients[True][name]), name


@each_model
def test_a_model_built_on_meta_and_filled_module_by_module_is_the_one_built_at_once(config: Config) -> None:
    torch.manual_seed(3)
    direct = build(config)
    with torch.device("meta"):
        model = build(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    torch.manual_seed(3)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.to_empty(device=CPU, recurse=False)
            for parameter in module.parameters(recurse=False):
                nn.init.constant_(parameter, math.nan)  # fresh memory is often zero: nothing may rely on that
            module.reset_parameters()
    for name, parameter in direct.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert len(list(model.parameters())) == len(list(direct.parameters()))


@compiling
@each_model
@pytest.mark.parametrize("checkpoint_blocks", [False, True], ids=["kept", "checkpointed"])
def test_compiled_blocks_share_one_graph_and_give_the_same_loss(config: Config, checkpoint_blocks: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:  # noqa: ARG001
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = build(dataclasses.replace(config, layers=3, checkpoint_blocks=checkpoint_blocks))
    tokens = tokens_for(config)
    plain = model(tokens, targets=tokens)
    names = list(model.state_dict())
    model.compile_blocks(backend=backend, fullgraph=True)
    compiled = model(tokens, targets=tokens)
    torch.testing.assert_close(compiled, plain)
    compiled.backward()
    assert len(graphs) == 1
    assert list(model.state_dict()) == names


@compiling
def test_compiled_blocks_give_the_gradients_of_plain_ones() -> None:
    torch._dynamo.reset()
    model, tokens = build(LATER), tokens_for(LATER)
    documents = torch.arange(24).expand(2, 24) // 10

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(tokens, targets=tokens, documents=documents), tuple(model.parameters()))

    plain = gradients()
    model.compile_blocks(backend="aot_eager")
    for got, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_importing_brings_neither_the_runtime_nor_triton_nor_an_optional_package() -> None:
    code = "import sys, mics_models.hf, mics_models.data\nprint({m.partition('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mics_models" in run.stdout
    for absent in (
        "mics_core",
        "mics_kernels",
        "triton",
        "transformers",
        "safetensors",
        "tokenizers",
        "pyarrow",
        "rich",
    ):
        assert f"'{absent}'" not in run.stdout
