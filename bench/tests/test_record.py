import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bench.harness import Ratio
from bench.record import ROOT, commit, folder, machine, save, stamp, table


def test_a_record_says_which_command_commit_and_machine(tmp_path: Path) -> None:
    words = ["python", "-m", "bench.x", "--out", str(tmp_path)]
    path = save(tmp_path / "deep" / "name.json", stamp(words, "cpu") | {"ratio": Ratio(1.0, 0.123456, 2.0)})
    record = json.loads(path.read_text())
    assert record["command"] == f"python -m bench.x --out {tmp_path.name}"
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["device"]
    assert set(record["commit"]) == {"hash", "dirty"}
    assert record["ratio"] == {"value": 1.0, "low": 0.12346, "high": 2.0}
    assert list(path.parent.iterdir()) == [path]


def test_a_record_is_json_that_everybody_reads(tmp_path: Path) -> None:
    path = save(tmp_path / "name.json", {"bad": math.nan, "list": (1, None, True, "text")})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"bad": "nan", "list": [1, None, True, "text"]}


def test_a_record_does_not_say_where_this_machine_keeps_its_files(tmp_path: Path) -> None:
    said = [f"{ROOT}/bench/x.py:1: wrong", f"in {sys.prefix}/lib/torch.py", f"{Path.home()}/.triton/cache"]
    text = save(tmp_path / "name.json", {"error": said}).read_text()
    assert "./bench/x.py:1: wrong" in text
    for place in (ROOT, sys.prefix, Path.home()):
        assert f"{place}/" not in text


def test_a_save_that_is_cut_short_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = save(tmp_path / "name.json", {"figure": 1}), Path.write_text

    def write_half(self: Path, text: str) -> None:
        write(self, text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space"):
        save(path, {"figure": 2})
    assert json.loads(path.read_text()) == {"figure": 1}


def test_a_tree_without_git_has_the_commit_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit("abc").hash == "abc"
    assert commit().hash == "unknown"
    assert commit().dirty is None


@pytest.mark.parametrize(
    ("name", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("AMD MI300X", "amd-mi300x")],
)
def test_results_of_a_gpu_lie_under_its_short_name(name: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert folder("cuda") == short
    assert folder("cpu") == "cpu"


def test_no_name_of_this_machine_or_its_user_is_recorded() -> None:
    assert not {"node", "host", "hostname", "user", "path"} & set(vars(machine()))


def test_tables_are_markdown() -> None:
    lines = table(["op", "us"], [["pack", "1.5"], ["a|longer\nname", "10"]]).splitlines()
    assert lines == [
        "| op            |  us |",
        "| ------------- | --: |",
        "| pack          | 1.5 |",
        "| a/longer name |  10 |",
    ]
