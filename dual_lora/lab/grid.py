"""`sweep.py`: an experiment's runs, found finished or run, and then its report."""

import json
import sys
import time
import traceback
from dataclasses import dataclass, replace
from math import inf, isnan, nan
from operator import itemgetter

import tasks
from dual_lora.lab import cli, launching, processes, runs
from dual_lora.lab.disk import writing
from dual_lora.lab.experiments import Cell, Experiment
from dual_lora.lab.progress import Progress
from dual_lora.lab.runs import Record, without_secrets
from dual_lora.lab.settings import Settings, UserError, first_line, require


@dataclass(frozen=True)
class Done:
    """One cell of a table and what is known of it: the run's record and result, or why there is none.

    rate: the learning rate, None while it is not chosen; others: finished records of the same settings that are not
    shown; diverged: rates that could not be trained with, whose trials count as the worst.
    """

    cell: Cell
    record: Record | None
    result: dict | None
    reason: str | None
    rate: float | None = None
    others: tuple[Record, ...] = ()
    diverged: tuple[float, ...] = ()

    @property
    def settings(self) -> Settings:
        return self.cell.settings


def asked(settings: Settings) -> str:
    """Return what of a run is asked for, whatever data and weights it is done with: its settings as canonical text."""
    return json.dumps(runs.chosen(settings), sort_keys=True)


def kept(study: str) -> dict[str, list[Record]]:
    """Return the records of a study by what was asked for, the one to be shown first, from the records alone. A damaged
    one is told and left out."""
    found: dict[str, list[tuple[tuple, Record]]] = {}
    for path in sorted((runs.RUNS / study).glob("*/config.yaml")):
        record = Record(path.parent)
        try:
            record.check("config.yaml", "environment.json")
            settings = cli.recorded(record.folder)
            found.setdefault(asked(settings), []).append((merit(record, settings), record))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    ranked = {key: sorted(some, key=itemgetter(0), reverse=True) for key, some in found.items()}
    return {key: [record for _, record in some] for key, some in ranked.items()}


def merit(record: Record, settings: Settings) -> tuple[bool, bool, bool, str, str]:
    """Return what sorts records of the same settings: a finished one before others, one of the task as it is now, one
    of committed code, the newest."""
    result, made_with = record.result(), record.made_with()
    finished = result is not None
    now = finished and current(result, settings)
    return finished, now, clean(made_with), made_with.get("started", ""), record.name


def current(result: dict, settings: Settings) -> bool:
    """Whether a run was done with the task's present version."""
    return result.get("task_version") == tasks.load(settings.task.name, settings.task.options).version


def clean(made_with: dict) -> bool:
    """Whether a run was done with code that a commit holds, as far as its environment tells."""
    return made_with.get("uncommitted_changes") is False


def tuned(cell: Cell, study: dict[str, list[Record]]) -> Cell | None:
    """Return the cell with the learning rate that did best among its trials, the lower one of equals; None while a
    trial is missing, or all of them diverged. The rates it chose from stay in `tuning`."""
    if not cell.tuning:
        return cell
    scores = [(-score(trial, study), trial.train.lr) for trial in cell.tuning]
    if any(isnan(lost) for lost, _ in scores) or min(scores)[0] == inf:
        return None
    return replace(cell, settings=replace(cell.settings, train=replace(cell.settings.train, lr=min(scores)[1])))


def score(trial: Settings, study: dict[str, list[Record]]) -> float:
    """Return a trial's main score, -inf where training diverged, NaN while it is not known."""
    record = shown(trial, study)
    if result := record and record.result():
        return result["metrics"][result["metric"]]
    return -inf if mishap(record).get("diverged") else nan


def shown(settings: Settings, study: dict[str, list[Record]]) -> Record | None:
    """Return the record that stands for a run."""
    return study.get(asked(settings), [None])[0]


def look_up(cells: list[Cell], study: str) -> list[Done]:
    """Return what is known of every cell, from the records alone."""
    found = kept(study)
    return [known(cell, found) for cell in cells]


def known(cell: Cell, study: dict[str, list[Record]]) -> Done:
    """Return what is known of a cell."""
    chosen, diverged = tuned(cell, study), tuple(t.train.lr for t in cell.tuning if score(t, study) == -inf)
    if chosen is None:
        return Done(cell, None, None, undecided(cell, study), diverged=diverged)
    record, *others = study.get(asked(chosen.settings), [None])
    result = record.result() if record else None
    reason = None if result else failure(record) or ("begun, not finished" if record else "not run")
    rate, others = chosen.settings.train.lr, tuple(other for other in others if other.result())
    return Done(chosen, record, result, reason, rate, others, diverged)


def undecided(cell: Cell, study: dict[str, list[Record]]) -> str:
    """Return why a cell has no learning rate: what became of the trials that are missing, or of all, which diverged."""
    missing = [trial for trial in cell.tuning if isnan(score(trial, study))] or cell.tuning
    failed = [why for trial in missing if (why := failure(shown(trial, study)))]
    return f"learning rate not chosen: {failed[0]}" if failed else "learning rate not chosen yet"


def failure(record: Record | None) -> str | None:
    """Return why a run failed, up to where its message turns to what to do; None if it did not."""
    message = mishap(record).get("message")
    return message and f"failed: {first_line(message).partition(';')[0]}"


def mishap(record: Record | None) -> dict:
    """Return what a run without a result says of its failure."""
    try:
        return record.failure() or {} if record and not record.result() else {}
    except UserError as error:
        return {"message": str(error)}


def distinct(jobs: list[Settings]) -> list[Settings]:
    """Return the jobs without those that ask for the same run as an earlier one."""
    return list({Record.of(job).folder: job for job in reversed(jobs)}.values())[::-1]


def unfinished(jobs: list[Settings]) -> list[Settings]:
    return [job for job in jobs if job.force or Record.of(job).result() is None]


def run_missing(
    jobs: list[Settings], launcher: list[str], progress: Progress, what: str = "runs", then: list[Settings] = ()
) -> int:
    """Run every job that is not finished, here, saying how long these and those that come `then` may take, or through
    the launcher that these words choose, and return the exit code. What is finished counts with the time of its
    training."""
    for job in jobs if processes.first() else ():
        Record.of(job).clean()
    missing = processes.share(lambda: unfinished(jobs))  # one list for all, whenever each looks
    print(f"{len(jobs)} {what}, {len(jobs) - len(missing)} finished, {len(missing)} to do")
    if launching.elsewhere(launcher):
        launching.launch(missing, launcher)
        return cli.conclude(jobs)
    for job in jobs if missing else ():
        if result := Record.of(job).result():
            progress.add(job, result["train_seconds"])
    run_here(missing, progress, then)
    return cli.conclude(jobs)


def run_here(jobs: list[Settings], progress: Progress, then: list[Settings]) -> None:
    """Run jobs in this process, one after the other."""
    for number, job in enumerate(jobs):
        left = progress.left([*jobs[number:], *then])
        print(f"\n[{number + 1}/{len(jobs)}] {Record.of(job).name}, {left}", flush=True)
        started = time.monotonic()
        if cli.attempt(job) is None:  # a failed one tells nothing of how long others take
            progress.add(job, time.monotonic() - started)


def run_all(cells: list[Cell], study: str, launcher: list[str]) -> int:
    """Run what is missing of an experiment: first the runs that choose learning rates, then the table's own. A trial
    that failed counts for nothing where all rates are chosen nevertheless."""
    trials, progress = distinct([trial for cell in cells for trial in cell.tuning]), Progress()
    processes.join()
    code, then = cli.EXIT_OK, unfinished(distinct([cell.settings for cell in cells]))
    if trials:
        code = run_missing(trials, launcher, progress, "runs to choose learning rates", then)
    found = processes.share(lambda: kept(study)) if trials else {}
    ready = [chosen.settings for cell in cells if (chosen := tuned(cell, found))]
    return run_missing(distinct(ready), launcher, progress) or (code if len(ready) < len(cells) else cli.EXIT_OK)


def sweep(argv: list[str]) -> int:
    """Do what `sweep.py` is asked: run the missing cells (unless run=false) of one or more experiments, then write the
    reports. All cells are composed and checked before the first one runs."""
    given = dict(a.partition("=")[::2] for a in argv)
    require("experiment" in given, f"experiment=NAME is needed; known: {', '.join(cli.choices('experiment'))}")
    run = given.get("run", "true")
    require(run in ("true", "false"), f"run={run}: true or false")
    launcher = launching.chosen(argv)
    extra = [a for a in argv if a not in launcher and a.partition("=")[0] not in ("experiment", "scale", "run")]
    cli.parse(launcher)
    launching.check(argv)
    names = cli.choices("experiment") if given["experiment"] == "all" else given["experiment"].split(",")
    asked_for = [Experiment.load(name, given.get("scale")) for name in names]
    composed = [(experiment, experiment.compose(extra)) for experiment in asked_for]
    if any(cell.settings.plan for _, cells in composed for cell in cells):
        return cli.draw_plans(distinct([cell.settings for _, cells in composed for cell in cells]))
    for cell in [cell for _, cells in composed for cell in cells if run == "true"]:
        processes.check(cell.settings)
        cell.settings.hardware.check_installed()
    codes = [do(experiment, cells, launcher if run == "true" else None) for experiment, cells in composed]
    return min((code for code in codes if code), default=cli.EXIT_OK)


def do(experiment: Experiment, cells: list[Cell], launcher: list[str] | None) -> int:
    """Run what is missing of an experiment (None: nothing), write its report, print it and return the exit code."""
    study, run = cells[0].settings.study, launcher is not None
    code = run_all(cells, study, launcher) if run else cli.EXIT_OK
    if not processes.first():
        return code
    try:
        told = reported(experiment, cells, run)
    except UserError as error:
        print(f"{experiment.name}: no report: {error}", file=sys.stderr)
        told = cli.EXIT_USER
    except Exception:  # one report is not to cost the others
        print(f"{experiment.name}: no report\n{without_secrets(traceback.format_exc())}", file=sys.stderr)
        told = cli.EXIT_FAILED
    return code or told


def reported(experiment: Experiment, cells: list[Cell], run: bool) -> int:
    """Write an experiment's report from the records, print it and return the exit code. run: analyse what is not yet,
    and mirror the report."""
    from dual_lora.lab import report

    study = cells[0].settings.study
    folder, done = runs.RUNS / study / "report", look_up(cells, study)
    lost = experiment.analyse and run and not analysed(done)
    with writing(folder):
        print(report.write(experiment, done, folder))
    for trouble in (troubles := report.troubles(experiment, done)):
        print(f"not read: {trouble}", file=sys.stderr)
    if run:
        report.mirrored(experiment, done, folder)
    missing = run and any(cell.result is None for cell in done)
    return cli.EXIT_USER if missing or troubles or lost else cli.EXIT_OK


def analysed(done: list[Done]) -> bool:
    """Analyse what is not yet and return whether all of it could be; why not is told."""
    from dual_lora.lab import ranks_report

    whole = True
    for cell in done:
        try:
            ranks_report.analyse([cell])
        except Exception as error:
            print(f"not analysed: {cell.record.name}: {without_secrets(first_line(error))}", file=sys.stderr)
            whole = False
    return whole
