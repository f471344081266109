"""The README's training program runs as it stands, on the four ranks that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.deep  # as users start it, with a launcher and four processes that import torch
def test_the_program_of_the_readme_trains_on_four_ranks(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [example for example in examples if "import mics_core" in example]
    program = tmp_path / "train.py"
    program.write_text(example)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *launcher, str(program)],
        env=env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (loss,) = re.findall(r"^loss ([0-9.]+),", run.stdout, re.M)
    assert float(loss) < 1.5, "an untrained model has 2"
    assert "Sent by this rank since reset()" in run.stdout
    for action in ("gather", "hop 1", "hop 2", "refresh"):
        assert f"\n{action} " in run.stdout
