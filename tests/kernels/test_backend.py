import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import forks
import mics_kernels.ops.pack as pack_op
import mics_kernels.ops.unpack as unpack_op
from mics_kernels import accumulate, backend, pack, unpack
from mics_kernels.backend import INTERPRETED

ASK = "from mics_kernels import backend; print(*backend('cpu'), sep=': ')"
PROGRAMS = {
    "ask": ASK,
    "ask the interpreter": f"import os; os.environ['TRITON_INTERPRET'] = '1'\n{ASK}",
    "no Triton": f"""
import sys
assert "triton" not in sys.modules
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
{ASK}
import torch, mics_kernels as k
flat = torch.empty(4)
k.pack([torch.ones(2)], flat, [1])
k.accumulate(flat, [flat.clone()])
k.adamw(flat, *torch.zeros(3, 4).unbind(), lr=0.1, step=1)
print(k.square_sum(flat).sum.item() > 0, k.dequantize(*k.quantize(flat)).shape)
""",
    "a broken Triton": """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'its_dependency'", name="its_dependency")
sys.meta_path.insert(0, Broken())
try:
    import mics_kernels
except ModuleNotFoundError as error:
    print(error.name)
""",
}


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """The lines that each program prints."""
    done = forks.run(PROGRAMS, "torch", TRITON_INTERPRET="0")
    assert not [each for each in done.values() if each.status], done
    return {name: each.stdout.splitlines() for name, each in done.items()}


def test_cpu_tensors_go_to_the_reference_and_the_user_is_told_why(said: dict[str, list[str]]) -> None:
    assert said["ask"] == ["reference: Triton compiles for GPUs and these tensors are on the CPU"]


def test_the_interpreter_runs_kernels_where_it_is_asked_to(said: dict[str, list[str]]) -> None:
    assert said["ask the interpreter"][0].startswith("triton: TRITON_INTERPRET=1 asks for")


def test_without_triton_everything_runs_on_the_reference(said: dict[str, list[str]]) -> None:
    assert said["no Triton"] == ["reference: Triton is not installed", "True torch.Size([4])"]


def test_a_broken_triton_is_an_error_and_no_silent_fallback(said: dict[str, list[str]]) -> None:
    assert said["a broken Triton"] == ["its_dependency"]


def test_these_tests_run_the_kernels(device: torch.device) -> None:
    assert backend(device).is_triton
    assert (device.type == "cpu") == INTERPRETED
    flat = torch.empty(3, device=device)
    pack([torch.ones(3, device=device)], flat, [0])
    assert flat.sum() == 3


def test_parameters_are_memory_like_any_other(device: torch.device) -> None:
    for pack_, unpack_ in ((pack, unpack), (pack_op.reference, unpack_op.reference)):
        weights = [
            torch.nn.Parameter(torch.randn(8, 8, device=device)),
            torch.nn.Parameter(torch.ones(5, device=device)),
        ]
        flat = torch.nn.Parameter(torch.empty(69, device=device))
        pack_(weights, flat, [0, 64])
        unpack_(flat, weights, [0, 64])
        assert all(weight.grad_fn is None and weight.is_leaf for weight in [*weights, flat])
        assert flat[64:].eq(1).all()


def test_threads_may_launch_at_once() -> None:
    """The runtime sums what arrived on a thread of its own, while the training packs gradients on another."""
    whole = torch.arange(2000, dtype=torch.float32)
    results = [torch.empty(2000) for _ in range(4)]

    def add(acc: torch.Tensor) -> None:
        for _ in range(3):
            accumulate(acc, [whole, whole], overwrite=True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within a kernel
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(add, results))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(acc, 2 * whole) for acc in results)
