from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import mics_kernels.ops.adamw as adamw_op
import mics_kernels.segments as segments_module
from comparing import assert_same_bits
from mics_kernels import Segments, StochasticRounding, adamw


@dataclass
class Shard:
    """The buffers of one flat shard."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def random(
        cls, size: int, grad: torch.dtype = torch.float32, weights: torch.dtype | None = torch.bfloat16, shift: int = 0
    ) -> "Shard":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        normal = torch.randn(4, size, device=device) * 10.0 ** torch.randint(-3, 2, (4, size), device=device)
        buffers = [torch.empty(size + shift, device=device)[shift:].copy_(row) for row in normal]
        buffers[2].square_()
        copy = None if weights is None else torch.full((size,), 7.0, device=device).to(weights)
        return cls(buffers[0], buffers[1], buffers[2], buffers[3].to(grad), copy)

    def clone(self) -> "Shard":
        return replace(self, **{name: None if t is None else t.clone() for name, t in vars(self).items()})

    def update(self, **settings: object) -> None:
        adamw(self.master, self.exp_avg, self.exp_avg_sq, self.grad, self.weights, **settings)

    def update_by_reference(self, **settings: object) -> None:
        defaults = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "clip": None, "skip": None}
        defaults |= {"zero_grad": False, "rounding": None}
        everything = Segments.build([0], [self.master.numel()], self.master.device)
        settings = adamw_op._Settings(**{"segments": everything} | defaults | settings)
        adamw_op.reference(adamw_op._Buffers(**vars(self)), settings)


def in_float64(shard: Shard, lr: float, step: int, betas: tuple[float, float], eps: float, decay: float) -> Shard:
    """What torch.optim.AdamW makes of a shard in float64, for one update after `step - 1` others."""
    wide = {name: None if t is None else t.double() for name, t in vars(shard).items()}
    parameter = torch.nn.Parameter(wide["master"])
    parameter.grad = wide["grad"]
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=betas, eps=eps, weight_decay=decay, foreach=False)
    state = {"step": torch.tensor(float(step - 1)), "exp_avg": wide["exp_avg"], "exp_avg_sq": wide["exp_avg_sq"]}
    optimizer.state[parameter] = state
    optimizer.step()
    return Shard(parameter.detach(), state["exp_avg"], state["exp_avg_sq"], wide["grad"], None)


def ulps(got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest error in units of the last place of `scale`, the largest number that went into the result."""
    unit = torch.finfo(torch.float32).eps * scale.double().abs().clamp(min=torch.finfo(torch.float32).smallest_normal)
    return ((got.double() - exact).abs() / unit).max().item() if got.numel() else 0.0


runs = pytest.mark.parametrize("run", [Shard.update, Shard.update_by_reference])


@runs
@given(
    size=st.integers(1, 5000) | st.sampled_from([4096, 8192]),
    grad=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weights=st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32]),
    shift=st.integers(0, 1),
    step=st.sampled_from([1, 2, 10, 1000, 10**6]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.9, 0.0)]),
    lr=st.sampled_from([0.0, 1e-3, 0.5]),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_an_update_is_that_of_torch_in_float64_to_the_last_places(
    run: object,
    size: int,
    grad: torch.dtype,
    weights: torch.dtype | None,
    shift: int,
    step: int,
    betas: tuple[float, float],
    lr: float,
    decay: float,
) -> None:
    before = Shard.random(size, grad, weights, shift)
    exact = in_float64(before, lr, step, betas, 1e-8, decay)
    after = before.clone()
    run(after, lr=lr, step=step, betas=betas, weight_decay=decay)
    assert ulps(after.exp_avg, exact.exp_avg, before.exp_avg.abs().maximum(before.grad.float().abs())) <= 2
    assert ulps(after.exp_avg_sq, exact.exp_avg_sq, exact.exp_avg_sq) <= 4
    # How far the larger of gradient and momentum alone would have carried the weight: what cancellation leaves of
    # the two carries the rounding errors of both.
    pull = before.exp_avg.abs().maximum(before.grad.float().abs()).double() / (1 - betas[0] ** step)
    reach = lr * pull / ((exact.exp_avg_sq / (1 - betas[1] ** step)).sqrt() + 1e-8)
    assert ulps(after.master, exact.master, before.master.double().abs() + reach) <= 4
    assert_same_bits(after.grad, before.grad)
    if weights is not None:
        assert_same_bits(after.weights, after.master.to(weights))


@runs
def test_many_updates_stay_beside_torch_in_float64(run: object) -> None:
    got, exact = Shard.random(3000), None
    got.exp_avg.zero_()
    got.exp_avg_sq.zero_()
    exact = replace(got, **{name: t.double() for name, t in vars(got).items()})
    for step in range(1, 21):
        got.grad.normal_()
        exact.grad = got.grad.double()
        exact = in_float64(exact, 1e-2, step, (0.9, 0.999), 1e-8, 0.1)
        run(got, lr=1e-2, step=step, weight_decay=0.1)
    torch.testing.assert_close(got.master.double(), exact.master, rtol=2e-6, atol=2e-7)


def settings_in_memory(device: torch.device, **numbers: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(number, device=device) for name, number in numbers.items()}


@runs
def test_each_segment_has_its_own_decay_and_rate_and_the_rest_is_left_alone(run: object, device: torch.device) -> None:
    before = Shard.random(20_000)
    offsets, sizes = [0, 160, 5000, 5003, 12_288], [150, 4840, 0, 3, 4096]
    rates, decays = [0.1, 0.01, 9.0, 0.0, 0.02], [0.0, 0.5, 9.0, 0.1, 0.1]
    after = before.clone()
    segments = Segments.build(offsets, sizes, device)
    columns = {"lr": torch.tensor(rates, device=device), "weight_decay": torch.tensor(decays, device=device)}
    run(after, step=3, segments=segments, zero_grad=True, **columns)
    expected = before.clone()
    for offset, size, rate, decay in zip(offsets, sizes, rates, decays, strict=True):
        part = {name: t[offset : offset + size] for name, t in vars(expected).items()}
        if size:
            Shard(**part).update_by_reference(lr=rate, weight_decay=decay, step=3, zero_grad=True)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(getattr(after, name), getattr(expected, name), rtol=1e-6, atol=1e-7)
    outside = torch.ones(20_000, dtype=torch.bool, device=device)
    for offset, size in zip(offsets, sizes, strict=True):
        outside[offset : offset + size] = False
    for name, tensor in vars(after).items():
        assert_same_bits(tensor[outside], getattr(before, name)[outside])
    assert after.grad[~outside].eq(0).all()


@runs
def test_one_number_in_memory_serves_all_segments(run: object, device: torch.device) -> None:
    one, other = Shard.random(5000), None
    other = one.clone()
    segments = Segments.build([0, 1000, 3000], [1000, 2000, 2000], device)
    numbers = {"lr": torch.full((1,), 0.125, device=device), "weight_decay": torch.full((1,), 0.25, device=device)}
    run(one, step=1, segments=segments, **numbers)
    run(other, lr=0.125, step=1, weight_decay=0.25)
    assert_same_bits(one.master, other.master)


def test_small_segments_side_by_side_are_one_run_and_large_ones_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "PART", 100)
    pieces = Segments.build([0, 40, 60, 100, 101, 330, 330], [40, 20, 40, 1, 225, 0, 10], "cpu")
    runs = [(run.begin, run.sizes, run.segments) for run in pieces.runs]
    assert runs == [
        (0, [40, 20, 40], [0, 1, 2]),
        (100, [1], [3]),
        (101, [100], [4]),
        (201, [100], [4]),
        (301, [25], [4]),
        (330, [10], [6]),
    ]


@runs
def test_gradients_are_multiplied_by_the_clip_factor(run: object, device: torch.device) -> None:
    clipped, scaled = Shard.random(5000), None
    scaled = clipped.clone()
    scaled.grad *= 0.25
    run(clipped, lr=0.1, step=1, clip=torch.tensor(0.25, device=device))
    run(scaled, lr=0.1, step=1)
    for name in ("master", "exp_avg", "exp_avg_sq", "weights"):
        assert_same_bits(getattr(clipped, name), getattr(scaled, name))


@runs
@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_step_to_skip_changes_nothing_but_may_zero_the_gradient(
    run: object, zero_grad: bool, device: torch.device
) -> None:
    before = Shard.random(5000)
    before.grad[17] = torch.inf
    after = before.clone()
    run(after, step=1, zero_grad=zero_grad, **settings_in_memory(device, skip=1.0, clip=torch.nan), lr=0.1)
    for name in ("master", "exp_avg", "exp_avg_sq", "weights"):
        assert_same_bits(getattr(after, name), getattr(before, name))
    assert_same_bits(after.grad, torch.zeros_like(before.grad) if zero_grad else before.grad)


@runs
def test_numbers_may_lie_in_device_memory(run: object, device: torch.device) -> None:
    one, other = Shard.random(5000), None
    other = one.clone()
    run(one, lr=0.125, step=7, weight_decay=0.5)
    run(other, **settings_in_memory(device, lr=0.125, step=7.0, weight_decay=0.5, skip=0.0, clip=1.0))
    for name, tensor in vars(one).items():
        assert_same_bits(tensor, getattr(other, name))


def test_stochastic_rounding_gives_the_bits_of_the_reference() -> None:
    one = Shard.random(9000, shift=1)
    one.master[5], one.master[6] = torch.inf, 3.4e38
    other = one.clone()
    rounding = StochasticRounding(seed=3, first=2**32 - 4500)  # crosses from one word of the counter to the next
    settings = {"lr": 0.0, "step": 5, "weight_decay": 0.0, "rounding": rounding}  # a rate of 0: the masters stay
    one.update(**settings)
    other.update_by_reference(**settings)
    assert_same_bits(one.weights, other.weights)


def rounded(number: float, size: int, device: torch.device, step: int = 1, **rounding: int) -> torch.Tensor:
    """`number` rounded `size` times."""
    shard = Shard(*torch.zeros(4, size, device=device).unbind(), torch.empty(size, dtype=torch.bfloat16, device=device))
    shard.master.fill_(number)
    shard.update(lr=0.0, step=step, rounding=StochasticRounding(**rounding))
    return shard.weights.double()


@pytest.mark.parametrize("number", [1.0 + 2**-9, 1.001, -3.003, 1e-30, 0.0, 2.0])
def test_stochastic_rounding_keeps_the_mean(number: float, device: torch.device) -> None:
    size = 40_000
    exact = torch.tensor(number).double().item()
    copies = rounded(number, size, device, seed=1)
    step = torch.tensor(number).bfloat16().abs().item() * 2**-7
    assert (copies - exact).abs().max() <= step
    spread = copies.std().item() / size**0.5
    assert abs(copies.mean().item() - exact) <= 5 * spread  # five sigma; a fixed seed: no luck is involved
    if exact != torch.tensor(exact).bfloat16().double().item():
        assert copies.unique().numel() == 2


def test_stochastic_rounding_errs_independently_from_element_to_element_and_step_to_step(device: torch.device) -> None:
    size = 30_000
    signs = torch.stack([rounded(1.0 + 2**-8, size, device, step, seed=4) > 1 for step in (1, 2)]).double() * 2 - 1
    for lag in (1, 2, 8, 64, 1024):
        assert abs((signs[0, lag:] * signs[0, :-lag]).mean().item()) < 5 / size**0.5
    assert abs((signs[0] * signs[1]).mean().item()) < 5 / size**0.5


def test_stochastic_rounding_depends_on_the_seed_and_an_elements_number_alone(device: torch.device) -> None:
    whole = rounded(1.001, 9000, device, seed=1, first=100)
    assert whole.equal(rounded(1.001, 9000, device, seed=1, first=100))
    parts = [rounded(1.001, 3001, device, seed=1, first=100), rounded(1.001, 5999, device, seed=1, first=3101)]
    assert whole.equal(torch.cat(parts))
    assert not whole.equal(rounded(1.001, 9000, device, seed=2, first=100))


WRONG = {
    "exp_avg has 4 elements, expected 8": lambda s: adamw(s.master, s.exp_avg[:4], s.exp_avg_sq, s.grad, lr=1, step=1),
    "master is torch.bfloat16, expected float32": lambda s: adamw(s.weights, *[s.weights] * 3, lr=1, step=1),
    "grad is torch.float64": lambda s: adamw(s.master, s.exp_avg, s.exp_avg_sq, s.grad.double(), lr=1, step=1),
    "clip is torch.float64 of shape": lambda s: s.update(lr=1, step=1, clip=s.grad[0].double()),
    "master has shape": lambda s: adamw(s.master.view(2, 4), s.exp_avg, s.exp_avg_sq, s.grad, lr=1, step=1),
    "lr has 2 elements, expected 1": lambda s: s.update(lr=s.grad[:2], step=1),
    "weight_decay is torch.float64": lambda s: s.update(lr=1, step=1, weight_decay=s.grad[:1].double()),
    "weight_decay has shape": lambda s: s.update(
        lr=1, step=1, weight_decay=s.grad[:4:2], segments=Segments.build([0, 4], [4, 4], s.master.device)
    ),
    "lr is torch.int64": lambda s: s.update(
        lr=s.grad[:2].long(), step=1, segments=Segments.build([0, 4], [4, 4], s.master.device)
    ),
    "lr is -0.1, expected 0 or more": lambda s: s.update(lr=-0.1, step=1),
    "lr is nan, expected 0 or more": lambda s: s.update(lr=float("nan"), step=1),
    "step is 0, expected a count": lambda s: s.update(lr=1, step=0),
    "clip is 0.5, expected a float32 tensor": lambda s: s.update(lr=1, step=1, clip=0.5),
    "segments end at 9": lambda s: s.update(lr=1, step=1, segments=Segments.build([0], [9], s.master.device)),
    "segment 1 is": lambda s: s.update(lr=1, step=1, segments=Segments.build([0, 3], [4, 1], s.master.device)),
    "one size per offset": lambda s: s.update(lr=1, step=1, segments=Segments.build([0, 3], [4], s.master.device)),
    "expected 0 <= beta < 1": lambda s: s.update(lr=1, step=1, betas=(0.9, 1.0)),
    "weights are absent": lambda s: replace(s, weights=None).update(lr=1, step=1, rounding=StochasticRounding(1)),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_request_raises_one_sentence_and_updates_nothing(sentence: str) -> None:
    before = Shard.random(8)
    after = before.clone()
    with pytest.raises(ValueError, match=sentence):
        WRONG[sentence](after)
    for name, tensor in vars(before).items():
        assert_same_bits(getattr(after, name), tensor)
