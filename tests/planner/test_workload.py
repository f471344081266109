"""What is traced on the meta device: arithmetic as the formulas have it, alike units once, and the model as it was."""

import pytest
import torch
from torch import Tensor, nn

from mics_core import ConfigError, Precision
from mics_core.planner import passing, trace
from mics_core.planner import workload as workload_module
from mics_models import BERT, GPT, GPTConfig
from mics_models.bert import BERTConfig
from mics_models.configs import GPTS

TOKENS = 64
SMALL = GPTConfig(vocab=96, context=TOKENS, layers=3, width=32, heads=4, kv_heads=4, hidden=128)
LATER = GPTConfig(
    vocab=96, context=TOKENS, layers=3, width=32, heads=4, kv_heads=2, hidden=96, norm="rms", positions="rotary",
    mlp="swiglu", bias=False, tied=False,
)  # fmt: skip
ENCODER = BERTConfig(vocab=96, context=TOKENS, layers=3, width=32, heads=4, hidden=128)


def batch(rows: int = 1, tokens: int = TOKENS) -> dict[str, Tensor]:
    row = torch.zeros(rows, tokens, dtype=torch.int64)
    return {"tokens": row, "targets": row}


@pytest.mark.parametrize("model", [GPT(SMALL), GPT(LATER), BERT(ENCODER)], ids=["gpt2", "later gpt", "bert"])
def test_flops_are_those_of_the_formula(model: GPT | BERT) -> None:
    workload = trace(model, batch(), ranks=4)
    assert workload.flops_per_sample == model.flops_per_token(TOKENS) * TOKENS
    assert workload.tokens_per_sample == TOKENS
    assert workload.parameters == model.num_params()


@pytest.mark.parametrize("model", [GPT(SMALL), GPT(LATER), BERT(ENCODER)], ids=["gpt2", "later gpt", "bert"])
def test_tracing_alike_units_once_finds_what_tracing_all_finds(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = trace(model, batch(), ranks=4)
    monkeypatch.setattr(workload_module, "describe", id)
    everything = trace(model, batch(), ranks=4)
    assert [unit.forward_flops for unit in once.units] == [unit.forward_flops for unit in everything.units]
    for ours, theirs in zip(once.held, everything.held, strict=True):
        assert ours.plain == pytest.approx(theirs.plain, rel=0.03)
        assert ours.recomputed == pytest.approx(theirs.recomputed, rel=0.03)


def test_the_model_stays_as_it_was_and_rows_of_the_sample_do_not_count() -> None:
    model = GPT(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, three = trace(model, batch(), ranks=4), trace(model, batch(3), ranks=4)
    assert one == three
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_recomputation_and_narrow_dtypes_keep_less() -> None:
    wide, narrow = (trace(GPT(SMALL), batch(), precision=p, ranks=4) for p in (Precision.fp32(), Precision.bf16()))
    assert all(held.recomputed < held.plain for held in wide.held)
    assert all(low.plain < high.plain for low, high in zip(narrow.held, wide.held, strict=True))
    block = wide.units[0]
    assert block.boundary == TOKENS * SMALL.width * 4
    assert block.activations > 10 * block.boundary


def test_between_traced_batches_memory_is_a_line_and_beyond_them_it_goes_on() -> None:
    workload = trace(GPT(SMALL), batch(), ranks=4)
    lives = [workload.live(rows, recompute=False) for rows in (2, 3, 4, 16, 32, 64)]
    assert lives[1] == pytest.approx((lives[0] + lives[2]) / 2, abs=1)
    assert lives[5] - lives[4] == pytest.approx(2 * (lives[4] - lives[3]), abs=1)


def test_a_model_of_100_billion_parameters_is_traced_as_the_formula_says() -> None:
    with torch.device("meta"):
        model = GPT(GPTS["gpt-100b"])
    workload = trace(model, batch(1, 512), precision=Precision.bf16(), ranks=512)
    assert len(workload.units) == 80
    assert workload.flops_per_sample == model.flops_per_token(512) * 512


class Layer(nn.Module):
    def __init__(self, place: int, keeps: float) -> None:
        super().__init__()
        self.place, self.keeps = place, keeps
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.linear(x), 1 - self.keeps) if self.keeps < 1 else self.linear(x)


class Layers(nn.Module):
    def __init__(self, keeps: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(place, each) for place, each in enumerate(keeps))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def test_units_with_other_settings_are_traced_apart_and_those_that_know_their_place_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = []
    first = passing.Pass._first
    monkeypatch.setattr(passing.Pass, "_first", lambda *given: traced.append(given[1]) or first(*given))
    mixed = trace(Layers([1.0, 0.5, 1.0, 0.5, 1.0]), torch.zeros(1, 8, 16), ranks=1)
    assert set(traced) == {1, 2, 3}  # the first one's input has no gradient
    kept = [unit.activations for unit in mixed.units]
    assert kept[2] == kept[4] < kept[1] == kept[3]


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum() if x.sum().item() > 0 else self.layer(x).mean()


def test_a_model_that_asks_for_values_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"trace: the model cannot run on the meta device .*sample=.*\.item\(\)"):
        trace(Asking(), torch.zeros(1, 4), ranks=1)


class Strict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] > 99
        return self.layer(x).sum()


def test_a_model_that_fails_in_any_other_way_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"a sample of shapes \[\(1, 4\)\], expected one that .*: AssertionError: "):
        trace(Strict(), torch.zeros(1, 4), ranks=1)


def test_rows_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"have \[1, 2\] rows, expected the same"):
        trace(GPT(SMALL), {"tokens": batch(1)["tokens"], "targets": batch(2)["targets"]}, ranks=1)
