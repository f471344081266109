"""What the tests of docs/migrating.md ask ranks to do: run its scripts and blocks as they stand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


def run(folder: Path, texts: Sequence[str]) -> list[str]:
    """Run them one after the other in one namespace, each with the same random numbers; what each printed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    said = []
    with chdir(folder), patch.object(dist, "init_process_group"):  # ranks of the pool have one
        for number, text in enumerate(texts):
            torch.manual_seed(0)
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(text, f"text {number} of docs/migrating.md", "exec"), names)
            said.append(printed.getvalue())
    return said
