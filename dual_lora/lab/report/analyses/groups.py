"""What the tables of analyses share: runs that differ in the seed alone are one line, a mean with its interval."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from dual_lora.lab.present.document import MISSING
from dual_lora.lab.report.figures.layout import compute_half_interval


class Analysed(Protocol):
    """The analysis of one run: its model and task, and its row."""

    @property
    def place(self) -> tuple[str, str]: ...

    @property
    def label(self) -> str: ...


Run = TypeVar("Run", bound=Analysed)


def group_runs(runs: Iterable[Run]) -> dict[tuple[tuple[str, str], str], list[Run]]:
    """Return the runs by place and label, a run a seed."""
    groups: dict[tuple[tuple[str, str], str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.place, run.label), []).append(run)
    return groups


def name_place(place: tuple[str, str], runs: Iterable[Analysed]) -> dict[str, str]:
    """Return the first cells of a line; the model only where the runs are of several."""
    several = len({run.place[0] for run in runs}) > 1
    return ({"model": place[0]} if several else {}) | {"task": place[1]}


def format_mean(values: Sequence[float], style: str) -> str:
    """Return a mean over runs with half its interval; a dash where there is none or one is not known."""
    if not len(values) or np.isnan(values).any():
        return MISSING
    half = compute_half_interval(values)
    return format(float(np.mean(values)), style) + (f" ± {half:{style.lstrip('+')}}" if half else "")
