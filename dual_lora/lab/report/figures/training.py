"""How training went, and what it cost: learning curves, and scores against step time and memory."""

import json
from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.comparison.floors import get_model_task
from dual_lora.lab.report.comparison.matches import Key
from dual_lora.lab.report.figures.layout import MAX_PANELS, add_legend, create_panels, equalize_spans, get_style
from dual_lora.lab.report.values import FIELDS, ModelTask, get_place, get_score
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of

# What is drawn over the steps: what the log calls it, and the axis.
LOSS, ZEROS = ("train/loss", "training loss"), ("train/zeros", "share of exact zeros")
COSTS = {"seconds_per_step": "seconds a step", "peak_memory_mib": "peak memory, MiB"}
MIN_STEPS = 3  # logged steps that make a curve


def draw_curves(outcomes: list[Outcome], what: tuple[str, str] = LOSS) -> Figure | None:
    """Return the training loss, or `what` else was logged, by step, a panel for each model and task: the mean over each
    label's runs, between the lowest and the highest run. None where no run logged several steps."""
    column, title = what
    frame = pd.DataFrame(
        [line for outcome in outcomes if outcome.result for line in iterate_logged_values(outcome, column)],
        columns=["model_task", "label", "run", "step", "value"],
    )
    steps = frame.groupby("model_task", sort=False)["step"].nunique()
    model_tasks = [key for key in dict.fromkeys(frame["model_task"]) if steps[key] >= MIN_STEPS][:MAX_PANELS]
    if not model_tasks:
        return None
    labels = list(dict.fromkeys(frame["label"]))
    figure, panels = create_panels(len(model_tasks), 2.1)
    for axes, model_task in zip(panels, model_tasks, strict=True):
        draw_curve_panel(axes, frame[frame["model_task"] == model_task], labels)
        axes.set(title=model_task[1] if len({model for model, _ in model_tasks}) == 1 else ", ".join(model_task))
    panels[0].set_ylabel(title)
    add_legend(figure, panels)
    return figure


def iterate_logged_values(outcome: Outcome, column: str) -> Iterator[dict[str, object]]:
    """Yield the values of a column of a run's log; none where the log is damaged or not as the run left it."""
    path = outcome.record.folder / "metrics.jsonl"
    try:
        outcome.record.verify_files(path.name)
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    except (OSError, ValueError, RecursionError, UserError):  # `find_unreadable` names it
        return
    where = {"model_task": get_model_task(outcome), "label": outcome.label, "run": outcome.record.name}
    rows = [line for line in lines if isinstance(line, dict)]
    logged = [row for row in rows if all(isinstance(row.get(key), int | float) for key in (column, "step"))]
    yield from (where | {"step": line["step"], "value": line[column]} for line in logged)


def draw_curve_panel(axes: Axes, part: pd.DataFrame, labels: list[str]) -> None:
    """Draw the curves of one model and task."""
    for label, runs in part.groupby("label", sort=False):
        color, by_step = get_style(labels.index(label))["color"], runs.groupby("step")["value"]
        mean = by_step.mean()
        axes.plot(mean.index, mean, color=color, linewidth=1.2, label=label)
        axes.fill_between(mean.index, by_step.min(), by_step.max(), color=color, alpha=0.12, linewidth=0)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def collect_costs(experiment: Experiment, outcomes: list[Outcome], unranked: Collection[ModelTask]) -> pd.DataFrame:
    """Return a row for each label and place with runs on every task that its model learned: its mean score and its
    costs, each a mean over tasks of means over seeds. Where no task was learned, all count."""
    finished = [outcome for outcome in outcomes if outcome.result]
    learned = [outcome for outcome in finished if get_model_task(outcome) not in unranked] or finished
    groups: dict[Key, list[dict[str, object]]] = {}
    for outcome in learned:
        place = (str(value) for value in get_place(experiment, outcome).values())
        groups.setdefault((outcome.label, outcome.settings.model.name, *place), []).append(measure_cost(outcome))
    wanted = {get_model_task(outcome) for outcome in learned}
    lines = []
    for (label, model, *_), some in groups.items():
        by_task = pd.DataFrame(some).groupby("task").mean()
        if {(model, task) for task in by_task.index} == {pair for pair in wanted if pair[0] == model}:
            lines.append({"label": label, **by_task.mean().to_dict()})
    return pd.DataFrame(lines, columns=["label", "score", *COSTS])


def measure_cost(outcome: Outcome) -> dict[str, object]:
    """Return a run's main score in points, and its costs; NaN where one was not measured."""
    task = load_task_of(outcome)
    costs = {name: FIELDS[name][0](outcome.result) for name in COSTS}
    return {"task": task.name, "score": get_score(task, outcome.result), **costs}


def draw_costs(frame: pd.DataFrame) -> Figure | None:
    """Return score against each cost of `collect_costs`, a dot for each row; None where there is nothing to compare."""
    drawn = [name for name in COSTS if frame[name].notna().any()]
    labels = list(dict.fromkeys(frame["label"]))
    if len(labels) < 2 or not drawn:
        return None
    figure, panels = create_panels(len(drawn), 2.3, columns=2)
    for axes, name in zip(panels, drawn, strict=True):
        for label, part in frame.groupby("label", sort=False):
            style = get_style(labels.index(label))
            axes.plot(part[name], part["score"], linestyle="", markersize=5, alpha=0.8, label=label, **style)
        high = np.nanmax(frame[name])
        axes.set(xlabel=COSTS[name], xlim=(0, 1.1 * high))
        axes.grid(alpha=0.3)
    equalize_spans(panels)
    panels[0].set_ylabel("mean score, points")
    add_legend(figure, panels)
    return figure
