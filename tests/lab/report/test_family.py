"""The planned family is what the command plans, whatever came out of the runs: results change neither its size nor its
members, and a half-done study does not pass for a small one."""

from dataclasses import replace
from math import inf, nan

import pandas as pd
import pytest

import tasks
from dual_lora.lab.present.document import MISSING
from dual_lora.lab.record.run import Run
from dual_lora.lab.report.comparison.comparisons import compare_outcomes
from dual_lora.lab.report.comparison.floors import (
    describe_constant_runs,
    find_floors,
    find_unranked,
    is_constant,
)
from dual_lora.lab.report.comparison.matches import Predictions
from dual_lora.lab.report.values import UNLEARNED, UNSETTLED
from dual_lora.lab.report.write import DIFFERENCES_FILE, Findings, write_report
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes
from tests.support.reports import PLANNED, RATIOS, finish, rows_of

MORE_RIGHT = (2, 2, 2, 6, 6)  # of the seeds: p is 0.021, which three comparisons correct to 0.064 and two to 0.043
THREE_TASKS = PLANNED | {
    "full": PLANNED["full"] | {"blocks": [[f"task=glue/{name}"] for name in ("sst2", "rte", "cola")]}
}
FLOOR = 50  # what the most frequent class gets right


@pytest.mark.parametrize("rte", [80, None, FLOOR])
def test_a_task_that_is_missing_or_not_learned_corrects_the_others_as_one_that_was(study, tmp_path, rte):
    experiment, outcomes = study(
        PLANNED | {"margin": {}},
        lambda label, s: rte if s.task.name == "glue/rte" else 80 + MORE_RIGHT[s.seed] * (label == "Dual LoRA"),
    )
    assert "corrected for all 3 by Holm's method" in write_report(experiment, outcomes, tmp_path)
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE).set_index("task")
    assert listed.loc["glue/sst2", "p"] == pytest.approx(3 * 0.0213, abs=1e-3)
    assert listed.loc["glue/sst2", "verdict"] == "undecided"


def test_one_failed_run_does_not_make_a_half_done_study_a_smaller_one(study, tmp_path):
    def right(label, settings):
        if settings.task.name == "glue/cola":
            return FLOOR if (label, settings.seed) == ("LoRA", 0) else None
        return 60 + settings.seed + (20 + settings.seed % 2) * (label == "Dual LoRA")

    experiment, outcomes = study(THREE_TASKS, right, metrics={"accuracy": 0.8, "matthews": 0.8})
    text = write_report(experiment, outcomes, tmp_path)
    assert [line[-2] for line in rows_of(text)[1:4]] == ["better", "better", "undecided: 2 of 3 tasks"]
    assert "corrected for all 4 by Holm's method; 2 of them are not tested" in text
    assert "not known to be learned, and missing in means: glue/cola (roberta-base)" in text
    (floor,) = (line for line in rows_of(text) if line[:2] == ["glue/cola", "majority class"])
    assert floor[-1] == "not known to be learned"
    assert "or cannot be compared; means lack it." in text
    values = pd.read_csv(tmp_path / "table.csv")
    assert values.loc[values["column"] == "mean", "value"].isna().all()


def test_a_row_is_not_tested_on_a_task_that_another_may_still_learn(study, tmp_path):
    cells = PLANNED["cells"] | {"DoRA": ["method=dora"]}

    def right(label, settings):
        if settings.task.name == "glue/cola":
            return None if label == "DoRA" else FLOOR - (label == "LoRA")
        return 60 + settings.seed + (20 + settings.seed % 2) * (label == "Dual LoRA")

    experiment, outcomes = study(THREE_TASKS | {"cells": cells}, right)
    findings = Findings.compute(experiment, outcomes)
    verdicts = {c.task: (c.verdict, c.untested) for c in findings.comparisons.planned}
    assert verdicts["glue/cola"] == ("undecided", "task not known to be learned")
    assert verdicts["mean of 2 tasks"] == ("undecided", "2 of 3 tasks") and findings.comparisons.family == 4
    means = findings.values[findings.values["column"] == "mean"]
    assert len(means) and means["value"].isna().all()


@pytest.mark.parametrize("missing", [{1}, {0, 1, 2, 3, 4}])
def test_no_task_is_known_to_be_learned_before_every_run_of_its_floors_is_there(study, tmp_path, missing):
    cells = PLANNED["cells"] | {"Head only": ["method=lora", "method.rank=1"]}

    def right(label, settings):
        if label == "Head only":
            return None if settings.task.name == "glue/rte" and settings.seed in missing else FLOOR
        return 60 + settings.seed + (20 + settings.seed % 2) * (label == "Dual LoRA")

    experiment, outcomes = study(PLANNED | {"cells": cells, "floors": ["Head only"]}, right)
    text = write_report(experiment, outcomes, tmp_path)
    found = {line[0]: line[-2] for line in rows_of(text.partition("## Runs")[0])[1:]}
    assert found["glue/sst2"] == "better" and found["glue/rte"] == "undecided: task not known to be learned"
    assert "corrected for all 3 by Holm's method; 2 of them are not tested" in text
    floors = rows_of(text.partition("Floors.")[2].partition("\n## ")[0])
    score = next(line[2] for line in floors if line[:2] == ["glue/rte", "Head only"])
    assert score == (MISSING if len(missing) == 5 else "50.0")
    assert {(line[0], line[-1]) for line in floors[1:]} == {
        ("glue/sst2", "learned"),
        ("glue/rte", "not known to be learned"),
    }


@pytest.mark.parametrize("loss", ["record", "file", "column"])
def test_a_task_counts_as_not_learned_once_every_run_of_it_was_compared(study, monkeypatch, loss):
    experiment, outcomes = study(PLANNED, lambda label, s: FLOOR)
    everything = [("roberta-base", "glue/sst2"), ("roberta-base", "glue/rte")]
    floors = find_floors(experiment, outcomes, Predictions())
    assert find_unranked(floors) == dict.fromkeys(everything, UNLEARNED)
    lost = next(o for o in outcomes if (o.label, o.settings.task.name) == ("Dual LoRA", "glue/rte"))
    if loss == "record":
        outcomes = [replace(o, result=None) if o is lost else o for o in outcomes]
    elif loss == "file":
        (lost.record.folder / "predictions.jsonl").unlink()
    else:
        read = Predictions.read_runs
        monkeypatch.setattr(
            Predictions,
            "read_runs",
            lambda self, runs: {
                seed: [{"split": r["split"], "id": r["id"], "gold": r["gold"]} for r in rows] if lost in runs else rows
                for seed, rows in read(self, runs).items()
            },
        )
    floors = find_floors(experiment, outcomes, Predictions())
    assert find_unranked(floors) == dict(zip(everything, (UNLEARNED, UNSETTLED), strict=True))


def test_a_regression_that_predicts_one_value_is_told(study, tmp_path, monkeypatch):
    spec = PLANNED | {"full": PLANNED["full"] | {"blocks": [["task=glue/stsb"]]}}
    experiment, outcomes = study(spec, lambda label, s: 80)
    read = Predictions.read

    def squeeze(self, outcome):
        spread = 0.9e-3 if (outcome.label, outcome.settings.seed) == ("Dual LoRA", 3) else 1.1e-3
        return [row | {"answer": 2.5 + spread * row["gold"]} for row in read(self, outcome)]

    monkeypatch.setattr(Predictions, "read", squeeze)
    (line,) = describe_constant_runs(experiment, outcomes, Predictions())
    assert line == (
        "Dual LoRA on glue/stsb: 1 of 5 runs predict one value, within 0.1 % of the targets' standard deviation "
        "(seeds 3); a correlation does not show that"
    )
    assert line in write_report(experiment, outcomes, tmp_path)


def test_runs_that_predict_one_value_are_counted_by_their_place_in_the_table(study, monkeypatch):
    full = RATIOS["full"] | {"run": [word for word in RATIOS["full"]["run"] if "task" not in word] + ["task=glue/stsb"]}
    experiment, outcomes = study(RATIOS | {"full": full}, lambda label, s: 80)
    read = Predictions.read

    def squeeze(self, outcome):
        squeezed = outcome.settings.method.magnitude_ratio == 0.5 and outcome.settings.seed == 1
        return [row | {"answer": 2.5 if squeezed else row["gold"]} for row in read(self, outcome)]

    monkeypatch.setattr(Predictions, "read", squeeze)
    (line,) = describe_constant_runs(experiment, outcomes, Predictions())
    assert line.startswith("Dual LoRA, magnitude ratio 0.5 on glue/stsb: 1 of ") and "(seeds 1)" in line


@pytest.mark.parametrize(
    ("answers", "targets", "constant"),
    [
        ((2.5, 2.5), (1, 4), True),
        ((2.5, 2.5), (3, 3), True),
        ((2.5, 2.6), (1, 4), False),
        ((2.5, 2.5, None), (1, 4, 2), False),
        ((2.5, 2.5, nan), (1, 4, 2), False),
        ((2.5, 2.5, inf), (1, 4, 2), False),
        ((2.5, 10**400), (1, 4), False),
        ((2.5,), (1,), False),
        (("no", "no"), (1, 4), False),
    ],
)
def test_what_counts_as_one_value(answers, targets, constant):
    rows = [{"answer": answer, "gold": gold} for answer, gold in zip(answers, targets, strict=True)]
    assert is_constant(rows) == constant


@pytest.mark.parametrize("fault", ["unscorable", "other examples"])
def test_a_floor_that_no_row_can_be_compared_with_leaves_open_whether_the_task_was_learned(
    study, tmp_path, monkeypatch, fault
):
    spec = PLANNED | {
        "cells": PLANNED["cells"] | {"Head only": ["method=lora", "method.rank=1"]},
        "floors": ["Head only"],
        "full": PLANNED["full"] | {"blocks": [["task=glue/stsb"]]},
    }

    def right(label, settings):
        return FLOOR if label == "Head only" else 60 + settings.seed + (20 + settings.seed % 2) * (label == "Dual LoRA")

    experiment, outcomes = study(spec, right)
    findings = Findings.compute(experiment, outcomes)
    assert not findings.unranked and findings.comparisons.planned[0].verdict == "better"
    read = Predictions.read

    def spoil(self, outcome):
        rows = read(self, outcome)
        if outcome.label != "Head only":
            return rows
        if fault == "unscorable":
            return [{key: value for key, value in row.items() if key != "answer"} for row in rows]
        return [row | {"id": f"other {row['id']}"} for row in rows]

    monkeypatch.setattr(Predictions, "read", spoil)
    findings = Findings.compute(experiment, outcomes)
    assert findings.unranked == {("roberta-base", "glue/stsb"): UNSETTLED}
    assert {c.untested for c in findings.comparisons.planned} == {"task not known to be learned"}
    text = write_report(experiment, outcomes, tmp_path, findings)
    (floor,) = (line for line in rows_of(text.partition("Floors.")[2]) if line[:2] == ["glue/stsb", "Head only"])
    assert floor[-1] == "not known to be learned"
    assert ("not read: Head only, floor of glue/stsb" in text) == (fault == "unscorable")


def test_tasks_of_which_lower_is_better_on_some_never_get_a_planned_mean(study, monkeypatch):
    """Nor where only those are there, or learned, that agree."""
    monkeypatch.setattr(type(tasks.load("demo/sentiment")), "lower_is_better", ("accuracy",))
    blocks = [["task=glue/sst2"], ["task=glue/rte"], ["task=demo/sentiment"]]
    spec = PLANNED | {"columns": "task.name", "published": [], "full": PLANNED["full"] | {"blocks": blocks}}
    experiment, outcomes = study(spec, lambda label, s: None if s.task.name == "demo/sentiment" else 80)
    lost = {("roberta-base", "demo/sentiment"): UNLEARNED}
    for unranked in ({}, lost):
        found = compare_outcomes(experiment, outcomes, Predictions(), unranked)
        assert found.family == 3 and [c.task for c in found.planned] == ["glue/sst2", "glue/rte"]


def test_rows_that_get_the_same_rate_by_chance_stay_two(study):
    """One of them being the baseline, too."""
    cells = {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"], "wide": ["method=dual_lora"]}
    cells |= {"LoRA again": ["method=lora"]}
    grid = {"LoRA": [1e-4, 2e-4], "LoRA again": [1e-4, 8e-4], "Dual LoRA": [1e-3, 2e-3], "wide": [1e-3, 8e-3]}
    spec = PLANNED | {"cells": cells, "planned": ["Dual LoRA", "wide", "LoRA again"]}
    full = PLANNED["full"] | {"blocks": [["task=glue/rte"]], "tune": {"holdout": 50, "grid": grid, "seeds": [1000]}}
    experiment, outcomes = study(spec | {"full": full}, lambda label, s: None)
    assert compare_outcomes(experiment, outcomes, Predictions()).family == 3
    for trial in {repr(t): t for outcome in outcomes for t in outcome.cell.tuning}.values():
        finish(trial, 90 if trial.train.lr in (1e-4, 1e-3) else 70)
    outcomes = find_outcomes(experiment.compose_cells([]), "made")
    assert len({outcome.rate for outcome in outcomes}) == 2  # the lower one of each grid
    for outcome in outcomes:
        if not Run.prepare(outcome.settings).record.read_result():
            finish(outcome.settings, 80 + outcome.settings.seed)
    outcomes = find_outcomes(experiment.compose_cells([]), "made")
    found = compare_outcomes(experiment, outcomes, Predictions())
    assert found.family == 3 and [c.label for c in found.planned] == ["Dual LoRA", "wide", "LoRA again"]


def test_a_start_that_results_choose_does_not_change_what_is_planned():
    spec = PLANNED | {"starts": {"glue/rte": "glue/sst2"}}
    cells = Experiment.from_content("made", spec).compose_cells([])
    for cell in (cell for cell in cells if cell.sources):
        started = replace(cell, settings=replace(cell.settings, init_from="runs/made/best"))
        assert started.planned_key == cell.planned_key
    assert len({cell.planned_key for cell in cells}) == len(cells)


def test_floors_have_no_contrasts(study):
    ratios = "method.magnitude_ratio=0.25,0.5"
    spec = {
        "title": "Ratio",
        "rows": ["task.name"],
        "columns": "method.magnitude_ratio",
        "contrasts": [{"plus": [0.5], "minus": [0.25]}],
        "floors": ["Frozen"],
        "cells": {
            "Dual LoRA": ["method=dual_lora", ratios],
            "Frozen": ["method=dual_lora", ratios, "+method.peft.freeze=direction"],
        },
        "full": {"seeds": [0, 1, 2, 3, 4], "run": ["model=roberta-base", "task=glue/rte"]},
    }
    experiment, outcomes = study(spec, lambda label, s: 80 + s.seed)
    found = compare_outcomes(experiment, outcomes, Predictions())
    assert found.family == 1 and {c.label for c in found.all} == {"Dual LoRA, magnitude ratio 0.5"}
