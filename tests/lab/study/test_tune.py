"""Learning rates chosen by several seeds, with a length of their own."""

import json
from types import SimpleNamespace

import pytest

import tasks
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.report.learning_rates import describe_seeds
from dual_lora.lab.study import outcome, schedule
from dual_lora.lab.study.experiment import Experiment

SPEC = {
    "title": "Made",
    "columns": "task.name",
    "cells": {"LoRA": ["method=lora"], "Head only": ["method=head_only", "seed=7,8"]},
    "smoke": {
        "run": ["model=tiny-roberta"],
        "seeds": [0, 1, 2],
        "blocks": [["task=demo/sentiment"], ["task=demo/choice", "model=tiny-llama"]],
        "tune": {
            "holdout": 9,
            "max_steps": 1,
            "seeds": [50],
            "task_seeds": {"demo/sentiment": [50, 51]},
            "grid": {"LoRA": [1e-3, 2e-3]},
        },
    },
}


@pytest.fixture
def cells():
    spec = json.loads(json.dumps(SPEC))
    spec["smoke"]["blocks"] = spec["smoke"]["blocks"][:1]
    return Experiment.from_content("made", spec).compose_cells([])


def test_trials_have_seeds_and_a_length_of_their_own(cells):
    cell = next(cell for cell in cells if cell.label == "LoRA")
    assert [(t.train.lr, t.seed, t.train.max_steps) for t in cell.tuning] == [
        (1e-3, 50, 1),
        (1e-3, 51, 1),
        (2e-3, 50, 1),
        (2e-3, 51, 1),
    ]
    assert cell.settings.train.max_steps == 2 and cell.settings.seed == 0


def test_a_cell_that_names_its_seeds_is_run_with_those(cells):
    assert [cell.settings.seed for cell in cells if cell.label == "Head only"] == [7, 8]
    assert [cell.settings.seed for cell in cells if cell.label == "LoRA"] == [0, 1, 2]


def test_rates_are_not_chosen_by_runs_that_train_on_rows_held_out():
    spec = json.loads(json.dumps(SPEC))
    spec["smoke"]["blocks"] = [["task=e2e", "model=tiny-gpt2"]]
    spec["smoke"]["tune"] |= {"holdout": None, "options": {"scored": "validation"}, "task_seeds": {}}
    made = Experiment.from_content("made", spec)
    with pytest.raises(UserError, match="^eval.holdout=5: rates of experiment=made are chosen on other rows"):
        made.compose_cells(["eval.holdout=5"])
    assert made.compose_cells([])[0].tuning


def test_rates_are_not_chosen_on_rows_of_several_sets_scored_as_one():
    spec = json.loads(json.dumps(SPEC))
    spec["smoke"]["blocks"] = [["task=commonsense", "model=tiny-llama"]]
    spec["smoke"]["tune"]["task_seeds"] = {}
    with pytest.raises(UserError, match="^experiment=made: its trials set 9 training rows apart, and those of common"):
        Experiment.from_content("made", spec).compose_cells([])
    spec["smoke"]["tune"] |= {"holdout": None, "options": {"scored": "held_out"}}
    assert Experiment.from_content("made", spec).compose_cells([])[0].tuning


def test_a_task_without_seeds_of_its_own_has_those_of_all():
    spec = json.loads(json.dumps(SPEC))
    spec["cells"].pop("Head only")
    spec["smoke"]["blocks"] = [["task=demo/restaurants", "model=tiny-llama"], ["task=demo/sentiment"]]
    cells = Experiment.from_content("made", spec).compose_cells([])
    seeds = {cell.settings.task.name: [t.seed for t in cell.tuning] for cell in cells}
    assert seeds == {"demo/restaurants": [50, 50], "demo/sentiment": [50, 51, 50, 51]}
    outcomes = [SimpleNamespace(cell=cell, settings=cell.settings) for cell in cells]
    assert describe_seeds(outcomes) == "seed 50 (demo/restaurants), seeds 50, 51 (demo/sentiment)"
    assert describe_seeds(outcomes[-1:]) == "seeds 50, 51"


def test_seeds_of_a_task_that_no_cell_has_are_refused():
    spec = json.loads(json.dumps(SPEC))
    spec["smoke"]["tune"]["task_seeds"] = {"demo/sentimen": [50]}
    with pytest.raises(UserError, match="tune.task_seeds: demo/sentimen: no cell has this .*Did you mean demo/sentime"):
        Experiment.from_content("made", spec).compose_cells([])
    spec["smoke"]["tune"]["task_seeds"] = {"demo/sentiment": [50]}
    assert Experiment.from_content("made", spec).compose_cells(["task=demo/choice"])  # a selection leaves out its task


@pytest.mark.parametrize(
    ("scores", "rate"),
    [
        ([0.5, 0.9, 0.8, 0.7], 2e-3),  # the mean decides, not the best single seed
        ([0.9, 0.9, 0.1, 0.2], 1e-3),
        ([0.1, 0.7, 0.4, 0.4], 1e-3),  # equal, though 0.1 + 0.7 < 0.4 + 0.4 in floats
        ([0.5, float("-inf"), 0.1, 0.2], 2e-3),  # a rate that diverged with one seed is the worst
        ([0.5, 0.6, 0.7, float("nan")], None),  # one is missing
    ],
)
def test_a_rate_is_chosen_by_its_mean_over_seeds(cells, scores, rate, monkeypatch):
    cell = next(cell for cell in cells if cell.label == "LoRA")
    known = {serialize_identity_settings(trial): score for trial, score in zip(cell.tuning, scores, strict=True)}
    monkeypatch.setattr(outcome, "get_trial_score", lambda trial, study: known[serialize_identity_settings(trial)])
    chosen = outcome.choose_learning_rate(cell, SimpleNamespace())
    assert (chosen and chosen.settings.train.lr) == rate


def test_of_scores_that_should_be_low_the_lowest_chooses(cells, monkeypatch):
    cell = next(cell for cell in cells if cell.label == "LoRA")
    scores = dict(zip(map(serialize_identity_settings, cell.tuning), [0.5, 0.6, 0.9, 0.8], strict=True))
    monkeypatch.setattr(outcome, "get_trial_score", lambda trial, study: scores[serialize_identity_settings(trial)])
    monkeypatch.setattr(type(tasks.load("demo/sentiment")), "lower_is_better", ("accuracy",))
    assert outcome.choose_learning_rate(cell, SimpleNamespace()).settings.train.lr == 1e-3
    scores[serialize_identity_settings(cell.tuning[0])] = float("-inf")  # it diverged
    assert outcome.choose_learning_rate(cell, SimpleNamespace()).settings.train.lr == 2e-3


@pytest.mark.parametrize(("trials", "own", "wanted"), [(1, 2, 1), (2, 1, 1), (4, 0, 4), (0, 2, 2), (0, 0, 0)])
def test_the_exit_code_is_the_smallest_failure_of_trials_and_runs(trials, own, wanted, cells, runs_folder, monkeypatch):
    """Rates that no trial could choose count; no record is here, so that none can."""
    codes = iter([trials, own])
    monkeypatch.setattr(schedule, "run_missing", lambda *arguments: next(codes))
    assert schedule.run_tuned_cells(cells, "made", []) == wanted
