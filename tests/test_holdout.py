"""Rows set apart: rates are chosen on some, scores are reported on others, and neither are trained on."""

import pytest

import tasks
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.inputs.splits import load_scored_splits, load_split
from dual_lora.lab.record.identity import serialize_identity_settings
from dual_lora.lab.study.experiment import Experiment

BASE = ["model=tiny-roberta", "task=demo/sentiment"]
TUNED = {
    "title": "Disjoint",
    "columns": "task.name",
    "cells": {"LoRA": ["method=lora"]},
    "tune": {"holdout": 30, "grid": {"LoRA": [1e-3, 2e-3]}},
    "full": {"seeds": [0], "run": [*BASE, "eval.holdout=50"]},
}


def read_ids(settings) -> tuple[set[str], set[str]]:
    """Return the ids of the rows a run trains on and those it is evaluated on."""
    task = tasks.load("demo/sentiment")
    scored = load_scored_splits(task, settings)["validation"]
    return set(load_split(task, "train", settings).rows["id"]), set(scored.rows["id"])


def test_rates_are_chosen_on_other_rows_than_scores_are_reported_on():
    (cell,) = Experiment.from_content("made", TUNED).compose_cells([])
    trained, reported = read_ids(cell.settings)
    assert (len(trained), len(reported)) == (1950, 50) and not trained & reported
    for trial in cell.tuning:
        trained, chosen_on = read_ids(trial)
        assert (len(trained), len(chosen_on)) == (1920, 30)
        assert not chosen_on & reported and not trained & (chosen_on | reported)


def test_trials_of_runs_that_report_their_tasks_own_rows_are_what_they_were():
    own = TUNED | {"full": {"seeds": [0], "run": BASE}}
    (cell,) = Experiment.from_content("made", own).compose_cells([])
    (first, _) = cell.tuning
    assert first.eval.holdout_skip is None and "holdout_skip" not in serialize_identity_settings(first)


def test_too_many_rows_set_apart_are_refused_and_rows_to_skip_need_rows_to_use():
    settings = load_settings([*BASE, "eval.holdout=1000", "eval.holdout_skip=1000"])
    with pytest.raises(UserError, match="eval.holdout=1000 eval.holdout_skip=1000: .* has 2000 rows; set fewer apart"):
        load_split(tasks.load("demo/sentiment"), "train", settings)
    with pytest.raises(UserError, match="eval.holdout_skip=9: needs eval.holdout"):
        load_settings([*BASE, "eval.holdout_skip=9"])
