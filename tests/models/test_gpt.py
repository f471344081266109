import dataclasses
import math
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mics_models import GPT, GPTS, GPTConfig, chunked_cross_entropy
from mics_models.gpt import IGNORED, MLP, Attention, Block, rotate, rotation
from shapes import GPT2, LATER, VARIANTS

CPU = torch.device("cpu")
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def lively(module: nn.Module) -> nn.Module:
    """With weights and biases large enough for every path through the model to show in its output."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def tokens_for(config: GPTConfig, samples: int = 2, length: int | None = None) -> Tensor:
    return torch.randint(config.vocab, (samples, length or config.context))


@each_variant
def test_a_later_token_never_changes_earlier_logits_and_an_earlier_one_does_change_later(config: GPTConfig) -> None:
    model = lively(GPT(config))
    tokens = tokens_for(config)
    before = model(tokens)
    for place in (1, 11, config.context - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % config.vocab
        moved = (model(changed) - before).abs().amax(dim=(0, 2))  # [T]
        assert moved[:place].max() < 1e-5
        assert moved[place:].min() > 1e-3


def test_learned_positions_tell_equal_tokens_apart() -> None:
    logits = lively(GPT(GPT2))(torch.full((1, 24), 7))[0]  # without positions every place would see the same
    assert torch.cdist(logits, logits).add(torch.eye(24)).min() > 1e-2


@each_variant
def test_the_loss_is_the_cross_entropy_of_the_logits(config: GPTConfig) -> None:
    model = lively(GPT(config))
    tokens, targets = tokens_for(config), tokens_for(config)
    targets[0, 3:9] = IGNORED
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected)


def test_a_gpt2_block_is_torchs_own_transformer_layer() -> None:
    block = lively(Block(GPT2))
    layer = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0, activation=nn.GELU("tanh"), batch_first=True, norm_first=True
    )
    parts = {
        "norm1": block.attention_norm,
        "self_attn.in_proj_": block.attention.qkv,
        "self_attn.out_proj": block.attention.out,
        "norm2": block.mlp_norm,
        "linear1": block.mlp.up,
        "linear2": block.mlp.down,
    }
    layer.load_state_dict(
        {
            f"{name}{'' if name.endswith('_') else '.'}{kind}": tensor
            for name, part in parts.items()
            for kind, tensor in part.state_dict().items()
        }
    )
    x = torch.randn(2, 24, 32)
    expected = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(24), is_causal=True)
    torch.testing.assert_close(block(x, None), expected, rtol=1e-4, atol=1e-4)


def test_swiglu_gates_one_half_with_the_other() -> None:
    mlp = lively(MLP(LATER))
    gate, up = mlp.up.weight[:80], mlp.up.weight[80:]
    x = torch.randn(2, 24, 32)
    gated = (x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(mlp(x), gated @ mlp.down.weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 14, 28, 1000])  # one at a time, uneven, even, exactly all, more than all
def test_the_chunked_loss_has_the_value_and_gradients_of_the_full_one(rows: int) -> None:
    hidden = torch.randn(4, 7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(61, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(61, (4, 7))
    targets[1, 2:5] = IGNORED
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1).float(), targets.flatten())
    loss = chunked_cross_entropy(hidden, weight, targets, logits_at_once=rows * 61 + 60)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)  # the logits are float32 in both


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_chunked_loss_never_holds_all_logits_nor_keeps_any_for_the_backward() -> None:
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    targets = torch.randint(500, (64,))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = chunked_cross_entropy(hidden, weight, targets, logits_at_once=8 * 500)
        loss.backward()
    assert largest.elements == 8 * 500
    assert max(kept, default=0) <= weight.numel()


def test_rotated_queries_and_keys_know_only_their_distance() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    cos, sin = (part.double() for part in rotation(LATER, 24, CPU))

    def score(query_at: int, key_at: int) -> float:
        turned = rotate(q, (cos[query_at], sin[query_at])) * rotate(k, (cos[key_at], sin[key_at]))
        return turned.sum().item()

    assert score(3, 3) == pytest.approx((q * k).sum().item(), abs=1e-6)
    for distance in (1, 5, 13):
        scores = [score(distance + at, at) for at in range(24 - distance)]
        assert max(scores) - min(scores) < 1e-5
    assert abs(score(13, 0) - score(5, 0)) > 1e-2
    assert abs(score(5, 0) - score(0, 5)) > 1e-2


def test_attention_with_rotation_is_the_same_wherever_the_sequence_begins() -> None:
    attention = lively(Attention(LATER))
    cos, sin = rotation(LATER, 24, CPU)
    x = torch.randn(2, 12, 32)
    early, late = (attention(x, (cos[at : at + 12], sin[at : at + 12])) for at in (0, 9))
    torch.testing.assert_close(early, late, rtol=1e-4, atol=1e-5)
    stretched = attention(x, (cos[::2], sin[::2]))
    assert (stretched - early).abs().max() > 1e-2


def test_grouped_queries_equal_full_heads_whose_keys_and_values_are_repeated() -> None:
    grouped = lively(Attention(LATER))
    full = Attention(dataclasses.replace(LATER, kv_heads=4))
    q, k, v = grouped.qkv.weight.split(grouped.widths)

    def repeated(weight: Tensor) -> Tensor:  # heads 0 and 1 share the first of the two, heads 2 and 3 the second
        return weight.reshape(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)

    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat((q, repeated(k), repeated(v))))
        full.out.weight.copy_(grouped.out.weight)
    x, by = torch.randn(2, 24, 32), rotation(LATER, 24, CPU)
    torch.testing.assert_close(grouped(x, by), full(x, by), rtol=1e-4, atol=1e-5)


@each_variant
def test_checkpointing_blocks_changes_no_bit_and_keeps_less(config: GPTConfig) -> None:
    tokens = tokens_for(config)
    gradients, kept = {}, {}
    for checkpoint_blocks in (False, True):
        torch.manual_seed(1)
        model = GPT(dataclasses.replace(config, checkpoint_blocks=checkpoint_blocks))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            loss = model(tokens, tokens)
        loss.backward()
        kept[checkpoint_blocks] = sum(sizes)
        gradients[checkpoint_blocks] = [parameter.grad for parameter in model.parameters()]
    assert kept[True] < kept[False] / 2
    for plain, again in zip(gradients[False], gradients[True], strict=True):
        assert torch.equal(plain, again)


@each_variant
def test_a_model_built_on_meta_and_filled_module_by_module_is_the_one_built_at_once(config: GPTConfig) -> None:
    torch.manual_seed(3)
    direct = GPT(config)
    with torch.device("meta"):
        model = GPT(config)
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


def test_weights_begin_with_the_scale_that_their_place_needs() -> None:
    config = dataclasses.replace(GPT2, width=256, hidden=1024, layers=8)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("name", GPTS)
def test_every_named_config_builds_on_meta_quickly_with_the_parameters_its_formula_says(name: str) -> None:
    begin = time.process_time()  # not the wall's: the machine may be busy
    with torch.device("meta"):
        model = GPT(GPTS[name])
    assert time.process_time() - begin < 2
    assert len(model.blocks) == GPTS[name].layers
    assert model.num_params() == GPTS[name].num_params()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bias": False},
        {"tied": False},
        {"norm": "rms"},
        {"positions": "rotary"},
        {"mlp": "swiglu"},
        {"kv_heads": 1},
    ],
    ids=str,
)
def test_the_formula_counts_every_variants_parameters(change: dict[str, Any]) -> None:
    config = dataclasses.replace(GPT2, **change)
    assert GPT(config).num_params() == config.num_params()


def test_the_named_configs_have_their_published_sizes() -> None:
    assert GPTS["gpt2-124m"].num_params() == 124_439_808  # GPT-2's own, to the parameter
    assert GPTS["gpt2-350m"].num_params() == 354_823_168
    for name, billions in {"gpt-1.3b": 1.3, "gpt-30b": 30, "gpt-100b": 100, "gpt-175b": 175}.items():
        assert GPTS[name].num_params() / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("config", [GPTS["byte-tiny"], *VARIANTS.values()], ids=["byte-tiny", *VARIANTS])
@pytest.mark.parametrize("seq", [8, 24])
def test_the_flops_are_those_that_torch_counts(config: GPTConfig, seq: int) -> None:
    model = GPT(config)
    tokens = tokens_for(config, samples=3, length=seq)
    # The fused attention's backward computes q @ k.T again, which the formula leaves out: count the plain one.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == pytest.approx(model.flops_per_token(seq), rel=0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 33}, "GPTConfig: width 33 is no multiple of heads 4: change one of them"),
        ({"kv_heads": 3}, "GPTConfig: heads 4 is no multiple of kv_heads 3: change one of them"),
        ({"layers": 0}, "GPTConfig: layers is 0, expected at least 1: give it a size"),
        ({"norm": "batch"}, "GPTConfig: norm is 'batch', expected one of ('layer', 'rms'): choose one"),
        ({"width": 12, "positions": "rotary"}, "GPTConfig: a head is 3 wide, expected an even width .*: change heads"),
    ],
    ids=str,
)
def test_an_impossible_config_says_what_to_change(change: dict[str, Any], message: str) -> None:
    literal = message if ".*" in message else message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^{literal}$"):
        dataclasses.replace(GPT2, **change)


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got sequences of 25 tokens, expected at most context = 24: cut them"):
        GPT(GPT2)(tokens_for(GPT2, length=25))


def test_importing_the_models_brings_neither_the_runtime_nor_the_kernels_nor_triton() -> None:
    code = "import sys, mics_models, mics_models.data; print({m.partition('.')[0] for m in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mics_models" in run.stdout
    for absent in ("mics_core", "mics_kernels", "triton"):
        assert f"'{absent}'" not in run.stdout
