"""`sweep.py`: an experiment's runs, found finished or run, and then its report."""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace

from dual_lora.lab import cli, runs
from dual_lora.lab.disk import writing
from dual_lora.lab.experiments import Cell, Experiment
from dual_lora.lab.runs import Record
from dual_lora.lab.settings import Settings, UserError, require


@dataclass(frozen=True)
class Done:
    """One cell of a table and what is known of it: the run's record and result, or why there is none."""

    cell: Cell
    record: Record | None
    result: dict | None
    reason: str | None

    @property
    def settings(self) -> Settings:
        return self.cell.settings


def asked(settings: Settings) -> str:
    """Return what of a run is asked for, whatever data and weights it is done with: its settings as canonical text."""
    return json.dumps(runs.chosen(settings), sort_keys=True)


def kept(study: str) -> dict[str, Record]:
    """Return the records of a study by what was asked for, finished ones before others, from the records alone. A
    damaged one is told and left out."""
    found: dict[str, Record] = {}
    for path in sorted((runs.RUNS / study).glob("*/config.yaml")):
        record = Record(path.parent)
        try:
            record.check("config.yaml", "environment.json")
            key, result = asked(cli.recorded(record.folder)), record.result()
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if key not in found or result:
            found[key] = record
    return found


def setting(settings: Settings, key: str) -> object:
    """Return the value of a setting by its full name, e.g. "train.lr"; None where a method does not have it."""
    value = asdict(settings)
    for part in key.split("."):
        value = (value or {}).get(part)
    return value


def tuned(cell: Cell, study: dict[str, Record]) -> Cell | None:
    """Return the cell with the learning rate that did best among its trials, the lower one of equals; None while a
    trial is missing. The rates it chose from stay in `tuning`."""
    if not cell.tuning:
        return cell
    scores = []
    for trial in cell.tuning:
        result = study[asked(trial)].result() if asked(trial) in study else None
        if result is None:
            return None
        scores.append((-result["metrics"][result["metric"]], trial.train.lr))
    rate = min(scores)[1]
    return replace(cell, settings=replace(cell.settings, train=replace(cell.settings.train, lr=rate)))


def look_up(cells: list[Cell], study: str) -> list[Done]:
    """Return what is known of every cell, from the records alone."""
    found, done = kept(study), []
    for cell in cells:
        chosen = tuned(cell, found)
        record = found.get(asked(chosen.settings)) if chosen else None
        result = record.result() if record else None
        failure = record.failure() if record and not result else None
        reason = None if result else "learning rate not chosen yet" if chosen is None else "not run"
        if failure:
            reason = f"failed: {failure['message']}"
        done.append(Done(chosen or cell, record, result, reason))
    return done


def distinct(jobs: list[Settings]) -> list[Settings]:
    """Return the jobs without those that ask for the same run as an earlier one."""
    return list({Record.of(job).folder: job for job in reversed(jobs)}.values())[::-1]


def run_missing(jobs: list[Settings], what: str = "runs") -> int:
    """Run every job that is not finished, saying how long the rest may take, and return the exit code."""
    for job in jobs:
        Record.of(job).clean()
    missing = [job for job in jobs if job.force or Record.of(job).result() is None]
    print(f"{len(jobs)} {what}, {len(jobs) - len(missing)} finished, {len(missing)} to do")
    started = time.monotonic()
    for number, job in enumerate(missing):
        spent = time.monotonic() - started
        left = f", about {spent / number * (len(missing) - number) / 60:.0f} min left" if number else ""
        print(f"\n[{number + 1}/{len(missing)}] {Record.of(job).name}{left}", flush=True)
        cli.attempt(job)
    return cli.conclude(jobs)


def run_all(cells: list[Cell], study: str) -> int:
    """Run what is missing of an experiment: first the runs that choose learning rates, then the table's own."""
    trials = distinct([trial for cell in cells for trial in cell.tuning])
    code = run_missing(trials, "runs to choose learning rates") if trials else cli.EXIT_OK
    found = kept(study) if trials else {}
    ready = [chosen.settings for cell in cells if (chosen := tuned(cell, found))]
    return run_missing(distinct(ready)) or code


def sweep(argv: list[str]) -> int:
    """Do what `sweep.py` is asked: run the missing cells (unless run=false) of one or more experiments, then write the
    reports. All cells are composed and checked before the first one runs."""
    given = dict(a.partition("=")[::2] for a in argv)
    require("experiment" in given, f"experiment=NAME is needed; known: {', '.join(cli.choices('experiment'))}")
    run = given.get("run", "true")
    require(run in ("true", "false"), f"run={run}: true or false")
    extra = [a for a in argv if a.partition("=")[0] not in ("experiment", "scale", "run")]
    names = cli.choices("experiment") if given["experiment"] == "all" else given["experiment"].split(",")
    asked_for = [Experiment.load(name, given.get("scale")) for name in names]
    composed = [(experiment, experiment.compose(extra)) for experiment in asked_for]
    if any(cell.settings.plan for _, cells in composed for cell in cells):
        return cli.draw_plans(distinct([cell.settings for _, cells in composed for cell in cells]))
    codes = [do(experiment, cells, run == "true") for experiment, cells in composed]
    return min((code for code in codes if code), default=cli.EXIT_OK)


def do(experiment: Experiment, cells: list[Cell], run: bool) -> int:
    """Run what is missing of an experiment, write its report, print it and return the exit code."""
    study = cells[0].settings.study
    code = run_all(cells, study) if run else cli.EXIT_OK
    from dual_lora.lab import ranks_report, report

    folder, done = runs.RUNS / study / "report", look_up(cells, study)
    if experiment.analyse and run:
        ranks_report.analyse(done)
    with writing(folder):
        print(report.write(experiment, done, folder))
    if run:
        report.mirrored(experiment, done, folder)
        missing = any(cell.result is None for cell in done)
        code = code or (cli.EXIT_USER if missing else cli.EXIT_OK)
    return code
