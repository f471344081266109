"""A lane of the host does its jobs in their order, after the works they name, and none behind a failure."""

import threading
from types import SimpleNamespace

import pytest
import torch

from mics_core import LostRank, tell_failure
from mics_core.comm import first_cause, lanes
from mics_core.comm.lanes import HostLane, Work


def handed_in(lane: HostLane, done: list[str], *names: str) -> list[Work]:
    return [lane.submit("a job", lambda name=name: done.append(name)) for name in names]


def test_jobs_are_done_in_the_order_in_which_they_came() -> None:
    done: list[str] = []
    names = [str(number) for number in range(100)]
    handed_in(HostLane("a lane"), done, *names)[-1].wait()
    assert done == names


def test_a_job_waits_for_works_of_other_lanes() -> None:
    one, other = HostLane("one"), HostLane("other")
    done: list[str] = []
    open_gate = threading.Event()

    def behind_the_gate() -> None:
        assert open_gate.wait(600)
        done.append("first")

    first = one.submit("a job", behind_the_gate)
    second = other.submit("a job", lambda: done.append("second"), after=[first])
    assert not done
    open_gate.set()
    second.wait()
    assert done == ["first", "second"]


def test_whoever_waits_for_a_job_that_failed_hears_its_error() -> None:
    lane = HostLane("a lane")
    failed = lane.submit("a job", lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failed.wait()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RuntimeError("closed by peer"), LostRank), (torch.OutOfMemoryError("40 GB"), torch.OutOfMemoryError)],
)
def test_no_rank_is_blamed_for_what_this_ones_device_raises(error: Exception, kind: type[Exception]) -> None:
    def job() -> None:
        raise error

    with pytest.raises(kind) as raised:
        HostLane("a lane").submit("gather of blocks.1", job).wait()
    assert type(raised.value) is kind
    assert "gather of blocks.1" in "".join([str(raised.value), *getattr(raised.value, "__notes__", ())])


def test_a_process_that_an_error_ends_waits_for_no_lane_though_its_program_caught_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(lanes, "_host_lanes", [SimpleNamespace(close=waited.append)])
    monkeypatch.setattr(first_cause, "_failed", False)
    monkeypatch.delattr("sys.last_value", raising=False)
    lanes._finish_lanes()
    tell_failure(LostRank("nothing came from rank 1"))
    lanes._finish_lanes()
    assert waited == [600.0, 1.0]


def test_nothing_is_done_behind_a_failure() -> None:
    """Ranks tell messages apart by their order, so a job that is left out would give the next one its messages."""
    lane = HostLane("a lane")
    done: list[str] = []
    lane.submit("a job", lambda: 1 // 0)
    (later,) = handed_in(lane, done, "later")
    with pytest.raises(ZeroDivisionError):
        later.wait()
    assert not done


def test_a_job_whose_works_failed_is_not_done() -> None:
    done: list[str] = []
    failed = HostLane("one").submit("a job", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        HostLane("other").submit("a job", lambda: done.append("second"), after=[failed]).wait()
    assert not done
