"""What the kernels become, read off their machine code: no GPU is needed for that."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep

TARGETS = ["cuda:80", "cuda:90", "hip:gfx942"]
OPS = ("pack", "unpack", "accumulate", "square_sum", "adamw", "quantize", "dequantize")
LIMITS = {"cuda": 64, "hip": 80}
"""Registers a thread. NVIDIA's multiprocessors hold half of their threads at 64. AMD's SIMD units have 512 a lane: at
80 they hold six of eight waves."""
COMPILING = Path(__file__).with_name("compiling.py")


def compile_for(target: str) -> subprocess.CompletedProcess[str]:
    # Another Python: in this one TRITON_INTERPRET has turned the kernels into Python functions.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, COMPILING, target], env=environment, capture_output=True, text=True)


@cache
def compiled() -> dict[str, subprocess.CompletedProcess[str]]:
    with ThreadPoolExecutor(len(TARGETS)) as together:
        return dict(zip(TARGETS, together.map(compile_for, TARGETS), strict=True))


def reports(target: str) -> list[dict[str, int]]:
    result = compiled()[target]
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    names = [report["name"] for report in reports(target)]
    assert len(names) == len(set(names))
    assert {name.split()[0] for name in names} == set(OPS)
    assert len(names) > 40


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_out_of_the_registers(target: str) -> None:
    spilling = {r["name"]: (r["stack"], r["local"]) for r in reports(target) if r["stack"] or r["local"]}
    assert not spilling


@pytest.mark.parametrize("target", TARGETS)
def test_registers_leave_room_for_enough_threads(target: str) -> None:
    limit = LIMITS[target.split(":")[0]]
    assert not {r["name"]: r["registers"] for r in reports(target) if r["registers"] > limit}


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_blocks_move_in_accesses_of_128_bits(target: str) -> None:
    narrow = {
        r["name"]: r
        for r in reports(target)
        if r["wide loads"] < r["expected loads"] or r["wide stores"] < r["expected stores"]
    }
    assert not narrow
