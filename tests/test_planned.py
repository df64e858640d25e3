"""What an experiment's file may plan: rows, margins, floors; and that the shipped ones plan the paper's claims."""

import pytest

from dual_lora.lab.errors import UserError
from dual_lora.lab.study.experiment import Experiment

SPEC = {
    "title": "Planned",
    "columns": "task.name",
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"]},
    "baselines": ["LoRA"],
    "full": {"seeds": [0], "run": ["model=tiny-roberta", "task=demo/sentiment"]},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"planned": ["DoRA"]}, "DoRA: no such cell; its cells are LoRA, Dual LoRA"),
        ({"floors": ["head only"]}, "head only: no such cell"),
        ({"planned": ["LoRA"]}, "LoRA: planned and a baseline; give it in one of them"),
        ({"margin": {"tasks": 1.0}}, "margin.tasks: 1.0: positive points for task or mean are needed"),
        ({"margin": {"task": 0}}, "margin.task: 0: positive points for task or mean are needed"),
        ({"margin": 1.0}, "margin: '1.0' has the wrong form"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
    with pytest.raises(UserError, match=f"^conf/experiment/made.yaml: {said}"):
        Experiment.from_content("made", SPEC | changes)


@pytest.mark.parametrize("name", ["nlu", "nlg", "commonsense"])
def test_the_papers_claims_are_planned_against_every_method_it_names(name):
    experiment = Experiment.load(name, "full")
    kinds = {label.partition(",")[0] for label in experiment.baselines}
    assert kinds == {"Full", "LoRA", "LoRA+", "DoRA"}
    assert {label.partition(",")[0] for label in experiment.planned} == {"Dual LoRA"}
    assert experiment.margin == {"task": 1.0, "mean": 0.5} and len(experiment.seeds) >= 5
    assert {*experiment.planned, *experiment.baselines} <= set(experiment.tune.grid)
