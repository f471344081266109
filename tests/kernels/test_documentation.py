"""What the documentation shows is run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mics_kernels

ROOT = Path(__file__).parents[2]
MODULES = sorted(m.name for m in pkgutil.walk_packages(mics_kernels.__path__, "mics_kernels."))


def test_the_examples_of_the_docstrings_give_what_they_show() -> None:
    results = {name: doctest.testmod(importlib.import_module(name), raise_on_error=False) for name in MODULES}
    assert not {name: result for name, result in results.items() if result.failed}
    assert sum(result.attempted for result in results.values()) > 10


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    blocks = [example for example in examples if "import mics_kernels" in example]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "triton: " in capsys.readouterr().out
