"""What an experiment's file may plan: rows, margins, floors; and that the shipped ones plan the paper's claims."""

import pytest

from dual_lora.lab.errors import UserError
from dual_lora.lab.record.identity import serialize_identity_settings
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
        ({"planned": ["LoRA"]}, "LoRA: both in planned and in baselines; give it in one of them"),
        (
            {"planned": ["Dual LoRA"], "floors": ["Dual LoRA"]},
            "Dual LoRA: both in planned and in floors; give it in one",
        ),
        ({"floors": ["LoRA"]}, "LoRA: both in baselines and in floors; give it in one of them"),
        ({"planned": ["Dual LoRA"], "baselines": []}, "planned: nothing to compare with; give baselines"),
        ({"planned": ["Dual LoRA", "Dual LoRA"]}, "planned: Dual LoRA: given twice; drop one"),
        (
            {"columns": "train.lr", "tune": {"grid": {"LoRA": [1e-3]}, "holdout": 9}},
            "train.lr: results choose it, so it",
        ),
        ({"rows": ["init_from"], "starts": {"glue/rte": "glue/mnli"}}, "init_from: results choose it, so it"),
        ({"margin": {"tasks": 1.0}}, "margin.tasks: 1.0: positive points for task or mean are needed"),
        ({"margin": {"task": 0}}, "margin.task: 0: positive points for task or mean are needed"),
        ({"margin": 1.0}, "margin: '1.0' has the wrong form"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
    with pytest.raises(UserError, match=f"^conf/experiment/made.yaml: {said}"):
        Experiment.from_content("made", SPEC | changes)


def test_a_scale_gives_fields_of_every_experiment_and_no_others(tmp_path, monkeypatch):
    path = tmp_path / "full.yaml"
    monkeypatch.setattr("dual_lora.lab.study.experiment.find_choices", lambda group: {"full": path})
    path.write_text("run: [train.max_steps=7]\nseeds: [4]\nmargin: {task: 2.0}\n")
    spec = SPEC | {"full": {"run": SPEC["full"]["run"]}}
    found = Experiment.from_content("made", spec)
    assert found.run == ["train.max_steps=7", *spec["full"]["run"]]
    assert found.seeds == [4] and found.margin == {"task": 2.0}
    assert Experiment.from_content("made", SPEC).seeds == [0]
    path.write_text("seed: [4]\n")
    with pytest.raises(UserError, match="^conf/scale/full.yaml: seed: no such field. Did you mean seeds?"):
        Experiment.from_content("made", SPEC)


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
    assert len(compared) == {"nlu": 24, "nlg": 2, "commonsense": 6}[name]
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
    for written, wanted in (("8", 4), (".8e+1", 4), ("1E1", 5)):
        over = full | {
            "run": ["model=tiny-roberta", "method.alpha=30"],
            "blocks": [["task=glue/rte", f"method.alpha={written}"]],
        }
        (_, halved) = Experiment.from_content("made", SPEC | {"cells": cells, "full": over}).compose_cells([])
        assert halved.settings.method.alpha == wanted, written
    alone = Experiment.from_content("made", SPEC | {"cells": cells})
    with pytest.raises(
        UserError, match="^conf/experiment/made.yaml: method.alpha=0.5x: 0.5x needs a number for method"
    ):
        alone.compose_cells([])


def identify(name: str, scale: str = "small") -> tuple[dict[str, set[str]], set[str]]:
    """Return the identities of an experiment's runs, by label and before a rate is chosen, and of its trials."""
    cells = Experiment.load(name, scale).compose_cells([])
    runs: dict[str, set[str]] = {}
    for cell in cells:
        runs.setdefault(cell.label, set()).add(serialize_identity_settings(cell.settings))
    return runs, {serialize_identity_settings(trial) for cell in cells for trial in cell.tuning}


def test_experiments_that_share_the_runs_of_the_verdict_ask_for_the_same_runs():
    runs, trials = identify("verdict")
    for name in ("truncation", "curvature"):
        mine, my_trials = identify(name)
        assert all(some <= runs[label] for label, some in mine.items()) and my_trials <= trials
    mine, my_trials = identify("frozen_groups")
    assert mine["Dual LoRA"] <= runs["Dual LoRA"] and mine["Head only"] <= runs["Head only"]
    assert len(my_trials & trials) == 12 and len(my_trials) == 96  # Dual LoRA's of six
    mine, my_trials = identify("ratio")
    middle = mine["Dual LoRA"] & mine["Dual LoRA, scale held"]
    assert middle <= runs["Dual LoRA"] and len(middle) == 10 and len(my_trials & trials) == 8
    assert identify("own_knobs")[0]["by rule, ramp 6 %"] <= runs["Dual LoRA"]
    for name in ("truncation", "curvature", "frozen_groups", "ratio", "own_knobs"):
        experiment = Experiment.load(name, "small")
        assert {c.settings.study for c in experiment.compose_cells(["seed=0"])} == {"verdict"}
        assert experiment.find_report_study("verdict") == name and experiment.find_report_study("mine") == "mine"


def test_runs_cannot_lie_among_those_of_an_unknown_experiment():
    with pytest.raises(UserError, match="^experiment=verdicts: no such experiment. Did you mean verdict"):
        Experiment.from_content("made", SPEC | {"records": "verdicts"}).compose_cells([])
    with pytest.raises(UserError, match="^conf/experiment/made.yaml: analyse: rank: not one of ranks, entries, trunc"):
        Experiment.from_content("made", SPEC | {"analyse": "rank"})
