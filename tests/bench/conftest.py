"""Benchmarks are not a package that is installed: they are found from the root, from wherever pytest was started."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

if not torch.cuda.is_available():
    # As in tests/kernels, whose tests run in the same process: it is read when mics_kernels is first imported.
    os.environ["TRITON_INTERPRET"] = "1"
