"""`mics plan` and `mics simulate`: what they print, and that a wrong request is one sentence without a traceback."""

import json
import sys
from pathlib import Path

import pytest

from mics_core import Cluster
from mics_core.cli import main
from mics_core.planner import commands
from mics_core.planner.commands import counts
from mics_core.planner.named_model import NamedModel

TINY = ["--model", 'mics_models:gpt("byte-tiny")', "--cluster", "p4d.24xlarge:2", "--seq", "64", "--global-batch", "64"]


def replaced(name: str, value: str) -> list[str]:
    arguments = TINY.copy()
    arguments[arguments.index(name) + 1] = value
    return arguments


def test_plan_prints_a_table_advice_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "p4d.24xlarge, 2 nodes of 8" in out
    assert "TFLOP/s" in out
    assert "Use Sharding(2, 4, 16): one copy of the parameters lies on 2 ranks." in out
    settings = "model.name=byte-tiny sharding.params=2 sharding.grads=4 sharding.optimizer=16"
    assert f"--nproc-per-node 8 -m mics_models.pretrain {settings}" in out


def test_a_class_of_any_module_can_be_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = replaced("--model", "planned_for:Words()")
    assert main(["plan", *arguments, "--precision", "fp32", "--recompute", "off"]) == 0
    out = capsys.readouterr().out
    assert "train.py" in out
    assert "mics.shard(model, mics.Sharding(" in out


def test_a_model_in_a_file_of_this_folder_is_found_as_python_m_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one_of_mine.py").write_text(
        "from mics_models import gpt\n\ndef mine(*, name):\n    return gpt(name)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])  # as a script has it
    assert main(["plan", *replaced("--model", "one_of_mine:mine(name='byte-tiny')")]) == 0
    assert "mics.shard(model" in capsys.readouterr().out


def test_simulate_draws_a_step_lane_by_lane(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, trace = tmp_path / "step.png", tmp_path / "step.json"
    more = ["--nodes", "2,4", "--picture", str(picture), "--trace", str(trace)]
    assert main(["simulate", *TINY, *more]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"forward blocks.1", "hop 1 of blocks.1", "refresh of blocks.1"} <= names


def test_simulate_prints_curves(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = replaced("--model", 'mics_models:gpt("gpt2-124m")')
    assert main(["simulate", *arguments, "--nodes", "2,4,...,16", "--weak"]) == 0
    out = capsys.readouterr().out
    for word in ("mics", "ZeRO-3", "HSDP", "DDP", "16", "fits", "p4d.24xlarge, bf16", "predicted"):
        assert word in out


@pytest.mark.parametrize("out", ["absent/curves.png", "folder.png", "curves.exe", ""])
def test_a_picture_that_cannot_be_written_is_told_before_anything_is_played(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(commands, "_plan", lambda *_: pytest.fail("it plans"))
    assert main(["simulate", *TINY, "--nodes", "2,4", "--out", out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mics simulate failed: --out is ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("--model", 'mics_models:gpt("gpt-175b")', "use at least"),
        ("--model", "mics_models.gpt", "expected a module and a call"),
        ("--model", "mics_models:gpt(open('x'))", "expected a module and a call"),
        ("--model", "mics_models:gpt(name=open('x'))", "expected a module and a call"),
        ("--model", "mics_models:gpt(**{'name': '100b'})", "expected a module and a call"),
        ("--model", "mics_models:gpt(name='100b', name='175b')", "expected a module and a call"),
        ("--model", "mics_models:gpt({[]: 1})", "expected a module and a call"),
        ("--model", "no_such_module:gpt()", "cannot be imported"),
        ("--model", 'mics_models:gpt("gpt-99b")', "expected one of"),
        ("--model", "math:sqrt(4)", "expected a torch.nn.Module"),
        ("--model", "torch.nn:Linear(2, 2)", "plan it in a program, where mics.plan(..., sample=...)"),
        ("--cluster", "p9.huge:4", "p9.huge"),
        ("--cluster", "p4d.24xlarge:many", "number of nodes"),
        ("--global-batch", "65", "expected a multiple of the 16 ranks"),
        ("--seq", "4096", "expected at most context"),
        ("--seq", "9" * 20, "expected the tokens of a sample"),
        ("--global-batch", "1" + "0" * 400, "at most"),
        ("--cluster", "p4d.24xlarge:99999999", "expected at most 67108864"),
        ("--cluster", "p4d.24xlarge:" + "9" * 30, "number of nodes"),
    ],
)
def test_a_wrong_request_is_one_sentence(name: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *replaced(name, value)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mics plan failed: ")
    assert said in err
    assert err.count("\n") == 1


def test_what_a_model_says_of_its_arguments_is_the_last_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *replaced("--model", 'mics_models:gpt("7b")')]) == 1
    assert capsys.readouterr().err.endswith("llama3-70b: choose one\n")


def test_a_module_that_trains_when_it_is_imported_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trains_at_once.py").write_text("import mics_core\nmics_core.Sharding(2, 2, 4).resolve(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    assert main(["plan", *replaced("--model", "trains_at_once:Model()")]) == 1
    err = capsys.readouterr().err
    assert err.endswith('put its program behind `if __name__ == "__main__":`\n')
    assert err.count("\n") == 1


def test_a_cluster_file_with_a_missing_field_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.toml"
    Cluster.preset("p4d.24xlarge", 2).save(path)
    assert main(["plan", *replaced("--cluster", str(path))]) == 0
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("memory =")))
    capsys.readouterr()
    assert main(["plan", *replaced("--cluster", str(path))]) == 1
    err = capsys.readouterr().err
    assert "memory" in err
    assert str(path) in err
    assert err.count("\n") == 1


def test_expressions_and_numbers_of_nodes_are_read() -> None:
    named = NamedModel.parse('mics_models:gpt("100b", 2, deep=[True], name="x")')
    assert named == NamedModel("mics_models", "gpt", ("100b", 2), (("deep", [True]), ("name", "x")))
    assert str(named) == "mics_models:gpt('100b', 2, deep=[True], name='x')"
    assert NamedModel.parse("package.module:Model") == NamedModel("package.module", "Model")
    assert counts("2,4,8,...,64") == [2, 4, 8, 16, 32, 64]
    assert counts("6") == [6]
    for text in (
        "two",
        "2,...,8",
        "...,8",
        "8,2",
        "2,2",
        "0,2",
        "2,3,...,12",
        "8,4,...,64",
        "2,4,...,64,9",
        "4,8,...,8",
    ):
        with pytest.raises(ValueError, match="--nodes"):
            counts(text)
