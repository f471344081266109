"""What must hold for the repository as a whole: its imports, packages, file names, text and entry points."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
LONGEST_FILE = 350  # lines, in packages/; a light: split the file, or raise this and say why in docs/log.md
VAGUE_NAMES = {"utils", "helpers", "common", "misc", "manager"}
# Brackets keep each pattern from finding itself in this file.
ELSEWHERE = re.compile(r"pypi[.]org|python[h]osted|download[.]pytorch|[/](?:work|opt|root|home|Users)/\w")


def files_of_the_repository() -> list[Path]:
    """Every file that is committed, or would be by `git add --all`."""
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in map(ROOT.joinpath, names) if path.is_file()]  # the index keeps deleted files


def sources(package: Path) -> Path:
    return package / "src" / package.name.replace("-", "_")


def test_imports_keep_the_contracts(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_packages_are_typed_and_share_one_version() -> None:
    assert len(PACKAGES) == 3
    versions = {}
    for package in PACKAGES:
        assert (sources(package) / "py.typed").exists(), f"{package.name} has no py.typed"
        versions[package.name] = tomllib.loads((package / "pyproject.toml").read_text())["project"]["version"]
        text = (sources(package) / "__init__.py").read_text()
        versions[f"{package.name}.__version__"] = "".join(re.findall(r'^__version__ = "(.*)"$', text, re.M))
    assert len(set(versions.values())) == 1, versions


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = [path for path in files_of_the_repository() if path.stem.strip("_") in VAGUE_NAMES]
    assert not vague, f"name these for what they do: {vague}"


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    found = {}
    for path in files_of_the_repository():
        if match := ELSEWHERE.search(path.read_text(errors="replace")):
            found[str(path.relative_to(ROOT))] = match.group()
    assert not found


def test_files_of_the_packages_stay_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in ROOT.glob("packages/*/src/**/*.py")}
    long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert lengths
    assert not long


def test_help_explains_every_target() -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    explained = re.findall(r"^ +([a-z0-9-]+)  +[A-Z].*\.$", listed, re.M)
    assert "test" in targets
    assert explained == targets
