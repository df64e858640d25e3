"""`sweep.py plan=true`: a plan for every run of a table, and the total for each table.

Runs that differ in seed, rate or length take the same step, which is planned once (`reduce_to_cost_settings`). Every
run, those that choose learning rates included, has a row in runs/STUDY/plan.csv, where STUDY is that of the report, or
in another file there, see `choose_plan_file`.
"""

import gc
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dual_lora.lab.config import paths
from dual_lora.lab.config.schema import Settings, get_setting
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import EXIT_OK, EXIT_USER, UserError, choose_exit_code, get_first_line
from dual_lora.lab.present.units import GB
from dual_lora.lab.study.experiment import Cell, Experiment
from dual_lora.lab.study.listing import format_rows
from dual_lora.lab.study.output_path import choose_path
from dual_lora.lab.system.files import translate_write_errors, write_text
from dual_lora.lab.system.libraries import import_heavy_libraries, silence_libraries
from dual_lora.lab.system.lock import hold_lock

REPORTED, CHOOSES = "reported", "chooses a rate"


def plan_experiments(composed: list[tuple[Experiment, list[Cell]]]) -> int:
    """Plan every run of the experiments, print a table for each, and return the exit code.

    Raises:
        UserError: a file cannot be written, or plan=true is not set for all.
    """
    with import_heavy_libraries():
        silence_libraries()
    known: dict[str, dict[str, Any]] = {}
    codes = [plan_experiment(experiment, cells, known) for experiment, cells in composed]
    return choose_exit_code(codes)


def plan_experiment(experiment: Experiment, cells: list[Cell], known: dict[str, dict[str, Any]]) -> int:
    """Plan every run of one experiment. known: the plans of a step made so far."""
    rows = pd.DataFrame([plan_row(experiment, *job, known) for job in list_jobs(cells)])
    folder = paths.RUNS / experiment.find_report_study(cells[0].settings.study)
    with hold_lock(folder, wait=True), translate_write_errors(folder):
        text = rows.to_csv(index=False)
        file = choose_plan_file(experiment, folder, text)
        write_text(file, text)
    print(f"\n{format_plan_table(experiment, rows)}\nwritten: {file}")
    return EXIT_USER if (rows["refused"] != "").any() else EXIT_OK


def choose_plan_file(experiment: Experiment, folder: Path, text: str) -> Path:
    """Return the file in a study's folder that a plan is written to: `plan.csv`, or `plan_NAME_SCALE.csv` where that is
    another experiment's. A plan with runs that this one leaves out, because the command line chose some, is left alone:
    then it is `plan_selection.csv`. text: of the new plan."""
    places = read_planned_places(experiment, io.StringIO(text))
    return choose_path(
        lambda ending: folder / f"plan{ending}.csv",
        experiment,
        find_plan_owner,
        lambda file: bool(read_planned_places(experiment, file) - places),
    )


def find_plan_owner(file: Path) -> tuple[str, str] | None:
    """Return the name and the scale of the experiment that a file is the plan of; None if it is none."""
    return next(iter(read_columns(file, ["experiment", "scale"])), None)


def read_planned_places(experiment: Experiment, plan: Path | io.StringIO) -> set[tuple[str, ...]]:
    """Return the places of a plan's runs: what heads their row and column, and the seed. Another rate or machine is the
    same place."""
    return read_columns(plan, ["model", "task", "label", "purpose", "seed", *list_plan_headings(experiment)])


def read_columns(plan: Path | io.StringIO, columns: list[str]) -> set[tuple[str, ...]]:
    """Return the values in some columns of a plan, each combination once; none where it cannot be read, or has other
    columns."""
    try:
        rows = pd.read_csv(plan, dtype=str, keep_default_na=False)
        return set(rows[columns].itertuples(index=False, name=None))
    except (OSError, ValueError, KeyError):
        return set()


def list_plan_headings(experiment: Experiment) -> list[str]:
    """Return the settings that head the rows and columns of an experiment's table, except model and task."""
    return [key for key in experiment.list_heading_settings() if key not in ("model.name", "task.name")]


def list_jobs(cells: list[Cell]) -> list[tuple[str, str, Settings]]:
    """Return label, purpose and settings of every run: of the cells and of those they start from, each once."""
    everything = [*cells, *(source for cell in cells for source in cell.sources)]
    jobs = [(cell.label, CHOOSES, trial) for cell in everything for trial in cell.tuning]
    jobs += [(cell.label, REPORTED, cell.settings) for cell in everything]
    return list({repr(job): job for job in jobs}.values())


def plan_row(
    experiment: Experiment, label: str, purpose: str, settings: Settings, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the row of one run: its place, and steps, hours, device-hours, memory, or why it is refused."""
    place = {"experiment": experiment.name, "scale": experiment.scale}
    place |= {"model": settings.model.name, "task": settings.task.name, "label": label, "purpose": purpose}
    # As text: numbers of a column would be written otherwise once one of them is missing.
    place |= {key: str(get_setting(settings, key)) for key in list_plan_headings(experiment)}
    place |= {"seed": settings.seed, "lr": settings.train.lr, "hardware": settings.hardware.name}
    found = plan_step(settings, known)
    if "refused" in found:
        return place | found
    steps = settings.count_steps(found["count_rows"](settings)) if found["hours"] else 0  # where nothing trains
    hours = steps * found["hours"]
    device_hours = hours * settings.hardware.devices
    return place | {"steps": steps, "hours": hours, "device_hours": device_hours, "gb": found["gb"], "refused": ""}


def plan_step(settings: Settings, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the plan of one optimizer step: hours, GB a device, and how rows are counted; or why it is refused."""
    step = reduce_to_cost_settings(settings)
    key = repr(replace(step, method=replace(step.method, name="any")))  # LoRA+ is LoRA with other rates
    if key not in known:
        known[key] = compute_step(step)
    return known[key]


def compute_step(step: Settings) -> dict[str, Any]:
    """Return hours, GB a device and how rows are counted of a run of one step; or why it is refused."""
    with import_heavy_libraries():
        from dual_lora.lab.train.plan import check_fit, compute_plan, count_training_rows

    gc.freeze()  # a plan collects garbage often; scanning what the libraries hold would take most of its time
    try:
        plan = compute_plan(step)
        check_fit(step, plan)
    except UserError as error:
        return {"steps": 0, "hours": 0.0, "device_hours": 0.0, "gb": 0.0, "refused": get_first_line(error)}
    peak = plan["memory"]["peak"] / GB
    return {"hours": plan["hours"], "gb": peak, "count_rows": lambda run: count_training_rows(run, load_task(run))[0]}


def reduce_to_cost_settings(settings: Settings) -> Settings:
    """Return the settings of one step, with one value for all that changes neither its operations nor its memory."""
    train = replace(settings.train, lr=1.0, epochs=1.0, max_steps=1, weight_decay=0.0, head_lr=None, adam_epsilon=None)
    task = replace(settings.task, epochs=1.0, warmup_ratio=0.0, warmup_steps=None, head_dropout=None)
    task = replace(
        task, checkpoint="last", validation_rows=None, validation_steps=None, train_rows=task.train_rows or 1
    )
    return replace(
        settings,
        train=replace(train, early_stopping=None),
        task=task,
        method=replace(settings.method, lr=1.0, lr_ratio=None, ramp_share=None),
        eval=replace(settings.eval, holdout=None, holdout_skip=None, development_rows=None, before=False),
        wandb=replace(settings.wandb, job_type="plan", tags=[]),
        seed=0,
        study="plan",
        init_from=None,
    )


def format_plan_table(experiment: Experiment, rows: pd.DataFrame) -> str:
    """Return the table of an experiment: a row for each model and label, and the total."""
    lines = []
    for (model, label), part in rows.groupby(["model", "label"], sort=False):
        reported = part[part["purpose"] == REPORTED]
        span = format_span(reported["hours"])
        refused = next((why for why in part["refused"] if why), "")
        lines.append(
            [
                f"{model}  {label}",
                str(len(reported)),
                str(len(part) - len(reported)),
                f"{part['gb'].max():.1f}",
                span,
                f"{part['device_hours'].sum():,.0f}",
                "no" if refused else "yes",
            ]
        )
    heads = [experiment.name, "runs", "for rates", "GB a device", "hours a run", "device-hours", "fits"]
    devices = ", ".join(dict.fromkeys(f"{name}" for name in rows["hardware"]))
    counted = f"{(rows['purpose'] == REPORTED).sum()} runs and {(rows['purpose'] == CHOOSES).sum()} to choose rates"
    total = f"total: {counted}, {rows['device_hours'].sum():,.0f} device-hours (hardware: {devices})"
    refusals = [f"does not fit: {why}" for why in dict.fromkeys(rows["refused"]) if why]
    return "\n".join([format_rows(lines, heads), total, *refusals])


def format_span(hours: pd.Series) -> str:
    """Return the least and the most hours of a run; one number where both print alike."""
    ends = list(dict.fromkeys(f"{value:,.1f}" for value in (hours.min(), hours.max())))
    return " to ".join(ends)
