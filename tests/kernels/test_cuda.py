"""What only a GPU can show: graphs, streams, no host sync, no allocation, and buffers too large for anything else."""

from collections.abc import Callable, Iterator

import pytest
import torch

from comparing import assert_same_bits
from mics_kernels import Segments, accumulate, adamw, dequantize, pack, quantize, square_sum, unpack
from mics_kernels.ops.quantize import Quantized

pytestmark = pytest.mark.gpu

SIZE = 100_000


class Step:
    """Every op of an optimizer step on buffers that stay where they are, results and settings in device memory."""

    def __init__(self) -> None:
        def make(size: int = SIZE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(size, device="cuda").to(dtype)

        self.gradients = [make(n, torch.bfloat16) for n in (1, 4096, 33_333, 50_000)]
        self.offsets = [0, 16, 4112, 40_000]
        self.bucket, self.acc, self.pair = make(dtype=torch.bfloat16), make(), make(2)
        self.returned = [torch.empty_like(g) for g in self.gradients]
        self.state = [make(), make(), make().square(), make(dtype=torch.bfloat16)]
        self.numbers = {name: torch.tensor(n, device="cuda") for name, n in (("lr", 0.1), ("step", 1.0), ("clip", 0.5))}
        self.segments = Segments.build([0, 16, 4112, 40_000], [1, 4096, 33_333, 50_000], "cuda")
        scales = torch.empty(-(-SIZE // 256), device="cuda")
        self.quantized = Quantized(torch.empty(SIZE, dtype=torch.int8, device="cuda"), scales)
        self.restored = make()

    def run(self) -> None:
        pack(self.gradients, self.bucket, self.offsets, 0.5)
        unpack(self.bucket, self.returned, self.offsets)
        accumulate(self.acc, [self.bucket, self.bucket], 0.25, overwrite=True)
        square_sum(self.acc, self.pair)
        quantize(self.acc, out=self.quantized)
        dequantize(*self.quantized, self.restored)
        master, exp_avg, exp_avg_sq, weights = self.state
        adamw(
            *(master, exp_avg, exp_avg_sq, self.acc, weights),
            **self.numbers,
            weight_decay=self.numbers["lr"],
            segments=self.segments,
            zero_grad=True,
        )

    def memory(self) -> list[torch.Tensor]:
        return [self.bucket, self.acc, self.pair, *self.returned, *self.state, *self.quantized, self.restored]


def test_a_graph_replays_what_was_captured_with_what_the_memory_holds_then() -> None:
    step = Step()
    step.run()  # tables that depend on sizes alone must be there before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    start = [t.clone() for t in step.memory()]
    for gradient in step.gradients:
        gradient.normal_()
    step.run()
    torch.cuda.synchronize()
    expected = [t.clone() for t in step.memory()]
    for tensor, value in zip(step.memory(), start, strict=True):
        tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for tensor, value in zip(step.memory(), expected, strict=True):
        assert_same_bits(tensor, value)


def test_a_graph_records_the_addresses_of_tensors_that_it_meets_first() -> None:
    flat, offsets = torch.empty(3000, device="cuda"), [0, 1000, 2000]
    seen, fresh = ([torch.randn(1000, device="cuda") for _ in offsets] for _ in range(2))
    pack(seen, flat, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack(fresh, flat, offsets)
    flat.zero_()
    graph.replay()
    assert_same_bits(flat, torch.cat(fresh))


def test_a_capture_without_a_first_call_says_what_to_do() -> None:
    tensor, flat = torch.randn(12_345, device="cuda"), torch.empty(12_345, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="call it once before the capture"), torch.cuda.graph(graph):
        pack([tensor], flat, [0])


@pytest.fixture
def syncs_are_errors() -> Iterator[Callable[[str], None]]:
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def test_the_steady_state_neither_waits_for_the_gpu_nor_allocates(syncs_are_errors: Callable[[str], None]) -> None:
    step = Step()
    step.run()
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    syncs_are_errors("error")
    for _ in range(3):
        step.run()
    syncs_are_errors("default")
    # square_sum hands out two views of the pair it was given; nothing here takes memory.
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


def test_new_addresses_cost_no_host_sync_either(syncs_are_errors: Callable[[str], None]) -> None:
    flat = torch.empty(3000, device="cuda")
    kept = []
    pack([torch.randn(1000, device="cuda") for _ in range(3)], flat, [0, 1000, 2000])
    torch.cuda.synchronize()
    syncs_are_errors("error")
    for _ in range(5):
        kept.append([torch.randn(1000, device="cuda") for _ in range(3)])
        pack(kept[-1], flat, [0, 1000, 2000])
    syncs_are_errors("default")
    assert_same_bits(flat, torch.cat(kept[-1]))


def test_two_streams_do_not_share_scratch_memory() -> None:
    buffers = [torch.randn(3_000_000, device="cuda") for _ in range(2)]
    alone = [square_sum(b).sum.clone() for b in buffers]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for stream, buffer, found in zip(streams, buffers, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(square_sum(buffer).sum)
    torch.cuda.synchronize()
    for found, expected in zip(results, alone, strict=True):
        for value in found:
            assert_same_bits(value, expected)


def test_many_launches_give_the_same_bits() -> None:
    # A race between the last program and the others' partial sums would show here, now and then.
    flat = torch.randn(20_000_000, device="cuda")
    first = square_sum(flat).sum
    pairs = torch.empty(300, 2, device="cuda")
    for pair in pairs:
        square_sum(flat, pair)
    assert pairs[:, 0].eq(first).all()
    assert pairs[:, 1].eq(0).all()
    torch.testing.assert_close(first.double(), flat.double().square().sum(), rtol=1e-6, atol=0)


FAR = 2**31 + 4096 * 3 + 5


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 100 * 2**30, reason="needs a GPU of 100 GiB"
)
def test_flat_buffers_of_more_than_two_to_the_31_elements() -> None:
    flat = torch.full((FAR,), 3.0, dtype=torch.bfloat16, device="cuda")
    tail = torch.arange(5000, device="cuda").remainder(100).bfloat16()
    pack([tail[:10], tail], flat, [0, FAR - 5000])
    assert flat[:10].equal(tail[:10])
    assert flat[10 : FAR - 5000].count_nonzero() == 0
    assert flat[FAR - 5000 :].equal(tail)
    back = [torch.empty_like(tail)]
    unpack(flat, back, [FAR - 5000])
    assert back[0].equal(tail)
    assert square_sum(flat).sum == tail[:10].float().square().sum() + tail.float().square().sum()

    acc = torch.empty(FAR, device="cuda")
    accumulate(acc, [flat], 2.0, overwrite=True)
    assert acc[FAR - 5000 :].equal(2 * tail.float())
    assert acc[10 : FAR - 5000].count_nonzero() == 0

    acc[FAR - 1] = 99.0
    values, scales = quantize(acc)
    flat.fill_(7.0)
    dequantize(values, scales, flat)
    torch.testing.assert_close(flat[FAR - 5000 :].float(), acc[FAR - 5000 :], rtol=0.01, atol=1.0)
    assert flat[10 : FAR - 6000].count_nonzero() == 0
    del values, scales

    moments = torch.zeros(2, FAR, device="cuda")
    master = torch.ones(FAR, device="cuda")
    adamw(master, moments[0], moments[1], acc, flat, lr=0.5, step=1, weight_decay=0.0)
    expected = torch.where(acc != 0, 0.5, 1.0)
    assert expected.sub_(master).abs_().max() < 1e-5
    assert flat.equal(master.bfloat16())
