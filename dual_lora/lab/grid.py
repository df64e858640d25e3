"""Experiments: the runs a table or figure needs, found finished or run, and then the report."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from omegaconf import OmegaConf

from dual_lora.lab import cli, runs
from dual_lora.lab.disk import writing
from dual_lora.lab.runs import Record
from dual_lora.lab.settings import Settings, nearest, require


@dataclass(frozen=True)
class Experiment:
    """A named set of runs. `run` are overrides all cells share, each cell adds its own; both may sweep (a=1,2).

    `rows` and `columns` are the settings whose values head the table's rows and columns.
    """

    name: str
    run: list[str]
    cells: list[list[str]]
    rows: str
    columns: str

    @classmethod
    def load(cls, name: str) -> "Experiment":
        known = cli.choices("experiment")
        hint = nearest(name, known)
        require(name in known, f"experiment={name}: no such experiment.{hint} Known: {', '.join(known)}")
        return cls(name, **OmegaConf.to_container(OmegaConf.load(cli.CONF / "experiment" / f"{name}.yaml")))

    def jobs(self, extra: list[str]) -> list[Settings]:
        """Return the settings of every run, all composed and checked. `extra` overrides come last.

        Raises:
            UserError: one of them is wrong.
        """
        study = [] if any(e.startswith("study=") for e in extra) else [f"study={self.name}"]
        return [cli.load(job) for cell in self.cells for job in cli.parse([*self.run, *cell, *study, *extra])]


def asked(settings: Settings) -> str:
    """Return what of a run is asked for, whatever data and weights it is done with: its settings as canonical text."""
    return json.dumps(runs.chosen(settings), sort_keys=True)


def finished(study: str) -> Iterator[tuple[Settings, dict]]:
    """Yield settings and result of every finished run of a study, from the records alone."""
    for path in sorted((runs.RUNS / study).glob("*/result.json")):
        record = Record(path.parent)
        yield cli.recorded(record.folder), record.result()


def setting(settings: Settings, key: str) -> object:
    """Return the value of a setting by its full name, e.g. "train.lr"."""
    value = asdict(settings)
    for part in key.split("."):
        value = value[part]
    return value


def run_missing(jobs: list[Settings]) -> int:
    """Run every job that is not finished, saying how long the rest may take, and return the exit code."""
    for job in jobs:
        Record.of(job).clean()
    missing = [job for job in jobs if job.force or Record.of(job).result() is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} finished, {len(missing)} to do")
    started = time.monotonic()
    for number, job in enumerate(missing):
        left = (
            f", about {(time.monotonic() - started) / number * (len(missing) - number) / 60:.0f} min left"
            if number
            else ""
        )
        print(f"\n[{number + 1}/{len(missing)}] {Record.of(job).name}{left}")
        cli.attempt(job)
    return cli.conclude(jobs)


def sweep(argv: list[str]) -> int:
    """Do what `sweep.py` is asked: run the missing cells (unless run=false), then write the report."""
    given = dict(a.partition("=")[::2] for a in argv)
    require("experiment" in given, f"experiment=NAME is needed; known: {', '.join(cli.choices('experiment'))}")
    experiment, run = Experiment.load(given["experiment"]), given.get("run", "true")
    require(run in ("true", "false"), f"run={run}: true or false")
    extra = [a for a in argv if a.partition("=")[0] not in ("experiment", "run")]
    jobs = experiment.jobs(extra)
    if any(settings.plan for settings in jobs):
        return cli.draw_plans(jobs)
    code = run_missing(jobs) if run == "true" else cli.EXIT_OK
    from dual_lora.lab import report

    found = {asked(settings): result for settings, result in finished(jobs[0].study)}
    folder = runs.RUNS / jobs[0].study / "report"
    with writing(folder):
        print(report.write(experiment, [(job, found.get(asked(job))) for job in jobs], folder))
    return code
