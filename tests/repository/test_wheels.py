"""Each package builds a wheel that installs and imports in an empty environment, without the network."""

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.deep  # `make dist` runs these, too

MODULES = {"mics-kernels": "mics_kernels", "mics-core": "mics_core", "mics-models": "mics_models"}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheels(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each package: those of --wheels, or built now."""
    folder: Path | None = pytestconfig.getoption("--wheels")
    if folder is None:
        folder = tmp_path_factory.mktemp("wheels")
        for name in MODULES:
            build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
            run(*build, ROOT / "packages" / name)
    return {name: next(folder.glob(f"{module}-*.whl")).absolute() for name, module in MODULES.items()}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.mark.parametrize("name", MODULES)
def test_wheel_carries_types_and_licence(name: str, wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels[name]) as archive:
        names = archive.namelist()
        licence = next(archive.read(n) for n in names if n.endswith("/licenses/LICENSE"))
    assert f"{MODULES[name]}/py.typed" in names
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("name", MODULES)
def test_wheel_asks_for_what_it_imports(name: str, wheels: dict[str, Path]) -> None:
    wanted = {r.name: r for r in map(Requirement, metadata(wheels[name]).get_all("Requires-Dist", []))}
    always = {key for key, r in wanted.items() if "extra" not in str(r.marker)}
    own = {"mics-kernels": {"triton"}, "mics-core": {"mics-kernels", "safetensors"}, "mics-models": {"einops"}}[name]
    assert always == {"torch"} | own
    assert list(wanted["torch"].specifier.filter(["2.10.0", "2.11.0", "2.13.0"])) == ["2.11.0", "2.13.0"]
    if name == "mics-kernels":
        triton = wanted["triton"]
        assert list(triton.specifier.filter(["3.5.1", "3.6.0", "3.9.9", "3.10.0"])) == ["3.6.0", "3.9.9"]
        assert not triton.marker.evaluate({"sys_platform": "darwin"})
    version = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]["version"]
    for sibling in wanted.keys() & MODULES.keys():
        assert str(wanted[sibling].specifier) == f"=={version}"


def test_wheels_install_and_import_in_an_empty_environment(wheels: dict[str, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    run(*install, *wheels.values())
    # torch comes from the environment that runs this test. A .pth file appends that folder to the path and
    # ignores the .pth files inside it, which are those of the editable packages: the wheels are imported.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    for module in MODULES.values():
        code = f"import {module}; print({module}.__file__)"
        origin = run(python, "-I", "-W", "error", "-c", code, cwd=tmp_path)
        assert Path(origin.strip()).is_relative_to(site)
    assert "DGX-H100" in run(python, "-I", "-c", "from mics_core.cli import main; main(['cluster'])", cwd=tmp_path)
