"""The faults that `make mutants` plants fit the code as it stands."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mutants"))

from faults import ROOT, Fault, read

FAULTS = read()


def test_every_faults_text_stands_once_in_its_file_and_its_tests_are_there() -> None:
    assert not [trouble for fault in FAULTS if (trouble := fault.trouble())]


def test_there_are_enough_faults_and_few_that_no_test_finds() -> None:
    assert len(FAULTS) >= 60
    assert len({(fault.file, fault.text, fault.instead) for fault in FAULTS}) == len(FAULTS)
    assert sum(bool(fault.missed) for fault in FAULTS) <= len(FAULTS) // 30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "what stands nowhere"}, "0 times, expected once"),
        ({"file": "packages/gone.py"}, "packages/gone.py is not there"),
        ({"instead": FAULTS[0].text}, "changes nothing"),
        ({"tests": ("tests/gone.py",)}, "expected tests that are there"),
    ],
)
def test_an_entry_that_does_not_fit_is_told(change: dict[str, object], words: str) -> None:
    fault = Fault(**(vars(FAULTS[0]) | change))  # type: ignore[arg-type]
    assert words in fault.trouble(ROOT)
