from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import mics_kernels.ops.pack as pack_op
import mics_kernels.ops.unpack as unpack_op
from comparing import assert_same_bits, bits
from depth import draws
from mics_kernels import pack, tables, unpack

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
CARRIED = [torch.float8_e4m3fn, torch.complex64, torch.uint16]  # nothing converts these; equal dtypes only

sides = st.integers(0, 70) | st.sampled_from([1, 4096, 4097])


def values(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers that every dtype here can hold, special ones among the floats."""
    numbers = torch.randint(0, 100, (size,), dtype=torch.int64)
    if dtype.is_floating_point and dtype.itemsize > 1:
        numbers = torch.randn(size, dtype=torch.float64) * 10.0 ** torch.randint(-3, 4, (size,))
        if size > 3:
            numbers[:4] = torch.tensor([torch.inf, -0.0, torch.nan, 1e-40])
    return numbers.to(dtype).to(device)


@st.composite
def tensors(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype], overlapping: bool) -> torch.Tensor:
    """A tensor of up to about 9000 elements: contiguous, transposed, sliced, misaligned, or (as input) expanded."""
    dtype, device = draw(dtypes), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, columns = draw(sides), draw(st.integers(0, 3) | st.just(1))
    form = draw(st.sampled_from(["plain", "scalar", "transposed", "sliced", "misaligned", "deep", "expanded"]))
    if form == "scalar":
        return values(1, dtype, device).view(())
    if form == "transposed":
        return values(rows * columns, dtype, device).view(columns, rows).t()
    if form == "sliced":
        return values(rows * 2 * (columns + 1), dtype, device).view(rows * 2, columns + 1)[::2, 1:]
    if form == "misaligned":
        return values(rows * columns + 1, dtype, device)[1:].view(rows, columns)
    if form == "deep":
        rows = min(rows, 350)  # two blocks, as the interpreter takes a second for ten
        return values(rows * 12, dtype, device).view(2, rows, 3, 1, 2).permute(4, 2, 1, 3, 0)
    if form == "expanded" and overlapping:
        return values(columns, dtype, device).expand(rows, columns)
    return values(rows * columns, dtype, device).view(rows, columns)


@st.composite
def placements(draw: st.DrawFn, sizes: list[int]) -> tuple[list[int], int]:
    """Offsets in an order of their own, with and without gaps, and the buffer's length."""
    order = draw(st.permutations(range(len(sizes))))
    offsets, end = [0] * len(sizes), 0
    for number in order:
        end += draw(st.sampled_from([0, 0, 1, 16, 5000]))
        end = -(-end // 16) * 16 if draw(st.booleans()) else end
        offsets[number] = end
        end += sizes[number]
    return offsets, end + draw(st.sampled_from([0, 3]))


@st.composite
def cases(draw: st.DrawFn, overlapping: bool) -> tuple[list[torch.Tensor], torch.dtype, list[int], int, float]:
    """Tensors, the dtype and length of their buffer, where they lie in it, and a scale."""
    scale = draw(st.sampled_from([1.0, 1.0, 0.3]))
    known = FLOATS if scale != 1.0 else FLOATS + INTEGERS
    flat = draw(st.sampled_from(known + (CARRIED if scale == 1.0 else [])))
    # Out of range, float -> int is undefined in C and so differs between machines; truncation is tested below.
    compatible = [flat] if flat in CARRIED else known if flat.is_floating_point else INTEGERS
    if not flat.is_floating_point or not overlapping:
        compatible = [d for d in compatible if d.is_floating_point == flat.is_floating_point]
    members = draw(st.lists(tensors(st.sampled_from(compatible), overlapping), max_size=6))
    offsets, length = draw(placements([t.numel() for t in members]))
    return members, flat, offsets, length, scale


@draws(25, 200)
@given(cases(overlapping=True))
def test_packing_gives_the_bits_of_the_reference(
    case: tuple[list[torch.Tensor], torch.dtype, list[int], int, float],
) -> None:
    members, dtype, offsets, length, scale = case
    device = members[0].device if members else torch.device("cpu")
    dirty = values(length, dtype, device)
    expected, got = dirty.clone(), dirty.clone()
    pack_op.reference(members, expected, offsets, scale)
    pack(members, got, offsets, scale)
    assert_same_bits(got, expected)


@draws(25, 200)
@given(cases(overlapping=False))
def test_unpacking_gives_the_bits_of_the_reference(
    case: tuple[list[torch.Tensor], torch.dtype, list[int], int, float],
) -> None:
    members, dtype, offsets, length, scale = case
    flat = values(length, dtype, members[0].device if members else torch.device("cpu"))
    expected, got = [t.clone() for t in members], [t.clone() for t in members]
    unpack_op.reference(flat, expected, offsets, scale)
    unpack(flat, got, offsets, scale)
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@draws(12, 200)
@given(cases(overlapping=False))
def test_unpacking_what_was_packed_returns_it(
    case: tuple[list[torch.Tensor], torch.dtype, list[int], int, float],
) -> None:
    members, dtype, offsets, length, _ = case
    members = [t.to(dtype) for t in members]
    flat = values(length, dtype, members[0].device if members else torch.device("cpu"))
    pack(members, flat, offsets)
    returned = [torch.zeros_like(t) for t in members]
    unpack(flat, returned, offsets)
    for one, other in zip(returned, members, strict=True):
        assert_same_bits(one, other)


@draws(25, 200)
@given(cases(overlapping=True))
def test_the_reference_does_what_its_docstring_says(
    case: tuple[list[torch.Tensor], torch.dtype, list[int], int, float],
) -> None:
    members, dtype, offsets, length, scale = case
    device = members[0].device if members else torch.device("cpu")
    got = values(length, dtype, device)
    expected = torch.zeros(length, dtype=dtype, device=device)
    for tensor, offset in zip(members, offsets, strict=True):
        row = tensor.reshape(-1)
        if scale != 1.0:
            row = row.to(torch.promote_types(torch.promote_types(tensor.dtype, dtype), torch.float32)) * scale
        for number in range(min(len(row), 100)):  # one at a time, by nobody's vector code
            expected[offset + number] = row[number].to(dtype)
        expected[offset + 100 : offset + 100 + len(row[100:])] = row[100:].to(dtype)
    pack_op.reference(members, got, offsets, scale)
    assert_same_bits(got, expected)


@draws(12, 200)
@given(cases(overlapping=True), st.sampled_from([1.0, 0.5]))
def test_adding_is_the_reference_to_the_bit_and_the_sum_of_what_was_there(
    case: tuple[list[torch.Tensor], torch.dtype, list[int], int, float], scale: float
) -> None:
    members, dtype, offsets, length, _ = case
    dtype = dtype if dtype.is_floating_point and dtype in FLOATS else torch.float32
    members = [
        tensor
        if tensor.dtype in FLOATS
        else torch.view_as_real(tensor)[..., 0]
        if tensor.is_complex()
        else tensor.int().float()
        for tensor in members
    ]
    before = values(length, dtype, members[0].device if members else torch.device("cpu"))
    expected, got = before.clone(), before.clone()
    pack_op.reference(members, expected, offsets, scale, add=True)
    pack(members, got, offsets, scale, add=True)
    assert_same_bits(got, expected)
    exact = before.clone()
    for tensor, offset in zip(members, offsets, strict=True):
        there = exact[offset : offset + tensor.numel()]
        wide = torch.float64 if torch.float64 in (dtype, tensor.dtype) else torch.float32
        there.copy_(there.to(wide) + tensor.reshape(-1).to(wide) * scale)  # gaps stay as they are
    assert_same_bits(got, exact)


def test_floats_are_truncated_into_integers(device: torch.device) -> None:
    flat = torch.empty(6, dtype=torch.int32, device=device)
    pack(
        [torch.tensor([1.9, -1.9, 0.5], device=device), torch.tensor([7.0, -8.5, 0.0], device=device).bfloat16()],
        flat,
        [0, 3],
    )
    assert flat.tolist() == [1, -1, 0, 7, -8, 0]


def test_gaps_and_padding_are_zeroed_whatever_was_there(device: torch.device) -> None:
    flat = torch.full((20_000,), torch.nan, device=device)
    pack([torch.ones(5, device=device), torch.ones(5000, device=device)], flat, [3, 9000])
    assert flat.isfinite().all()
    assert flat.sum() == 5005
    assert flat.nonzero().flatten().tolist() == [*range(3, 8), *range(9000, 14000)]


def test_unpacking_touches_only_the_tensors(device: torch.device) -> None:
    memory = torch.full((100,), 7.0, device=device)
    unpack(torch.arange(50.0, device=device), [memory[10:20], memory[40:60].view(4, 5).t()], [0, 30])
    assert memory[:10].eq(7).all()
    assert memory[20:40].eq(7).all()
    assert memory[60:].eq(7).all()
    assert memory[10:20].tolist() == list(range(10))


@pytest.mark.parametrize("run", [pack, pack_op.reference], ids=["pack", "reference"])
def test_a_small_buffer_is_scaled_once_and_its_gaps_are_zero(run: Callable[..., None], device: torch.device) -> None:
    flat = torch.full((8,), 7.0, device=device)
    run([torch.ones(2, device=device), torch.full((3,), 2.0, device=device)], flat, [1, 4], 0.5)
    assert flat.tolist() == [0, 0.5, 0.5, 0, 1, 1, 1, 0]


def test_hundreds_of_tensors_take_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    original = pack_op.launch
    monkeypatch.setattr(pack_op, "launch", lambda *a, **k: (launches.append(a[0]), original(*a, **k)))
    sizes = [n % 37 for n in range(300)]
    members = [torch.full((size,), float(n), device=device) for n, size in enumerate(sizes)]
    offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1].tolist()
    flat = torch.empty(sum(sizes), device=device)
    pack(members, flat, offsets)
    assert len(launches) == 1
    assert_same_bits(flat, torch.cat(members))


def test_the_pointer_table_is_reused_while_tensors_stay_where_they_are(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, flat = [torch.randn(100, device=device) for _ in range(3)], torch.empty(300, device=device)
    pack(members, flat, [0, 100, 200])
    built = []
    original = torch._foreach_add_
    monkeypatch.setattr(torch, "_foreach_add_", lambda *a: (built.append(a), original(*a)))
    members[1].normal_()
    pack(members, flat, [0, 100, 200])
    assert not built
    assert_same_bits(flat, torch.cat(members))
    members[1] = members[1] + torch.randn(100, device=device)
    pack(members, flat, [0, 100, 200])
    assert len(built) == 1
    assert_same_bits(flat, torch.cat(members))


def test_tables_are_bounded_in_number(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "KEPT", 4)
    monkeypatch.setattr(tables, "_CONSTANTS", type(tables._CONSTANTS)())
    monkeypatch.setattr(tables, "_SCRATCH", type(tables._SCRATCH)())
    for size in range(1, 10):
        member, flat = torch.randn(size, device=device), torch.empty(size, device=device)
        pack([member], flat, [0])
        assert_same_bits(flat, member)
    assert len(tables._CONSTANTS) == 4
    assert len(tables._SCRATCH) == 4


def test_what_one_graph_reads_is_kept_when_another_captures_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, captured = torch.device("cpu"), {}
    monkeypatch.setattr(tables, "_CONSTANTS", type(tables._CONSTANTS)())
    monkeypatch.setattr(tables, "_CAPTURED", captured)
    for _ in range(2):
        table = tables.constant(cpu, "sizes", lambda: torch.zeros(1))
        monkeypatch.setattr(tables, "_capturing", lambda _: True)
        assert tables.constant(cpu, "sizes", lambda: torch.ones(1)) is table
        monkeypatch.setattr(tables, "_capturing", lambda _: False)
        tables._CONSTANTS.clear()  # as if others had taken its place
    assert len(captured) == 2


def test_a_buffer_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    far = 2**31 + 5
    flat = torch.empty(far + 5000, dtype=torch.uint8, device=device)  # two GiB that are never touched on a CPU
    flat[far:] = torch.arange(5000, device=device) % 251
    near, end = torch.zeros(5000, dtype=torch.uint8, device=device), torch.zeros(70, dtype=torch.float32, device=device)
    unpack(flat, [near[:4930], end], [far, far + 4930])
    assert_same_bits(near[:4930], flat[far : far + 4930])
    assert_same_bits(end, flat[far + 4930 :].float())


WRONG = {
    "one offset a tensor": lambda t, f: pack([t, t], f, [0]),
    "begin at 4, expected 5": lambda t, f: pack([t, t], f, [0, 4]),
    "inside the flat": lambda t, f: pack([t], f, [16]),
    r"lie at \[-1, 4\)": lambda t, f: pack([t], f, [-1]),
    "one contiguous dimension": lambda t, f: pack([t], f[::2], [0]),
    "shape \\(4, 5\\)": lambda t, f: pack([t], f.view(4, 5), [0]),
    "expected floating point on both sides": lambda t, f: pack([t.int()], f, [0], 0.5),
    "both sides of a scale or a sum": lambda t, f: pack([t.int()], f, [0], add=True),
    "expected the same dtype": lambda t, f: pack([t.to(torch.complex64)], f, [0]),
    "on meta, expected": lambda t, f: pack([t.to("meta")], f, [0]),
    "got one tensor, expected a sequence": lambda t, f: pack(t.view(1, 5), f, [0]),
    "leave out a gradient that is None": lambda t, f: pack([t, None], f, [0, 5]),
    "plain memory": lambda t, f: pack([t.to_sparse()], f, [0]),
    "unpack: tensor 1 would begin at 4": lambda t, f: unpack(f, [t, t], [0, 4]),
    "unpack: tensor 0 shares memory with itself": lambda t, f: unpack(f, [t[:1].expand(5)], [0]),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_request_raises_one_sentence_and_moves_nothing(sentence: str, device: torch.device) -> None:
    tensor, flat = torch.ones(5, device=device), torch.full((20,), 7.0, device=device)
    with pytest.raises(ValueError, match=sentence) as error:
        WRONG[sentence](tensor, flat)
    assert str(error.value).startswith(("pack: ", "unpack: "))
    assert bits(flat).equal(bits(torch.full((20,), 7.0, device=device)))
    assert tensor.eq(1).all()


def test_references_record_no_gradients_and_leave_gradient_mode_as_it_was() -> None:
    parameter, flat = torch.nn.Parameter(torch.ones(5)), torch.zeros(5)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            pack_op.reference([parameter], flat, [0])
            unpack_op.reference(flat, [parameter], [0])
            with pytest.raises(ValueError, match="inside the flat"):
                pack_op.reference([parameter], flat, [1])
            assert torch.is_grad_enabled() == enabled
    assert not flat.requires_grad
    assert parameter.is_leaf
