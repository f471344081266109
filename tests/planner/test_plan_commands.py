"""`mics plan` and `mics simulate`: what they print, and that a wrong request is one sentence without a traceback."""

from pathlib import Path

import pytest

from mics_core import Cluster
from mics_core.cli import main
from mics_core.planner.commands import counts, parse

TINY = ["--model", 'mics_models:gpt("byte-tiny")', "--cluster", "p4d.24xlarge:2", "--seq", "64", "--global-batch", "64"]


def replaced(name: str, value: str) -> list[str]:
    arguments = TINY.copy()
    arguments[arguments.index(name) + 1] = value
    return arguments


def test_plan_prints_a_table_advice_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "p4d.24xlarge: 2 nodes of 8" in out
    assert "TFLOP/s" in out
    assert "Do not use MiCS" in out
    assert "--nproc-per-node 8 -m mics_models.pretrain model.name=byte-tiny sharding.params=1" in out


def test_a_class_of_any_module_can_be_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = replaced("--model", "planned_for:Words()")
    assert main(["plan", *arguments, "--precision", "fp32", "--recompute", "off"]) == 0
    out = capsys.readouterr().out
    assert "train.py" in out
    assert "mics.shard(model, mics.Sharding(" in out


def test_simulate_prints_curves(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = replaced("--model", 'mics_models:gpt("gpt2-124m")')
    assert main(["simulate", *arguments, "--nodes", "2,4,...,16", "--weak"]) == 0
    out = capsys.readouterr().out
    for word in ("mics", "ZeRO-3", "HSDP", "DDP", "16"):
        assert word in out


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("--model", 'mics_models:gpt("gpt-175b")', "use at least"),
        ("--model", "mics_models.gpt", "expected a module and a call"),
        ("--model", "mics_models:gpt(open('x'))", "expected a module and a call"),
        ("--model", "no_such_module:gpt()", "cannot be imported"),
        ("--model", 'mics_models:gpt("gpt-99b")', "expected one of"),
        ("--model", "math:sqrt(4)", "expected a torch.nn.Module"),
        ("--cluster", "p9.huge:4", "p9.huge"),
        ("--cluster", "p4d.24xlarge:many", "number of nodes"),
        ("--global-batch", "65", "expected a multiple of the 16 ranks"),
        ("--seq", "4096", "expected at most context"),
    ],
)
def test_a_wrong_request_is_one_sentence(name: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *replaced(name, value)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mics plan failed: ")
    assert said in err
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
    assert parse('mics_models:gpt("100b", 2)') == ("mics_models", "gpt", ["100b", 2])
    assert parse("package.module:Model") == ("package.module", "Model", [])
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
