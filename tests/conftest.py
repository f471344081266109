"""What every test needs: a header that says which versions ran, how deep to go, what runs on GPUs, and the marks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import depth

if TYPE_CHECKING:
    from pool import Pool

ROOT = Path(__file__).parents[1]
POOL: pytest.StashKey[Pool] = pytest.StashKey()
PLACE = "ranks ran on"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deep", action="store_true", help="run everything, with more and new draws")
    parser.addoption("--patience", type=float, default=300.0, help="seconds after which ranks count as hung")
    parser.addoption("--gpus", type=int, help="how many GPUs ranks may compute on; default: all of this machine")
    parser.addoption("--no-sharing", action="store_true", help="more ranks than GPUs run on the CPU")
    parser.addoption("--wheels", type=Path, help="test the wheels of this folder; default: build them")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    depth.choose(config.getoption("--deep"))
    if not torch.cuda.is_available():
        # Read when the kernels are defined, so before mics_kernels is imported, by whichever test comes first.
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header() -> str:
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
def pool(pytestconfig: pytest.Config) -> Iterator[Pool]:
    """Processes that are ranks: tests that need several share them, and the first one starts them."""
    import torch

    from placing import visible
    from pool import Pool

    count = pytestconfig.getoption("--gpus")
    gpus = visible(torch.cuda.device_count() if count is None else count)
    patience, sharing = pytestconfig.getoption("--patience"), not pytestconfig.getoption("--no-sharing")
    with Pool(patience=patience, gpus=gpus, sharing=sharing) as pool:
        pytestconfig.stash[POOL] = pool
        yield pool


@pytest.fixture(autouse=True)
def _ranks_where_a_test_wants_them(request: pytest.FixtureRequest) -> None:
    if "pool" in request.fixturenames:
        pool = request.getfixturevalue("pool")
        pool.only_cpus = request.node.get_closest_marker("cpu_ranks") is not None
        pool.used.clear()


@pytest.fixture(autouse=True)
def _gpu_for_few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU, too, tests in this process and programs that they start compute on the CPU, but in two folders.

    Ranks of the pool have what the pool gives them.
    """
    if request.path.parent.name not in ("kernels", "gpu"):
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def _interpreter_for_kernels_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter is for the kernels' own tests; in all others it would take minutes."""
    if request.path.parent.name == "kernels":
        yield
        return
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of programs that the test starts, too
    kernels = sys.modules.get("mics_kernels.backend")
    if kernels is None or not kernels.INTERPRETED:
        yield
        return
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    kernels.backend.cache_clear()
    yield
    kernels.backend.cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `deep`, unless it is asked for; one process of tests has all that need ranks."""
    for item in items:
        # Two pools at once would slow each other down: a collective waits until all of its ranks have had a core.
        # What else a file's tests share is made once.
        group = "ranks" if "pool" in getattr(item, "fixturenames", ()) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    if config.getoption("--deep"):
        return
    left_out = [item for item in items if item.get_closest_marker("deep")]
    items[:] = [item for item in items if not item.get_closest_marker("deep")]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note where ranks ran, for the report that another process may read."""
    if call.when == "call" and POOL in item.config.stash and "pool" in getattr(item, "fixturenames", ()):
        pool = item.config.stash[POOL]
        item.user_properties += [(PLACE, place.called(len(pool.gpus))) for place in pool.used]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran ranks on what."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "when")]
    noted = [note for report in reports if report.when == "call" for note in report.user_properties]
    found = Counter(said for key, said in noted if key == PLACE)
    if found:
        tests = ", ".join(f"{count} tests on {place}" for place, count in sorted(found.items()))
        terminalreporter.write_line(f"ranks: {tests}")
