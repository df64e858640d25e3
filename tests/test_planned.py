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


@pytest.mark.parametrize(("name", "ours", "literal"), [("nlu", 1, 2), ("nlg", 1, 2), ("commonsense", 1, 2)])
def test_dual_lora_has_the_scale_of_lora_and_a_row_its_alpha(name, ours, literal):
    """alpha / sqrt(r1 r2) against alpha / r of the tuned LoRA of the same model, task and rank."""
    cells = Experiment.load(name, "full").compose_cells(["seed=0"])
    scales: dict[tuple, dict[str, float]] = {}
    for cell in cells:
        s = cell.settings
        if cell.tuning and s.method.alpha is not None:
            rank = s.method.rank / 2 if s.method.name == "dual_lora" else s.method.rank  # sqrt(r1 r2) at r1 = r2
            kind = "literal" if cell.label.endswith("alpha") else s.method.name
            scales.setdefault((s.model.name, s.task.name, s.method.rank), {})[kind] = s.method.alpha / rank
    compared = [some for some in scales.values() if "dual_lora" in some]
    assert len(compared) == {"nlu": 24, "nlg": 2, "commonsense": 5}[name]
    for some in compared:
        assert some["dual_lora"] == pytest.approx(ours * some["lora"])
        assert some.get("literal", literal * some["lora"]) == pytest.approx(literal * some["lora"])
    assert sum("literal" in some for some in compared) >= len(compared) - 1  # not for the 70B of commonsense


def test_a_value_may_be_a_multiple_of_its_block_s():
    cells = {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora", "method.alpha=0.5x"]}
    blocks = [["task=glue/rte", "method.alpha=8"], ["task=glue/sst2", "method.alpha=30"]]
    full = {"seeds": [0], "run": ["model=tiny-roberta"], "blocks": blocks}
    found = Experiment.from_content("made", SPEC | {"cells": cells, "full": full}).compose_cells([])
    assert [cell.settings.method.alpha for cell in found] == [8, 4, 30, 15]
    alone = Experiment.from_content("made", SPEC | {"cells": cells})
    with pytest.raises(UserError, match="^conf/experiment/made.yaml: method.alpha=0.5x: a multiple of what"):
        alone.compose_cells([])
