"""What every test needs: a header that says which versions ran, and the meaning of the `gpu` mark."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pool import Pool

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT / "tests" / "ranks"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wheels", type=Path, help="test the wheels of this folder; default: build them")


def pytest_report_header() -> str:
    # Triton reads TRITON_INTERPRET when it is first imported, and tests choose it: import nothing here.
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "triton"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    git = ["git", "-c", f"safe.directory={ROOT}", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return ", ".join([*versions, f"commit {commit or 'unknown'}"])


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that are ranks: tests that need several share them, and the first one starts them."""
    from pool import Pool

    with Pool() as pool:
        yield pool


@pytest.fixture(autouse=True)
def _interpreter_for_kernels_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels' tests ask for Triton's interpreter when they are collected; in all others it would take minutes."""
    kernels = sys.modules.get("mics_kernels.backend")
    if request.path.parent.name in ("kernels", "bench") or kernels is None or not kernels.INTERPRETED:
        yield
        return
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    kernels.backend.cache_clear()
    yield
    kernels.backend.cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where two processes share the tests, one has all that need the pool of ranks; a file stays in one."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder = item.path.parent.name
        group = folder if folder == "bench" else str(item.path)
        pooled = "pool" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ranks" if pooled else group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
