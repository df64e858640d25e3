"""What the tables of analyses share: runs that differ only in the seed are one line, a mean with its interval."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from dual_lora.lab.present.document import MISSING
from dual_lora.lab.report.comparison.floors import ModelTask
from dual_lora.lab.report.figures.layout import compute_half_interval


class Analysed(Protocol):
    """The analysis of one run: its model and task, and its row."""

    @property
    def model_task(self) -> ModelTask: ...

    @property
    def label(self) -> str: ...


AnalysedT = TypeVar("AnalysedT", bound=Analysed)


def group_runs(runs: Iterable[AnalysedT]) -> dict[tuple[ModelTask, str], list[AnalysedT]]:
    """Return the runs by model and task, and by label: a run a seed."""
    groups: dict[tuple[ModelTask, str], list[AnalysedT]] = {}
    for run in runs:
        groups.setdefault((run.model_task, run.label), []).append(run)
    return groups


def name_model_task(model_task: ModelTask, runs: Iterable[Analysed]) -> dict[str, str]:
    """Return the first cells of a line; the model only where the runs are of several."""
    model, task = model_task
    several = len({run.model_task[0] for run in runs}) > 1
    return ({"model": model} if several else {}) | {"task": task}


def format_mean(values: Sequence[float], style: str) -> str:
    """Return a mean over runs with half its interval; a dash where there is none or one is not known."""
    if not len(values) or np.isnan(values).any():
        return MISSING
    half = compute_half_interval(values)
    return format(float(np.mean(values)), style) + (f" ± {half:{style.lstrip('+')}}" if half else "")
