"""Runs that start from another run of their study: composed with it, done after it, and found again by the report."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

import tasks
from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.record import Record
from dual_lora.lab.study import outcome
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes, find_records, resolve_start

SMALL = [
    "train.max_steps=2",
    "train.max_examples=32",
    "eval.max_examples=8",
    "eval.before=false",
    "wandb.mode=disabled",
]
SPEC = {
    "title": "Small",
    "columns": "task.name",
    "rows": ["model.name"],
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"]},
    "starts": {"demo/sentiment": "demo/choice"},
    "smoke": {
        "seeds": [0, 1],
        "run": ["model=tiny-llama"],
        "blocks": [["task=demo/sentiment"], ["task=demo/choice"]],
        "limit": "nothing",
    },
}


@pytest.fixture
def use(monkeypatch):
    """A function that makes `experiment=small` mean SPEC with changes."""

    def change(**changes):
        made = SPEC | changes
        monkeypatch.setattr(Experiment, "load", lambda name, scale=None: Experiment.from_content(name, made, scale))
        return "experiment=small"

    return change


def test_a_cell_has_the_runs_of_its_own_row_as_sources_with_every_seed():
    cells = Experiment.from_content("small", SPEC).compose_cells(["task=demo/sentiment", "seed=1"])
    assert [(cell.label, cell.settings.seed) for cell in cells] == [("LoRA", 1), ("Dual LoRA", 1)]
    for cell in cells:
        assert {source.label for source in cell.sources} == {cell.label}
        assert [source.settings.seed for source in cell.sources] == [0, 1]
        assert {source.settings.task.name for source in cell.sources} == {"demo/choice"}
        assert not any(source.sources for source in cell.sources)


def test_a_start_that_an_experiment_chooses_itself_cannot_be_given():
    small = Experiment.from_content("small", SPEC)
    with pytest.raises(
        UserError, match=r"^experiment=small init_from=runs/a/b: .*small.yaml has the runs to start from;"
    ):
        small.compose_cells(["init_from=runs/a/b"])
    assert small.compose_cells(["init_from=runs/a/b", "task=demo/choice"])[0].settings.init_from == "runs/a/b"


def test_the_glue_tables_start_where_lora_does():
    cells = Experiment.load("nlu", "full").compose_cells(["model=roberta-base", "seed=0"])
    started = {cell.settings.task.name for cell in cells if cell.sources}
    assert started == {"glue/mrpc", "glue/rte", "glue/stsb"}
    for cell in cells:
        for source in cell.sources:
            assert (source.label, source.settings.task.name) == (cell.label, "glue/mnli")
            assert (
                source.settings.model == cell.settings.model
                and source.settings.method.peft == cell.settings.method.peft
            )
        assert len(cell.sources) in (0, 5)


def test_a_start_that_no_cell_has_is_refused():
    spec = SPEC | {"starts": {"demo/sentiment": "demo/restaurants"}}
    with pytest.raises(
        UserError, match=r"^conf/experiment/small.yaml: starts: demo/restaurants: no cell has this task$"
    ):
        Experiment.from_content("small", spec).compose_cells([])


def test_the_better_run_is_the_start_of_the_others(use, runs_folder, capsys):
    name = use()
    assert sweep_command([name, *SMALL]) == 0
    cells = Experiment.load("small").compose_cells(SMALL)
    records = find_records("small")
    for cell in (cell for cell in cells if cell.sources):
        started = resolve_start(cell, records)
        mine = Record(runs_folder / "small" / started.settings.init_from.rpartition("/")[2])
        scores = [
            result["metrics"][result["metric"]]
            for path in runs_folder.glob("small/*choice*/result.json")
            if (result := Record(path.parent).read_result())["method"] == cell.settings.method.name
        ]
        best = mine.read_result()
        assert best["method"] == cell.settings.method.name and best["task"] == "demo/choice"
        assert best["metrics"][best["metric"]] == max(scores) and len(scores) == 2
    outcomes = find_outcomes(cells, "small")
    assert len(outcomes) == 8 and all(outcome.result for outcome in outcomes)
    assert {
        bool(outcome.settings.init_from) for outcome in outcomes if outcome.settings.task.name == "demo/sentiment"
    } == {True}
    report = (runs_folder / "small/report/table.md").read_text()
    assert "start: demo/sentiment from the row's own best run of demo/choice, without its head" in report
    capsys.readouterr()
    assert sweep_command([name, *SMALL]) == 0
    assert "to do" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in (runs_folder / "small/report").iterdir()}
    assert sweep_command([name, "run=false", *SMALL]) == 0
    assert {path.name: path.read_bytes() for path in (runs_folder / "small/report").iterdir()} == first


@pytest.mark.parametrize(("lower", "best"), [((), 1), (("accuracy",), 0)])
def test_the_better_run_is_the_lower_one_where_lower_is_better(lower, best, monkeypatch):
    monkeypatch.setattr(type(tasks.load("demo/choice")), "lower_is_better", lower)
    cell = next(cell for cell in Experiment.from_content("small", SPEC).compose_cells([]) if cell.sources)
    scores = {source.settings.seed: score for source, score in zip(cell.sources, (0.1, 0.9), strict=True)}

    def find_record(settings, study):
        result = {"metric": "accuracy", "metrics": {"accuracy": scores[settings.seed]}}
        return SimpleNamespace(folder=settings.seed, read_result=lambda: result)

    monkeypatch.setattr(outcome, "find_record", find_record)
    assert resolve_start(cell, {}).settings.init_from == str(cell.sources[best].settings.seed)


def test_without_its_start_a_cell_says_so(use, runs_folder, capsys):
    sweep_command([use(), "run=false", *SMALL])
    assert "its start is not there: a run of demo/choice is missing" in capsys.readouterr().out


def test_trials_start_there_too(runs_folder):
    spec = SPEC | {"tune": {"holdout": 8, "grid": {"LoRA": [1e-3, 2e-3], "Dual LoRA": [1e-3, 2e-3]}}}
    cells = Experiment.from_content("small", spec).compose_cells(["seed=0"])
    (cell,) = [c for c in cells if c.sources and c.label == "LoRA"]
    assert resolve_start(cell, {}) is None
    alone = replace(cell, sources=())
    assert resolve_start(alone, {}) is alone
