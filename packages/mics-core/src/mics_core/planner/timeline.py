"""A predicted step as a picture: a Chrome trace for chrome://tracing or ui.perfetto.dev, or lanes in a PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mics_core.errors import ConfigError
from mics_core.planner.engine import COMPUTE
from mics_core.planner.simulator import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"forward": "#7fb3d5", "backward": "#1b6ca8", "gather": "#e9b44c", "hop": "#d1495b", "refresh": "#8f5fa8"}
_OTHER = "#9aa5b1"


def write_trace(prediction: Prediction, path: Path | str) -> None:
    """Write the events as a Chrome trace, a thread for each lane, microseconds from the beginning of the step."""
    lanes = _lanes(prediction)
    threads = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": lane}}
        for number, lane in enumerate(lanes)
    ]
    spans: list[dict[str, Any]] = [
        {
            "ph": "X",
            "name": event.name,
            "pid": 0,
            "tid": lanes.index(event.lane),
            "ts": 1e6 * event.begin,
            "dur": 1e6 * (event.end - event.begin),
        }
        for event in prediction.events
    ]
    Path(path).write_text(json.dumps({"traceEvents": [*threads, *spans], "displayTimeUnit": "ms"}))


def draw(prediction: Prediction, path: Path | str) -> None:
    """Draw the lanes of the step one below the other; needs matplotlib."""
    figure = new_figure(9, 1.2 + 0.5 * len(_lanes(prediction)))
    axes = figure.add_subplot()
    lanes = _lanes(prediction)
    for event in prediction.events:
        axes.barh(
            lanes.index(event.lane),
            event.end - event.begin,
            left=event.begin,
            color=_COLOURS.get(event.name.split()[0], _OTHER),
            edgecolor="white",
            linewidth=0.3,
        )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds; {prediction.seconds:.3g} a step, links are waited for in {prediction.exposed:.3g}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, without pyplot, which keeps figures; raises if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture was asked for, but matplotlib is not installed: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _lanes(prediction: Prediction) -> list[str]:
    found = dict.fromkeys(event.lane for event in prediction.events)
    return [COMPUTE, *(lane for lane in found if lane != COMPUTE)]
