"""The command `mics` itself: its version, the clusters it knows, a reader that leaves, and what files refuse."""

import os
from pathlib import Path

import pytest
from torch import nn

import mics_core as mics
from mics_core import Cluster
from mics_core.cli import main
from mics_core.planner import presets


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"mics {mics.__version__}\n"


def test_known_clusters_are_listed_and_printed_as_files_that_plans_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster"]) == 0
    listed = capsys.readouterr().out
    for known in map(Cluster.preset, presets.NAMES):
        assert known.name in listed
        assert main(["cluster", f"{known.name}:3"]) == 0
        (tmp_path / "cluster.toml").write_text(capsys.readouterr().out)
        assert Cluster.load(tmp_path / "cluster.toml") == known.with_nodes(3)
    assert main(["cluster", "DGX"]) == 1
    assert "perhaps 'DGX-H100'" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_the_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:  # its end is what Python does last, and must not raise either
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["cluster"]) == 141
    assert capsys.readouterr().err == ""


def test_what_a_file_refuses_is_one_sentence_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mics.save(tmp_path / "run" / "step-1", mics.shard(nn.Sequential(nn.Linear(2, 2)), mics.Sharding.ddp()), None)
    (tmp_path / "file").write_text("")
    for out, *more in (("file/model.safetensors",), ("file/model.pt",), ("model.safetensors", "--shard-bytes", "-5")):
        assert main(["export", str(tmp_path / "run" / "step-1"), str(tmp_path / out), *more]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "[Errno" not in err
        assert "expected at least 1" in err if more else f"{tmp_path / 'file'}" in err
    assert not list(tmp_path.glob("*model*"))


def test_a_clusters_file_is_read_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.toml"
    text = Cluster.preset("DGX-H100").toml()
    ran = tmp_path / "ran"
    for value in (f"__import__('pathlib').Path('{ran}').touch()", f"!!python/object/apply:os.mkdir ['{ran}']"):
        for written in (value, f'"{value}"'):
            path.write_text(text.replace("nodes = 1", f"nodes = {written}", 1))
            assert main(["cluster", str(path)]) == 1
            assert "cluster.toml" in capsys.readouterr().err
    assert not ran.exists()
