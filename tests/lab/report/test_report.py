"""Reports from records made by hand: what stands in a cell, what is marked, what is said of differences."""

import io
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

import tasks
from dual_lora.lab.commands.sweep import report_experiment, run_experiment
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.present.document import Table, Text, escape_latex, render_html, render_latex
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.report import write as report_write
from dual_lora.lab.report.comparison.blocks import format_verdict, iterate_floor_blocks
from dual_lora.lab.report.comparison.comparisons import compare_outcomes, list_planned
from dual_lora.lab.report.comparison.floors import Floor, describe_failed_runs, find_floors, find_unranked
from dual_lora.lab.report.comparison.matches import Predictions, iterate_matches
from dual_lora.lab.report.figures.layout import compute_half_interval
from dual_lora.lab.report.figures.results import (
    describe_spread,
    draw_results,
    find_published_points,
    set_setting_axis,
)
from dual_lora.lab.report.protocol import summarize_values
from dual_lora.lab.report.table import build_main_table, letter_reasons
from dual_lora.lab.report.values import MARKS, UNLEARNED, UNSETTLED, build_frame, format_value, list_columns
from dual_lora.lab.report.write import DIFFERENCES_FILE, mirror_report, write_report
from dual_lora.lab.statistics.seeds import compute_equivalence_p
from dual_lora.lab.study.experiment import Cell, Experiment
from dual_lora.lab.study.outcome import find_outcomes
from tests.support.reports import GLUE, PLANNED, RATIOS, finish, rows_of


def test_ours_stands_beside_the_published_rows_of_the_same_model_method_and_rank(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 80 + 2 * s.seed + 5 * (label == "Dual LoRA"))
    text = write_report(experiment, outcomes, tmp_path)
    head, *lines = rows_of(text)
    assert head == ["model", "method", "SST-2", "RTE", "mean", "trained", "s/step"]
    ours, published, dual = lines[:3]
    assert ours[:5] == ["roberta-base", "LoRA", *3 * ["81.0 ± 1.4 (2)"]]
    assert published[:4] == ["roberta-base", "LoRA [lora_table2_glue, start: best MNLI run]", "95.1±0.2", "86.6±0.7"]
    assert dual[2] == "**86.0 ± 1.4 (2)**" and dual[5:] == ["887,042", "0.50"]


def test_the_best_of_every_task_is_bold_where_tasks_are_columns(study, tmp_path):
    spec = GLUE | {"columns": "task.name", "published": []}
    right = {"LoRA": {"glue/sst2": 90, "glue/rte": 60}, "Dual LoRA": {"glue/sst2": 80, "glue/rte": 70}}
    experiment, outcomes = study(spec, lambda label, s: right[label][s.task.name])
    runs = write_report(experiment, outcomes, tmp_path).partition("## Runs")[2].partition("\n## ")[0]
    lines = {line[1]: line for line in rows_of(runs)}
    bold = {label: [cell.startswith("**") for cell in line[2:4]] for label, line in lines.items() if label in right}
    assert bold == {"LoRA": [True, False], "Dual LoRA": [False, True]}


def test_all_parts_make_the_published_average(study, tmp_path):
    names = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    whole = GLUE | {"full": GLUE["full"] | {"blocks": [[f"task=glue/{name}"] for name in names]}}
    experiment = Experiment.from_content("made", whole)
    outcomes = find_outcomes(experiment.compose_cells(["seed=0"]), "made")
    heads = [column.heading for column in list_columns(experiment, outcomes)]
    assert heads == ["MNLI", "SST-2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STS-B", "avg"]


def test_planned_comparisons_get_verdicts_on_every_task_and_on_the_mean(study, tmp_path):
    experiment, outcomes = study(PLANNED, lambda label, s: 60 + s.seed + (20 + s.seed % 2) * (label == "Dual LoRA"))
    text = write_report(experiment, outcomes, tmp_path)
    head, *lines = rows_of(text)
    assert head[:5] == ["task", "score", "model", "comparison", "difference"] and head[-2:] == ["verdict", "could find"]
    assert [line[0] for line in lines[:3]] == ["glue/sst2", "glue/rte", "mean of 2 tasks"]
    for line in lines[:3]:
        assert line[2:5] == ["roberta-base", "Dual LoRA - LoRA", "+20.4"] and line[-2:] == ["better", ""]
    assert text.index("## Verdicts") < text.index("## Runs") and "corrected for all 3 by Holm's method" in text
    assert "## Exploratory" not in text
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    assert listed["verdict"].tolist() == ["better"] * 3 and listed["planned"].all()
    assert listed["low"].tolist() == pytest.approx([20.4 - 0.5477 / 5**0.5 * 2.776] * 3, abs=1e-3)


def test_planned_comparisons_without_runs_count_as_p_1(study, tmp_path):
    """A study that is half done may not pass for a small one: tested alone, this difference would be found."""
    right = {0: 3, 1: 0, 2: 4, 3: 1, 4: 2}
    spec = PLANNED | {"margin": {}}
    experiment, outcomes = study(
        spec, lambda label, s: None if s.task.name == "glue/rte" else 80 + 3 * right[s.seed] * (label == "Dual LoRA")
    )
    text = write_report(experiment, outcomes, tmp_path)
    assert "corrected for all 3 by Holm's method; 2 of them are not tested and count as p = 1" in text
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    assert len(listed) == 1 and listed["p"][0] == pytest.approx(3 * listed["p_seeds"][0])
    assert listed["p_seeds"][0] < 0.05 and listed["verdict"][0] == "undecided"


def test_four_seeds_decide_nothing(study, tmp_path):
    four = PLANNED | {"full": GLUE["full"] | {"seeds": [0, 1, 2, 3]}}
    experiment, outcomes = study(four, lambda label, s: 60 + 20 * (label == "Dual LoRA"))
    lines = rows_of(write_report(experiment, outcomes, tmp_path))
    assert [line[-2] for line in lines[1:4]] == ["undecided: under 5 seeds"] * 3


def test_equal_methods_are_equivalent_within_the_margin_and_undecided_without_one(study, tmp_path):
    right = {0: 80, 1: 81, 2: 80, 3: 81, 4: 80}
    spec = PLANNED | {"margin": {"task": 3.0, "mean": 1.0}}
    experiment, outcomes = study(spec, lambda label, s: right[s.seed] if label == "LoRA" else 80)
    said = [line[-2] for line in rows_of(write_report(experiment, outcomes, tmp_path))[1:4]]
    assert said == ["equivalent within 3", "equivalent within 3", "equivalent within 1"]
    without, outcomes = study(PLANNED | {"margin": {}}, lambda label, s: 80)
    lines = rows_of(write_report(without, outcomes, tmp_path))[1:4]
    assert [line[-2] for line in lines] == ["undecided"] * 3 and [line[-1] for line in lines] == ["1.3"] * 3
    assert "equivalent: never, as the experiment gives no margin" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("missing", "verdicts"),
    [
        (("glue/rte", 3), ["better", "undecided: 4 of 5 seeds", "undecided: 4 of 5 seeds"]),
        (("glue/rte", None), ["better"]),  # and no mean
        (("glue/cola", None), ["better", "better", "undecided: 2 of 3 tasks"]),
    ],
)
def test_a_planned_comparison_is_not_tested_before_all_its_runs_are_there(study, tmp_path, missing, verdicts):
    tasks = ["glue/sst2", "glue/rte", *(["glue/cola"] if missing[0] == "glue/cola" else [])]
    spec = PLANNED | {"full": PLANNED["full"] | {"blocks": [[f"task={task}"] for task in tasks]}}

    def right(label, settings):
        lacks = settings.task.name == missing[0] and missing[1] in (None, settings.seed)
        return None if lacks else 60 + settings.seed + (20 + settings.seed % 2) * (label == "Dual LoRA")

    experiment, outcomes = study(spec, right)
    text = write_report(experiment, outcomes, tmp_path)
    lines = rows_of(text)[1 : len(verdicts) + 1]
    assert [line[-2] for line in lines] == verdicts
    assert all((line[8] == "–") == ("of" in line[-2]) for line in lines)  # p, corrected
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    assert listed["p"].isna().tolist() == ["of" in verdict for verdict in verdicts]


def test_what_is_not_planned_is_exploratory_and_not_corrected(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 60 + s.seed + (20 + s.seed % 2) * (label == "Dual LoRA"))
    text = write_report(experiment, outcomes, tmp_path)
    assert "## Verdicts" not in text and "Not planned, and not corrected for their number" in text
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    larger = listed[["p_predictions", "p_seeds"]].max(axis=1)
    assert not listed["planned"].any() and listed["p"].tolist() == pytest.approx(larger.tolist())


def test_other_baselines_are_compared_with_the_first_outside_the_planned_family(study, tmp_path):
    cells = {"DoRA": ["method=dora"], "LoRA+": ["method=lora_plus"], "Low": ["method=lora", "method.alpha=1"]}
    spec = PLANNED | {"cells": cells | PLANNED["cells"], "baselines": ["LoRA", "DoRA", "LoRA+"], "floors": ["Low"]}
    scores = {"LoRA": 90, "DoRA": 80, "LoRA+": 85, "Dual LoRA": 75, "Low": 50}
    experiment, outcomes = study(spec, lambda label, s: scores[label])
    write_report(experiment, outcomes, tmp_path)
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    found = {(row.method, row.baseline): (row.planned, round(row.difference)) for row in listed.itertuples()}
    planned = {("Dual LoRA", name): (True, 75 - scores[name]) for name in experiment.baselines}
    assert found == planned | {("DoRA", "LoRA"): (False, -10), ("LoRA+", "LoRA"): (False, -5)}


def test_a_task_that_no_row_learns_leaves_the_mean(study, tmp_path):
    spec = PLANNED | {"full": PLANNED["full"] | {"blocks": [[f"task=glue/{name}"] for name in ("sst2", "rte", "mrpc")]}}
    low = "glue/mrpc"  # of which the most frequent class gives 50
    experiment, outcomes = study(spec, lambda label, s: 55 if s.task.name == low else 80 + 5 * (label == "Dual LoRA"))
    text = write_report(experiment, outcomes, tmp_path)
    floors = {line[0]: line for line in rows_of(text) if line[1] == "majority class"}
    assert {name: line[-1] for name, line in floors.items()} == {
        "glue/sst2": "learned",
        "glue/rte": "learned",
        low: "not learned",
    }
    assert floors[low][2] == "50.0" and floors["glue/rte"][3:5] == ["Dual LoRA", "+35.0"]
    assert "not learned, and left out of means: glue/mrpc (roberta-base)" in text
    means = [line for line in rows_of(text) if line[0].startswith("mean of")]
    assert {line[0] for line in means} == {"mean of 2 tasks"}
    values = pd.read_csv(tmp_path / "table.csv")
    assert set(values.loc[values["column"] == "mean", "value"]) == {80, 85}


def test_a_task_that_no_row_learns_gets_no_verdict_and_changes_none(study, tmp_path):
    """Equal failures have an equivalence p of 0, which would take the strictest step from a task that was learned."""
    right = {0: 80, 1: 81, 2: 80, 3: 79, 4: 80}  # a difference whose equivalence has p = 0.04, alone
    changes = {0: 1, 1: -1, 2: 0, 3: 1, 4: -1}
    experiment, outcomes = study(
        PLANNED,
        lambda label, s: 50 if s.task.name == "glue/rte" else right[s.seed] + changes[s.seed] * (label == "Dual LoRA"),
    )
    head, *lines = rows_of(write_report(experiment, outcomes, tmp_path))
    (rte,) = [dict(zip(head, line, strict=True)) for line in lines[:2] if line[0] == "glue/rte"]
    assert rte["verdict"] == "undecided: task not learned" and rte["Holm, equivalence"] == "–"
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE).set_index("task")
    alone = compute_equivalence_p(list(changes.values()), 1.0)
    assert listed.loc["glue/sst2", "p_equivalent"] == pytest.approx(3 * alone)  # the mean counts, too
    assert np.isnan(listed.loc["glue/rte", "p_equivalent"]) and np.isnan(listed.loc["glue/rte", "p"])


def test_a_published_average_needs_all_of_its_tasks(study, tmp_path):
    names = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    whole = GLUE | {"full": GLUE["full"] | {"blocks": [[f"task=glue/{name}"] for name in names], "seeds": [0]}}
    metrics = {"accuracy": 0.8, "matthews": 0.8, "pearson": 0.8}
    experiment, outcomes = study(whole, lambda label, s: 80, metrics=metrics)
    cola, lost = ("roberta-base", "glue/cola"), {"a part is missing or not learned"}
    for unranked, found in ({}, {80.0}), ({cola: UNLEARNED}, lost), ({cola: UNSETTLED}, lost):
        values = build_frame(experiment, outcomes, unranked)
        average = values[values["column"] == "avg"]
        assert len(average) and set(average["value"].round(9).dropna()) | set(average["reason"].dropna()) == found


def test_a_floor_row_raises_the_floor_and_is_compared_with_nothing(study, tmp_path):
    cells = GLUE["cells"] | {"head only": ["method=lora", "method.rank=1"]}
    spec = PLANNED | {"cells": cells, "floors": ["head only"]}
    right = {"LoRA": 82, "Dual LoRA": 83, "head only": 80}
    experiment, outcomes = study(spec, lambda label, s: right[label])
    text = write_report(experiment, outcomes, tmp_path)
    listed = rows_of(text.partition("Floors.")[2].partition("\n## ")[0])[1:]
    assert {(line[0], line[1]): line[-1] for line in listed} == {
        (f"glue/{task}", floor): "not learned" for task in ("sst2", "rte") for floor in ("head only", "majority class")
    }
    assert "head only - LoRA" not in text and "mean of" not in "".join(line[0] for line in rows_of(text))


def test_floors_stand_for_the_rows_of_their_column_and_the_clearest_row_is_named_by_its_place(study, tmp_path):
    ratios = "method.magnitude_ratio=0.25,0.5"
    cells = {
        "LoRA": ["method=lora"],
        "Dual LoRA": ["method=dual_lora", ratios],
        "Frozen": ["method=dual_lora", ratios, "+method.peft.freeze=direction"],
        "Head only": ["method=head_only"],
    }
    spec = RATIOS | {"cells": cells, "floors": ["Frozen", "Head only"], "full": RATIOS["full"] | {"seeds": [0, 1]}}
    scores = {("Frozen", 0.25): 60, ("Frozen", 0.5): 75, ("Dual LoRA", 0.25): 90, ("Dual LoRA", 0.5): 80}
    scores |= {("LoRA", None): 70, ("Head only", None): 55}
    experiment, outcomes = study(spec, lambda label, s: scores[label, s.method.magnitude_ratio])
    floors = {floor.name: floor for floor in find_floors(experiment, outcomes, Predictions())}
    assert {name: (round(floor.score), floor.best) for name, floor in floors.items()} == {
        "Frozen, magnitude ratio 0.25": (60, "Dual LoRA, magnitude ratio 0.25"),
        "Frozen, magnitude ratio 0.5": (75, "Dual LoRA, magnitude ratio 0.5"),
        "Head only": (55, "Dual LoRA, magnitude ratio 0.25"),
        "majority class": (50, "Dual LoRA, magnitude ratio 0.25"),
    }
    assert floors["Frozen, magnitude ratio 0.5"].above == pytest.approx(5)
    assert not find_unranked(list(floors.values()))  # the row at 0.25 beats the floors that stand for it
    high, low = floors["Frozen, magnitude ratio 0.5"], floors["Head only"]
    assert find_unranked([high, replace(low, beaten_by=high.beaten_by)]) == {("roberta-base", "glue/rte"): UNLEARNED}
    (note,) = [
        n for n in describe_failed_runs(experiment, outcomes, [replace(high, score=85), low]) if "Dual LoRA" in n
    ]
    row, floor = "Dual LoRA, magnitude ratio 0.5 on glue/rte", "Frozen, magnitude ratio 0.5"
    assert note == f"{row}: 2 of 2 runs score no better than {floor} (seeds 0, 1)"
    table, *_ = iterate_floor_blocks(list(floors.values()))
    assert "clearest above" in table.cells and "by most standard errors" in table.caption


def test_runs_that_learned_nothing_are_told_by_row_task_and_seed(study, tmp_path):
    def right(label, settings):
        fails = label == "LoRA" and settings.task.name == "glue/rte" and settings.seed in (1, 4)
        return 50 - settings.seed if fails else 80  # the most frequent class gives 50

    experiment, outcomes = study(PLANNED, right)
    text = write_report(experiment, outcomes, tmp_path)
    told = [line for line in text.splitlines() if "score no better than" in line]
    assert told == ["- LoRA on glue/rte: 2 of 5 runs score no better than majority class (seeds 1, 4)"]


@pytest.mark.parametrize("seeds", [5, 6, 7])
def test_runs_at_the_floor_are_told_whatever_the_number_of_seeds(seeds, study, tmp_path):
    """The floor is a mean over seeds, and sums of floats are not exact."""
    spec = PLANNED | {"full": GLUE["full"] | {"seeds": list(range(seeds)), "blocks": [["task=glue/rte"]]}}
    experiment, outcomes = study(spec, lambda label, s: 88 if label == "LoRA" and s.seed == 1 else 170, of=175)
    told = [
        line for line in write_report(experiment, outcomes, tmp_path).splitlines() if "score no better than" in line
    ]
    assert told == [f"- LoRA on glue/rte: 1 of {seeds} runs score no better than majority class (seeds 1)"]


def test_runs_that_rows_share_are_counted_once(study, tmp_path):
    cells = {"LoRA": ["method=lora"], "the same": ["method=lora"], "Dual LoRA": ["method=dual_lora"]}
    experiment, outcomes = study(GLUE | {"cells": cells}, lambda label, s: 80 if label != "Dual LoRA" else None)
    text = write_report(experiment, outcomes, tmp_path)
    assert "runs: 4 of 8 finished" in text and "4 of 4 runs are of committed code" in text


def test_a_planned_row_keeps_its_place_in_the_family_beside_an_equal_one(study, tmp_path):
    cells = {"LoRA": ["method=lora"], "the same": ["method=dual_lora"], "Dual LoRA": ["method=dual_lora"]}
    experiment, outcomes = study(PLANNED | {"cells": cells}, lambda label, s: 80 + s.seed % 2 * (label != "LoRA"))
    found = compare_outcomes(experiment, outcomes, Predictions())
    assert found.family == 3 and {one.label for one in found.all} == {"Dual LoRA"}


def test_planned_rows_that_may_get_other_rates_are_two(study):
    cells = {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"], "wide": ["method=dual_lora"]}
    grid = {"LoRA": [1e-4, 2e-4], "Dual LoRA": [1e-3, 2e-3], "wide": [1e-3, 8e-3]}
    spec = PLANNED | {"cells": cells, "planned": ["Dual LoRA", "wide"]}
    tuned = PLANNED["full"] | {"tune": {"holdout": 50, "grid": grid, "seeds": [1000]}}
    experiment, outcomes = study(spec | {"full": tuned}, lambda label, s: None)
    assert len(list_planned(experiment, outcomes)) == 6


def test_runs_of_a_version_with_another_score_are_reported(study, tmp_path):
    experiment, outcomes = study(PLANNED, lambda label, s: 80, metric="f1", metrics={"f1": 0.8}, task_version=0)
    assert "score no better than" not in write_report(experiment, outcomes, tmp_path)


def test_one_seed_decides_nothing_and_other_examples_cannot_be_compared(study, tmp_path):
    one = PLANNED | {"full": GLUE["full"] | {"seeds": [0]}}
    experiment, outcomes = study(one, lambda label, s: 60 + 20 * (label == "Dual LoRA"))
    lines = rows_of(write_report(experiment, outcomes, tmp_path))[1:4]
    assert [line[-2] for line in lines] == ["undecided: under 5 seeds"] * 3 and lines[0][5] == lines[0][-1] == "–"
    predictions = outcomes[0].record.folder / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace("v-0", "w-0"))
    assert "cannot be compared" in write_report(experiment, outcomes, tmp_path)


def test_a_report_has_the_same_bytes_whatever_the_locales_encoding(study, tmp_path, monkeypatch):
    experiment, outcomes = study(GLUE, lambda label, s: 80 if s.seed else None)
    write_report(experiment, outcomes, tmp_path / "utf-8")
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "latin-1")  # what pathlib asks
    write_report(experiment, outcomes, tmp_path / "latin-1")
    for name in ("table.md", "table.tex", "report.html", "table.csv", DIFFERENCES_FILE):
        assert (tmp_path / "latin-1" / name).read_bytes() == (tmp_path / "utf-8" / name).read_bytes()


def test_lines_of_predictions_end_at_line_feeds_alone(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 60 + s.seed + 20 * (label == "Dual LoRA"))
    for outcome in outcomes:
        path = outcome.record.folder / "predictions.jsonl"
        path.write_text(path.read_text().replace('"answer"', '"output": "a\u2028b\x85c", "answer"'))
    assert "cannot be compared" not in write_report(experiment, outcomes, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": {"model_files": {"model.safetensors": "f00d"}}}, "different model files"),
        ({"data": {"train": {"origin": "t", "rows": 9, "sha256": "f00d"}}}, "different training rows"),
        ({}, None),  # of which it is not known
    ],
)
def test_runs_on_other_files_are_not_compared(study, tmp_path, changes, said):
    files = {"environment": {"model_files": {"model.safetensors": "beef"}}}
    rows = {"data": {"train": {"origin": "t", "rows": 9, "sha256": "beef"}}}
    experiment, outcomes = study(GLUE, lambda label, s: 80 + 5 * (label == "Dual LoRA"), **files, **rows)
    odd = outcomes[0]
    assert (odd.label, odd.settings.seed, odd.settings.task.name) == ("LoRA", 0, "glue/sst2")
    shutil.rmtree(odd.record.folder)
    finish(odd.settings, 80, **(files | rows | changes if changes else {}))
    text = write_report(experiment, find_outcomes([outcome.cell for outcome in outcomes], "made"), tmp_path)
    assert text.count("cannot be compared") == 2 * (said is not None)  # the task, and the mean over tasks
    assert (said or "") in text
    assert (f"with {said}, which do not compare" in text) == (said is not None)


def test_that_runs_on_two_kinds_of_processor_differ_by_more_than_the_seed_is_said(study, tmp_path):
    alone = write_report(*study(GLUE, lambda label, s: None if s.seed else 80), tmp_path)
    assert "the seed alone" not in alone and "kinds of machine" not in alone
    both = write_report(*study(GLUE, lambda label, s: 80, environment={"processor": "slide rule"}), tmp_path)
    assert "Runs are of 2 kinds of machine, which round differently" in both
    assert "machines: abacus, 1 thread; slide rule, 1 thread" in both


def test_that_a_run_was_resumed_on_another_kind_of_processor_is_said(study, tmp_path):
    earlier = {"earlier_tries": [{"commit": "f00d" * 10}, {"processor": "slide rule", "threads": 2}]}
    resumed = write_report(*study(GLUE, lambda label, s: 80, environment=earlier), tmp_path)
    assert "Runs are of 2 kinds of machine, which round differently" in resumed
    assert "machines: abacus, 1 thread; slide rule, 2 threads\n" in resumed


def test_comparisons_that_pair_runs_of_two_machines_are_named(study, tmp_path):
    def change(outcome):
        outcome.record.write_file("environment.json", outcome.record.read_environment() | {"processor": "slide rule"})

    spec = PLANNED | {"full": PLANNED["full"] | {"blocks": [["task=glue/sst2"], ["task=glue/rte"]]}}
    experiment, outcomes = study(spec, lambda label, s: 80)
    assert "a seed pairs" not in write_report(experiment, outcomes, tmp_path)
    for outcome in outcomes:  # all runs of one task are of another machine: no pair is mixed
        if outcome.settings.task.name == "glue/rte":
            change(outcome)
    assert "a seed pairs" not in write_report(experiment, outcomes, tmp_path)
    change(next(o for o in outcomes if (o.label, o.settings.task.name) == ("LoRA", "glue/sst2")))
    text = write_report(experiment, outcomes, tmp_path)
    assert (
        "a seed pairs runs of different machines (abacus, slide rule), which round differently, in: "
        "Dual LoRA - LoRA (glue/sst2); Dual LoRA - LoRA (mean of 2 tasks)\n"
    ) in text


def test_a_further_set_of_a_task_is_reported_beside_its_main_score(study, tmp_path):
    spec = GLUE | {"full": GLUE["full"] | {"blocks": [["task=glue/mnli"]]}}
    experiment, outcomes = study(spec, lambda label, s: 80)
    assert "mismatched" not in write_report(experiment, outcomes, tmp_path)  # not measured by any run
    for outcome in outcomes:
        outcome.result["metrics"]["mismatched_accuracy"] = 0.7 + 0.1 * (outcome.label == "Dual LoRA")
    text = write_report(experiment, outcomes, tmp_path)
    assert "mismatched_accuracy, glue/mnli: LoRA 70.0 (2), Dual LoRA 80.0 (2)\n" in text
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    assert listed["score"].tolist() == ["accuracy", "mismatched_accuracy"] and not listed["planned"].any()


def test_that_seeds_alone_differ_is_said_of_deterministic_runs_alone(study, tmp_path):
    spec = GLUE | {"full": GLUE["full"] | {"run": [*GLUE["full"]["run"], "deterministic=true"]}}
    text = write_report(*study(spec, lambda label, s: 80), tmp_path)
    assert "deterministic=true in 8 of 8 runs" in text and "the runs of a row differ by the seed alone" in text


@pytest.mark.parametrize(
    ("words", "rule", "caveat"),
    [
        (["task.checkpoint=last"], "last step", False),
        (["task.checkpoint=last", "train.max_steps=7"], "last step", False),
        (["task.checkpoint=best"], "best epoch by the reported rows", True),
        (["task.checkpoint=best", "eval.development_rows=9"], "best epoch by 9 training rows set apart", False),
        (
            ["task.checkpoint=last", "eval.development_rows=9", "train.early_stopping=2"],
            "best epoch by 9 training rows set apart",
            False,
        ),
        (
            ["task.checkpoint=best_loss", "task.validation_rows=12"],
            "step of the lowest loss on 12 training rows set apart, taken every 80 steps",
            False,
        ),
    ],
    ids=str,
)
def test_which_weights_were_scored_is_said(study, tmp_path, words, rule, caveat):
    spec = GLUE | {"full": GLUE["full"] | {"run": [*GLUE["full"]["run"], *words]}}
    text = write_report(*study(spec, lambda label, s: 80, metrics_last_epoch={"accuracy": 0.7}), tmp_path)
    assert f"- scores: on validation, after the {rule}\n" in text
    assert (f"- checkpoint: of glue/rte, glue/sst2 the {rule}" in text) == (rule != "last step")
    assert ("scores, intervals and p do not account for that choice" in text) == caveat


def test_scores_after_the_last_step_stand_by_task(study, tmp_path):
    run = [*GLUE["full"]["run"], "task.checkpoint=best_loss", "task.validation_rows=12"]
    experiment, outcomes = study(
        GLUE | {"full": GLUE["full"] | {"run": run}},
        lambda label, s: 80,
        clipped_share=0.0,
        metrics_last_epoch={"accuracy": 0.7},
    )
    for outcome in outcomes:
        outcome.result["metrics_last_epoch"] = {"accuracy": 0.6 if outcome.settings.task.name == "glue/rte" else 0.9}
    text = write_report(experiment, outcomes, tmp_path)
    assert "- after the last step instead, glue/sst2: LoRA 90.0 (2), Dual LoRA 90.0 (2)\n" in text
    assert "- after the last step instead, glue/rte: LoRA 60.0 (2), Dual LoRA 60.0 (2)\n" in text
    assert "; where it is 0, nothing was clipped at the logged steps\n" in text


def test_rates_stand_by_what_heads_rows_and_columns(study, tmp_path):
    tune = {"holdout": 9, "relative": True, "grid": {"LoRA": [1, 2], "Dual LoRA": [1, 2]}}
    spec = GLUE | {"columns": "method.rank", "published": [], "tune": tune}
    ranks = [["method.rank=4", "train.lr=1e-3"], ["method.rank=8", "train.lr=2e-3"]]
    spec |= {"full": GLUE["full"] | {"seeds": [0], "run": ["model=roberta-base", "task=glue/rte"], "blocks": ranks}}
    experiment = Experiment.from_content("made", spec)
    cells = experiment.compose_cells([])
    for cell in cells:
        for number, trial in enumerate(cell.tuning):
            finish(trial, 50 + 9 * (number == (trial.method.rank == 8)))
    outcomes = find_outcomes(cells, "made")
    text = write_report(experiment, outcomes, tmp_path)
    assert "LoRA: 0.001, 0.004; chosen from 1, 2 times the rate of its protocol by the main score" in text
    lines = [line for line in rows_of(text) if line[:2] == ["roberta-base", "glue/rte"]]
    rates = (("4", "0.001 (edge)"), ("8", "0.004 (edge)"))
    assert lines == [["roberta-base", "glue/rte", rank, rate, rate] for rank, rate in rates]


def test_a_tie_of_rates_and_unfinished_trials_are_told(study, tmp_path):
    tune = {"holdout": 9, "grid": {label: [1e-3, 2e-3, 4e-3] for label in ("LoRA", "Dual LoRA")}}
    spec = GLUE | {"tune": tune, "full": GLUE["full"] | {"seeds": [0], "blocks": [["task=glue/rte"]]}}
    experiment = Experiment.from_content("made", spec)
    cells = experiment.compose_cells([])
    for trial in {repr(t): t for cell in cells for t in cell.tuning}.values():
        if trial.method.name == "dual_lora":
            finish(trial, {1e-3: 60, 2e-3: 70, 4e-3: 70}[trial.train.lr])
    text = write_report(experiment, find_outcomes(cells, "made"), tmp_path)
    assert "0.002 (tied with 0.004)" in text and "seed 1000; ties go to the lowest rate" in text
    assert "6 more runs choose learning rates, 3 of which count so far" in text


def test_values_that_differ_in_a_late_digit_head_columns_of_their_own(study, tmp_path):
    rates = "0.00123456,0.001234561"
    spec = RATIOS | {"columns": "train.lr", "published": [], "baselines": []}
    experiment, outcomes = study(
        spec | {"cells": {"LoRA": ["method=lora", f"train.lr={rates}"]}},
        lambda label, s: 60 + 10 * (s.train.lr > 0.0012345605),
    )
    head, line = rows_of(write_report(experiment, outcomes, tmp_path))[:2]
    assert head[2:4] == ["0.00123456", "0.001234561"] and line[2:4] == ["60.0 ± 0.0 (3)", "**70.0 ± 0.0 (3)**"]
    text = (tmp_path / "table.md").read_text()
    assert "learning rate, LoRA: 0.00123456, 0.001234561; given" in text
    assert f"| train.lr | {rates.replace(',', ', ')} |" in re.sub(" +", " ", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.001, "0.001"), (1e-5, "1e-05"), (2 / 3, "0.666667"), (0.00123456789, "0.00123456789"), (2, "2")],
)
def test_a_setting_is_printed_with_the_digits_it_was_given_with(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["0.001", "0.0001", "0.003", "1e-05", "0.0003", "0.0002"], "1e-05 to 0.003 (6 values)"),
        (["16", "4", "8"], "16, 4, 8"),
        (list("bcadfe"), "b, c, a, d, f and 1 more"),
        ([], "–"),
    ],
)
def test_many_values_of_a_setting_are_told_by_their_ends(values, text):
    assert summarize_values(values) == text


@pytest.mark.parametrize(
    ("dropouts", "said"),
    [
        ({}, "0"),
        ({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}, "0.1"),
        ({"resid_pdrop": 0.1, "attn_pdrop": 0.0}, "resid_pdrop 0.1, attn_pdrop 0"),
        (None, None),
    ],
)
def test_the_dropout_of_the_model_is_told_where_it_is_recorded(dropouts, said, study, tmp_path):
    known = {} if dropouts is None else {"dropouts": dropouts}
    ran = write_report(*study(GLUE, lambda label, s: 80, **known), tmp_path).partition("## As it ran")[2]
    assert ("dropout of the model" in ran) == (said is not None)
    assert {line[-1] for line in rows_of(ran)[1:]} == {said or "–"}


def test_published_points_of_two_printings_are_two_lines():
    spec = GLUE | {"columns": "method.rank", "published": ["dora_table15_rank_robustness"]}
    points = find_published_points(Experiment.from_content("made", spec))
    assert points["llama-7b lora paper [published]"][32] == 74.7
    assert points["llama-7b dora readme [published]"].to_dict() == {64: 76.8}


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        ({"environment": {"uncommitted_changes": True}}, "‡"),
        ({"task_version": 0}, "†"),
        ({"task_version": None}, "†"),
        ({"warnings": ["7 of 9 outputs hold no answer"]}, "!"),
    ],
)
def test_runs_that_deserve_doubt_are_marked(study, tmp_path, changes, mark):
    experiment, outcomes = study(GLUE, lambda label, s: 80 if s.seed == 0 and label == "LoRA" else None, **changes)
    text = write_report(experiment, outcomes, tmp_path)
    assert f"80.0 (1){mark} [a]" in text and f"- {mark}: {MARKS[mark]}" in text
    clean, outcomes = study(GLUE, lambda label, s: 80)
    scores = [cells for cells in rows_of(write_report(clean, outcomes, tmp_path)) if cells[1] == "Dual LoRA"]
    assert scores and mark not in "".join(scores[0])


def test_a_missing_part_leaves_the_mean_empty_and_a_failure_says_why(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: None if s.task.name.endswith("rte") else 80)
    (failed,) = [c for c in outcomes if c.result is None and c.label == "LoRA" and c.settings.seed == 0]
    record = Run.prepare(failed.settings).record
    record.folder.mkdir(parents=True)
    record.write_file("config.yaml", yaml.safe_dump(asdict(failed.settings)))
    record.write_failure(RuntimeError("the loss is nan at step 3"))
    outcomes = find_outcomes(experiment.compose_cells([]), "made")
    _, ours, _, dual, *_ = rows_of(write_report(experiment, outcomes, tmp_path))
    assert ours[2:5] == ["80.0 ± 0.0 (2)", "– [a, b]", "– [c]"] and dual[3] == "– [b]"
    assert "[a]: failed: the loss is nan at step 3" in (tmp_path / "table.md").read_text()


def test_a_setting_heads_columns_and_what_lacks_it_has_its_own(study, tmp_path):
    experiment, outcomes = study(RATIOS, lambda label, s: 70 + s.seed + (s.method.magnitude_ratio or 0) * 8)
    head, lora, dual, *_ = rows_of(write_report(experiment, outcomes, tmp_path))
    assert head[:5] == ["task", "method", "no magnitude ratio", "0.25", "0.5"]
    assert lora[2:5] == ["71.0 ± 1.0 (3)", "", ""] and dual[2:5] == ["", "73.0 ± 1.0 (3)", "**75.0 ± 1.0 (3)**"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    compared = [line[2:5] for line in rows_of("\n".join(lines)) if line[3:4] == ["Dual LoRA - LoRA"]]
    assert compared == [["0.25", "Dual LoRA - LoRA", "+2.0"], ["0.5", "Dual LoRA - LoRA", "+4.0"]]
    values = pd.read_csv(tmp_path / "table.csv")
    assert len(values) == 9 and set(values.columns) >= {"task.name", "label", "column", "seed", "value", "run"}


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.cells = [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        self.cells += tag == "td"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_is_the_same_twice(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 80 + s.seed)
    for folder in ("a", "b"):
        write_report(experiment, outcomes, tmp_path / folder)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("a", "b"))
    assert first == second
    page = Page()
    page.feed((tmp_path / "a" / "report.html").read_text())
    assert not page.open and page.cells > 20
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_latex_prints_bars_and_angles_in_any_encoding():
    assert escape_latex("570 | 569 < 576 >") == r"570 \textbar{} 569 \textless{} 576 \textgreater{}"
    assert escape_latex(r"{'a': \b}_^~%") == r"\{'a': \textbackslash{}b\}\_\^{}\~{}\%"


def test_latex_escapes_what_it_must():
    cells = pd.DataFrame([["a_b & 5 %", "1.0 ± 0.1 (2)‡"], ["– [a]", "{x}$"]], columns=["m#", "s/step"])
    bold = pd.DataFrame([[False, True], [False, False]], columns=cells.columns)
    text = render_latex([Text("no table"), Table(cells, "100 %", bold)], "made")
    for part in (r"a\_b \& 5 \%", r"\textbf{1.0 $\pm$ 0.1 (2)\ddag{}}", r"m\#", r"\toprule", r"\caption{100 \%}"):
        assert part in text
    assert text.count("{") == text.count("}") and "‡" not in text and "–" not in text


def test_latex_has_labels_legends_words_flush_left_and_published_rows_set_off():
    cells = pd.DataFrame(
        [["x", "1.0", "dev"], ["y", "– [a]", "–"], ["z", "3", "test"]], columns=["row", "score", "set"]
    )
    blocks = [Table(cells, "first", aside=frozenset({1})), Text(items=("– [a]: not run",)), Table(cells, "second")]
    first, second = render_latex(blocks, "made").split(r"\end{table}")[:2]
    assert r"\begin{tabular}{lrl}" in first and r"\label{tab:made-1}" in first and r"\label{tab:made-2}" in second
    assert "-- [a]: not run" in first and "not run" not in second
    assert r"\textit{y} & \textit{-- [a]}" in first and r"\addlinespace z" in first and "textit" not in second


def test_the_page_sets_words_left_and_lets_wide_tables_scroll():
    cells = pd.DataFrame([["x", "1.0 ± 0.2 (2)", "dev"]], columns=["row", "score", "set"])
    text = render_html([Table(cells, "a table")], "page")
    assert '<div class="wide"><table>' in text
    assert '<td class="words">x</td><td>1.0 ± 0.2 (2)</td><td class="words">dev</td>' in text


def test_a_report_removes_figures_that_it_no_longer_has(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 80)
    (tmp_path / "ranks_0.png").write_bytes(b"old")
    report_write.remove_stale_figures(tmp_path, {"ranks_0"})
    (tmp_path / "mine.png").write_bytes(b"mine")
    write_report(experiment, outcomes, tmp_path)
    drawn = {f"{name}.{kind}" for name in ("forest", "figure", "cost") for kind in ("png", "pdf")}
    assert {path.name for path in tmp_path.glob("*.p*")} == {*drawn, "mine.png"}


def test_verdicts_come_first_and_published_figures_last(study, tmp_path):
    experiment, outcomes = study(PLANNED | {"limit": "one rate"}, lambda label, s: 60 + s.seed)
    text = write_report(experiment, outcomes, tmp_path)
    heads = ["Limit: one rate", "## Verdicts", "## Runs", "## Power", "## Hyper-parameters", "## Reproducibility"]
    places = [text.index(head) for head in [*heads, "## Set beside"]]
    assert places == sorted(places)


def test_hyper_parameters_stand_by_method(study, tmp_path):
    experiment, outcomes = study(RATIOS, lambda label, s: 70)
    lines = {line[0]: line[1:] for line in rows_of(write_report(experiment, outcomes, tmp_path))}
    assert lines["method.magnitude_ratio"] == ["–", "0.25, 0.5"]
    assert lines["train.schedule"] == ["linear"] and "method.name" not in lines
    assert lines["model.dtype"] == ["float32"] and lines["model.adapt"] == [" ".join(outcomes[0].settings.model.adapt)]
    assert lines["train.epochs"] == ["3"] and lines["hardware.devices"] == ["1"]
    generation = {"task.num_beams", "task.max_new_tokens", "task.length_penalty", "task.loss_on_prompt", "model.chat"}
    idle = generation | {"task.epochs", "task.batch_size", "hardware.sharding", "model.dropout", "model.hub"}
    assert not idle & lines.keys()


def test_hyper_parameters_without_effect_are_not_listed(study, tmp_path):
    cells = GLUE["cells"] | {"Full": ["method=full"], "Head only": ["method=head_only"]}
    run = ["model=roberta-base", "task=glue/rte", "eval.before=false", "train.max_steps=7", "train.head_lr=1e-3"]
    spec = GLUE | {"cells": cells, "floors": ["Head only"], "full": {"seeds": [0], "run": [*run, "model.dropout=0.2"]}}
    text = write_report(*study(spec, lambda label, s: 80), tmp_path)
    lines = {line[0]: line[1:] for line in rows_of(text.partition("## Hyper-parameters")[2])}
    assert lines["train.max_steps"] == ["7"] and "train.epochs" not in lines and lines["model.dropout"] == ["0.2"]
    assert lines["model.adapt"] == ["q v", "q v", "–", "–"] and lines["train.head_lr"] == ["0.001"]
    assert lines["train.lr"][:3] == ["0.002", "0.002", "0.0001"] and lines["train.lr"][3] == "–"


def test_the_rate_of_a_head_that_trains_alone_is_its_own(study, tmp_path):
    cells = GLUE["cells"] | {"Head only": ["method=head_only"], "Untrained": ["method=none"]}
    run = ["model=roberta-base", "eval.before=false", "train.head_lr=1e-3"]
    tune = {"holdout": 9, "grid": {"LoRA": [1e-3, 2e-3], "Dual LoRA": [1e-3, 2e-3]}}
    spec = GLUE | {"cells": cells, "tune": tune, "full": {"seeds": [0], "run": run, "blocks": [["task=glue/rte"]]}}
    rates = {"Head only": {"head": 1e-3}, "Untrained": {}}
    experiment = Experiment.from_content("made", spec)
    for cell in experiment.compose_cells([]):
        if cell.label in rates:
            finish(cell.settings, 60, learning_rates=rates[cell.label])
    outcomes = find_outcomes(experiment.compose_cells(["method=head_only,none"]), "made")
    text = write_report(experiment, outcomes, tmp_path)
    assert "learning rate, Head only: 0.001, of the head, which alone trains; given, not tuned here" in text
    assert "learning rate, Untrained: none, nothing trains" in text
    assert "learning rate, LoRA" not in text and "not tuned: Head only, Untrained\n" in text
    assert ["roberta-base", "glue/rte", "0.001", "–"] in rows_of(text)
    values = pd.read_csv(tmp_path / "table.csv").set_index("label")["lr"].dropna()
    assert values.to_dict() == {"Head only": 1e-3}


def test_rows_that_were_not_asked_for_have_no_learning_rate(study, tmp_path):
    experiment, _ = study(GLUE, lambda label, s: 80)
    outcomes = find_outcomes(experiment.compose_cells(["method=lora"]), "made")
    text = write_report(experiment, outcomes, tmp_path)
    assert "learning rate, LoRA: " in text and "learning rate, Dual LoRA" not in text


def test_the_checklist_is_counted_from_the_records(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 80 if s.seed else None)
    text = write_report(experiment, outcomes, tmp_path)
    assert "- runs: 4 of 8 finished; seeds 0, 1" in text and "- tuning: none; one given rate for each row" in text
    assert "- code: 4 of 4 runs are of committed code" in text
    assert "deterministic=true in 0 of 4 runs" in text and "- scores: on validation, after the last step" in text


@pytest.mark.parametrize(("score", "lines", "title"), [(50, [], "glue/rte (floor: 50.0)"), (69, [69], "glue/rte")])
def test_a_floor_far_below_does_not_stretch_the_axis(study, score, lines, title):
    cells = RATIOS["cells"] | {"head only": ["method=lora", "method.rank=1"]}
    experiment, outcomes = study(
        RATIOS | {"cells": cells, "floors": ["head only"]},
        lambda label, s: score if label == "head only" else 70 + s.seed,
    )
    floor = Floor(("roberta-base", "glue/rte"), "head only", score, "LoRA", 1.0, 0.1, frozenset({("LoRA", ())}))
    axes = draw_results(experiment, build_frame(experiment, outcomes), outcomes, [floor]).axes[0]
    assert axes.get_ylim()[1] - axes.get_ylim()[0] < 10
    assert [line.get_ydata()[0] for line in axes.get_lines() if line.get_label() == "floor"] == lines
    assert axes.get_title() == title


def test_equal_lines_and_points_stay_visible_in_a_figure(study):
    same = RATIOS | {"cells": {**RATIOS["cells"], "DoRA": ["method=dora"], "again": RATIOS["cells"]["Dual LoRA"]}}
    experiment, outcomes = study(same, lambda label, s: 70 + s.seed)
    drawn = draw_results(experiment, build_frame(experiment, outcomes), outcomes, [])
    axes = drawn.axes[0]
    flat = [line for line in axes.get_lines() if line.get_label() in ("LoRA", "DoRA")]
    assert len({line._dash_pattern[0] for line in flat}) == 2
    left, right = (bars.lines[0] for bars in axes.containers)
    assert list(left.get_xdata()) == list(right.get_xdata()) == [0.25, 0.5]
    at = [line.get_transform().transform((0.25, 71))[0] for line in (left, right)]
    assert at[1] - at[0] == pytest.approx(4 / 72 * drawn.dpi)
    assert axes.get_ylabel() == "accuracy, %" and axes.get_xscale() == "linear"
    assert axes.get_xlim()[0] < 0.25 and axes.get_xlim()[1] > 0.5
    (legend,) = drawn.legends
    assert describe_spread(experiment, build_frame(experiment, outcomes)) == (
        "small dots: 3 seeds each; large ones: their mean; bars: 95 % t-interval over seeds"
    )
    assert len(legend.get_texts()) > 3 and legend.get_window_extent().width < drawn.bbox.width


def test_bars_are_t_intervals_and_two_seeds_have_none():
    assert compute_half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5)
    assert compute_half_interval([1.0, 9.0]) == 0


def test_learning_rates_have_a_logarithmic_axis():
    axes = Figure().subplots()
    set_setting_axis(axes, "train.lr", pd.Series([5e-5, 2e-3]))
    assert axes.get_xscale() == "log"
    set_setting_axis(axes, "method.rank", pd.Series([4.0, 256.0]))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "256"]


def test_the_csv_holds_every_value(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 80 + s.seed)
    write_report(experiment, outcomes, tmp_path)
    values = pd.read_csv(tmp_path / "table.csv")
    runs = values.dropna(subset="run")
    for _, row in runs.iterrows():
        result = json.loads((paths.RUNS / "made" / row["run"] / "result.json").read_text())
        assert row["value"] == pytest.approx(100 * result["metrics"]["accuracy"])
    assert len(runs) == 8 and len(values) == 12


# Families of comparisons


@pytest.mark.slow
def test_one_difference_of_120_can_be_found(runs_folder, tmp_path):
    """Each of 2000 resamples alone could find none: 120 / 2001 is more than 0.05."""
    experiment = Experiment.from_content("made", RATIOS | {"planned": ["Dual LoRA"]})
    base = [
        load_settings(["model=roberta-base", "task=glue/rte", f"method={name}", "study=made"])
        for name in ("lora", "dual_lora")
    ]
    ratios = [None, *(number / 240 for number in range(1, 121))]
    cells = []
    for ratio in ratios:
        settings = base[ratio is not None]
        method = replace(settings.method, magnitude_ratio=ratio)
        label = "LoRA" if ratio is None else "Dual LoRA"
        cells += [Cell(label, replace(settings, method=method, seed=seed)) for seed in range(5)]
    for cell in cells:
        finish(cell.settings, 80 if cell.settings.method.magnitude_ratio == 0.5 else 60)
    write_report(experiment, find_outcomes(cells, "made"), tmp_path)
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    assert len(listed) == 120 and listed["planned"].all()
    found = listed[listed["verdict"] == "better"]
    assert found["method.magnitude_ratio"].tolist() == [0.5] and found["difference"].tolist() == pytest.approx([20])


def test_a_run_is_not_compared_with_a_baseline_of_another_column_while_its_own_is_missing(study):
    spec = RATIOS | {"columns": "train.max_examples", "published": []}
    sizes = ["train.max_examples=50,null"]
    spec |= {"cells": {"LoRA": ["method=lora", *sizes], "Dual LoRA": ["method=dual_lora", *sizes]}}
    experiment, outcomes = study(spec, lambda label, s: None if label == "LoRA" and s.train.max_examples else 70)
    assert [match.place for match in iterate_matches(experiment, outcomes)] == [{"train.max_examples": None}]


def test_rows_that_are_the_same_runs_are_compared_once(study, tmp_path):
    held = RATIOS["cells"] | {"held": ["method=dual_lora", "method.alpha=16", "method.magnitude_ratio=0.5"]}
    experiment, outcomes = study(RATIOS | {"cells": held}, lambda label, s: 70)
    assert {outcome.settings.method.alpha for outcome in outcomes if outcome.label != "LoRA"} == {16}
    found = [(match.label, match.place) for match in iterate_matches(experiment, outcomes)]
    assert found == [("Dual LoRA", {"method.magnitude_ratio": ratio}) for ratio in (0.25, 0.5)]


SETS = {
    "title": "Commonsense",
    "rows": ["model.name"],
    "columns": "published",
    "published": ["dora_table1_commonsense"],
    "baselines": ["LoRA"],
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"]},
    "full": {"seeds": [0, 1], "run": ["model=tiny-llama", "task=commonsense"]},
}


def finish_sets(settings, right: dict[str, int], of: int = 100) -> None:
    """Write the record of a run on the eight commonsense sets: `right` of each, 60 where it does not say."""
    task = tasks.load("commonsense")
    rows = [
        {"split": name, "id": f"{name}-{i}", "gold": "x", "answer": answer, "lenient_answer": answer, "score": score}
        for name in task.eval_splits
        for i in range(of)
        for score in [float(i < right.get(name, 60))]
        for answer in ["x" if score else "y"]
    ]
    rows = [row | {"lenient_score": row["score"]} for row in rows]
    scores = task.score({name: [row for row in rows if row["split"] == name] for name in task.eval_splits})
    finish(settings, 1, metrics=scores).write_lines("predictions.jsonl", rows)


def test_the_sets_of_commonsense_are_compared_alone_and_count_as_tasks(runs_folder, tmp_path):
    experiment = Experiment.from_content("made", SETS)
    cells = experiment.compose_cells([])
    for cell in cells:
        finish_sets(cell.settings, {"boolq": 90, "piqa": 65} if cell.label == "Dual LoRA" else {})
    text = write_report(experiment, find_outcomes(cells, "made"), tmp_path)
    lines = [line for line in rows_of(text) if line[0] == "commonsense"]
    assert [line[1] for line in lines[:9]] == ["average", *tasks.load("commonsense").eval_splits]
    assert "Exploratory differences by set and by other scores" in text
    assert "mean of 8 tasks" not in text  # eight sets of one training are one observation
    listed = pd.read_csv(tmp_path / "differences.csv").set_index("score")
    assert len(listed) == 9 and listed["difference"]["average"] == pytest.approx(4.375)
    assert listed["difference"]["boolq"] == pytest.approx(30) and set(listed["seeds"]) == {2}
    assert set(listed["verdict"]) == {"undecided"}
    numbers = re.findall(r"\d+\.\d+", (tmp_path / "differences.csv").read_text())
    assert max(len(number.replace(".", "").lstrip("0")) for number in numbers) == 10  # as many as threads agree on


def list_further(experiment, outcomes):
    return compare_outcomes(experiment, outcomes, Predictions()).further


def test_a_score_that_is_not_resampled_has_no_verdict_and_one_not_measured_is_said_so(study, tmp_path):
    spec = GLUE | {"rows": ["task.name"], "columns": {"accuracy": "accuracy", "slow": "slow"}, "mean": None}
    spec |= {"full": GLUE["full"] | {"seeds": [0, 1, 2, 3, 4]}}
    experiment, outcomes = study(spec, lambda label, s: 80, metrics={"accuracy": 0.8, "slow": 0.5})
    further = list_further(experiment, outcomes)
    assert [(found.score, found.difference.mean, found.p) for found in further] == [("slow", 0, None)] * 2
    assert format_verdict(further[0]) == "undecided: no test on predictions: slow is not resampled"
    for outcome in outcomes:
        outcome.result["metrics"].pop("slow")
    assert format_verdict(list_further(experiment, outcomes)[0]) == "cannot be compared (slow not measured)"


def test_a_score_that_is_no_fraction_is_not_printed_in_percent(study, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tasks.load("glue/sst2")), "unscaled", ("accuracy",))
    experiment, outcomes = study(GLUE, lambda label, s: 60 + s.seed + 20 * (label == "Dual LoRA"))
    lines = rows_of(write_report(experiment, outcomes, tmp_path))
    (line,) = [line for line in lines if line[:2] == ["glue/rte", "accuracy"] and line[3] == "Dual LoRA - LoRA"]
    assert line[4] == "+0.200"
    floors = [line for line in lines if line[:2] == ["glue/rte", "majority class"]]
    assert [line[2:5] for line in floors] == [["0.50", "Dual LoRA", "+0.31"]]
    (power,) = [line for line in lines if line[1:4] == ["glue/rte", "accuracy", "Dual LoRA - LoRA"]]
    assert power[5] == "0.0000" and all(re.fullmatch(r"\d+\.\d{3}", text) for text in power[6:])
    (mean,) = [line for line in lines if line[0] == "mean of 2 tasks"]
    assert mean[4] == "+0.200"


# Several records of the same settings, trials that failed, files that are damaged


def beside(record: Record, name: str, environment: dict | None = None, **changes) -> Record:
    """Copy a record to another name in its study, with changes of its result and environment."""
    other = Record(record.folder.with_name(name))
    shutil.copytree(record.folder, other.folder)
    other.write_file("result.json", record.read_result() | {"identity": name} | changes)
    other.write_file("environment.json", record.read_environment() | (environment or {}))
    return other


@pytest.mark.parametrize("name", ["0_first", "zz_last"])
@pytest.mark.parametrize(
    ("worse", "environment"),
    [
        ({"task_version": 0}, {"started": "2999-01-01T00:00:00Z"}),
        ({}, {"uncommitted_changes": True, "started": "2999-01-01T00:00:00Z"}),
        ({}, {"uncommitted_changes": None}),
        ({}, {"started": "2001-01-01T00:00:00Z"}),
    ],
)
def test_of_records_of_the_same_settings_the_current_clean_newest_is_shown(study, tmp_path, name, worse, environment):
    spec = GLUE | {"full": GLUE["full"] | {"seeds": [0], "blocks": [["task=glue/rte"]]}}
    started = {"started": "2020-01-01T00:00:00Z"}
    experiment, outcomes = study(spec, lambda label, s: 80, environment=started)
    best = beside(outcomes[0].record, "mm_best")
    other = beside(outcomes[0].record, name, environment, metrics={"accuracy": 0.1}, **worse)
    shutil.rmtree(outcomes[0].record.folder)  # neither has the data and weights that the settings name now
    (shown, _) = find_outcomes([outcome.cell for outcome in outcomes], "made")
    assert shown.record == best and shown.duplicates == ((best, other),)
    text = write_report(experiment, [shown], tmp_path)
    assert f"mm_best (80.0), not {name} (10.0)" in text and "| 80.0 (1) " in text


def test_of_records_of_the_same_settings_that_of_the_named_data_counts(study, tmp_path):
    """For the table's runs and for those that choose a rate, though another is newer."""
    later = {"started": "2999-01-01T00:00:00Z"}
    tune = {"holdout": 9, "grid": {"Dual LoRA": [1e-4, 1e-3]}}
    spec = GLUE | {"tune": tune, "full": GLUE["full"] | {"seeds": [0], "blocks": [["task=glue/rte"]]}}
    experiment, (_, dual) = study(spec, lambda label, s: 80)
    mine = [finish(trial, right) for trial, right in zip(dual.cell.tuning, (60, 70), strict=True)]
    others = [
        beside(record, f"zz_{number}", later, metrics={"accuracy": accuracy})
        for number, (record, accuracy) in enumerate(zip(mine, (0.9, 0.1), strict=True))
    ]
    (shown,) = find_outcomes([dual.cell], "made")
    assert shown.rate == 1e-3 and shown.trials == ((1e-4, 0.6), (1e-3, 0.7))
    assert shown.duplicates == tuple(zip(mine, others, strict=True))
    text = write_report(experiment, [shown], tmp_path)
    assert f"{mine[0].name} (60.0), not zz_0 (90.0); {mine[1].name} (70.0), not zz_1 (10.0)" in text


@pytest.mark.parametrize(("split", "said"), [("train", "training"), ("validation", "scored")])
def test_seeds_that_had_other_rows_do_not_compare(study, tmp_path, split, said):
    experiment, outcomes = study(GLUE, lambda label, s: 80 + 5 * (label == "Dual LoRA"))
    for outcome in outcomes:
        facts = {"origin": "t", "rows": 9, "sha256": "beef" if outcome.settings.seed else "f00d"}
        shutil.rmtree(outcome.record.folder)
        finish(outcome.settings, 80, data={split: facts})
    text = write_report(experiment, find_outcomes([outcome.cell for outcome in outcomes], "made"), tmp_path)
    assert f"runs of glue/rte with different {said} rows, which do not compare: " in text
    assert text.count("cannot be compared") == 3  # both tasks, and the mean over tasks


def test_a_rate_that_diverged_is_the_worst_and_one_that_failed_says_why(study, tmp_path):
    tune = {"holdout": 9, "grid": {"Dual LoRA": [1e-4, 1e-3, 1e-2]}}
    spec = GLUE | {"tune": tune, "full": GLUE["full"] | {"seeds": [0], "blocks": [["task=glue/rte"]]}}
    experiment, (lora, dual) = study(spec, lambda label, s: 80)
    assert dual.reason == "learning rate not chosen yet" and dual.rate is None and lora.rate == lora.settings.train.lr

    def fail(trial, error):
        record = Run.prepare(trial).record
        record.folder.mkdir(parents=True, exist_ok=True)
        record.remove_stale_files()  # as an attempt begins
        record.write_file("config.yaml", yaml.safe_dump(asdict(trial)))
        record.write_failure(error)

    low, middle, high = dual.cell.tuning
    fail(high, UserError("the loss is nan at step 3; take a lower train.lr", diverged=True))
    assert find_outcomes([dual.cell], "made")[0].reason == "learning rate not chosen yet"  # two trials are not done
    assert {t.wandb.job_type for t in dual.cell.tuning} == {"tune"} and low.wandb.tags == ["made", "full"]
    finish(low, 70), finish(middle, 60)
    fail(high, UserError("no room; take less"))
    known = find_outcomes([dual.cell], "made")[0]
    assert known.reason == "learning rate not chosen: failed: no room"
    fail(high, UserError("the loss is nan at step 3; take a lower train.lr", diverged=True))
    known = find_outcomes([dual.cell], "made")[0]
    assert known.rate == 1e-4 and known.diverged == (1e-2,)
    text = write_report(experiment, [lora, known], tmp_path)
    assert "training diverged at 0.01" in text and "(edge): at an edge of the grid" in text
    assert "| roberta-base | glue/rte |" in text and "| 0.0001 (edge) |" in text
    values = pd.read_csv(tmp_path / "table.csv").set_index("label")
    assert values["lr"]["Dual LoRA"] == 1e-4 and values["lr"]["LoRA"] == lora.rate
    for trial in (low, middle):
        (Run.prepare(trial).record.folder / "result.json").unlink()
        fail(trial, UserError("the loss is nan at step 1; take a lower train.lr", diverged=True))
    assert find_outcomes([dual.cell], "made")[0].reason == "learning rate not chosen: failed: the loss is nan at step 1"


def test_any_number_of_reasons_has_letters():
    values = pd.DataFrame({"value": [None] * 800, "reason": [f"failed: step {i}" for i in range(800)]})
    found = list(letter_reasons(values).values())
    assert found[:2] + found[25:28] == ["a", "b", "z", "aa", "ab"] and len(set(found)) == 800


def test_damaged_files_of_a_run_cost_the_report_nothing_else(study, tmp_path, capsys):
    experiment, outcomes = study(GLUE, lambda label, s: 80)
    cells = [outcome.cell for outcome in outcomes]
    assert report_experiment(experiment, cells, False) == 0
    (outcomes[0].record.folder / "environment.json").write_text("{")
    (outcomes[1].record.folder / "predictions.jsonl").unlink()
    (outcomes[2].record.folder / "predictions.jsonl").write_text('{"split": "validation"}\n')
    assert run_experiment(experiment, cells, None) == 2
    shown = capsys.readouterr()
    assert "80.0 (1)" in shown.out and shown.out.count("cannot be compared (") >= 1
    for name in ("environment.json: damaged", f"{outcomes[1].record.name}/predictions.jsonl: missing"):
        assert f"{name}" in shown.out and f"{name}" in shown.err
    assert "not read: " in (tmp_path / "runs" / "made" / "report" / "table.md").read_text()


def test_an_analysis_that_fails_is_told_and_the_report_is_written(study, tmp_path, capsys, monkeypatch):
    spec = GLUE | {"analyse": "ranks", "full": GLUE["full"] | {"seeds": [0], "blocks": [["task=glue/rte"]]}}
    experiment, outcomes = study(spec, lambda label, s: 80)
    monkeypatch.setattr(report_write, "mirror_report", lambda *_: None)
    monkeypatch.setattr("dual_lora.lab.commands.sweep.run_cells", lambda *_: 0)
    assert run_experiment(experiment, [outcome.cell for outcome in outcomes], []) == 2
    shown = capsys.readouterr()
    assert shown.err.count("not analysed: ") == 2 and "| LoRA " in shown.out
    (outcomes[0].record.folder / "analysis.json").write_text("[]")
    assert run_experiment(experiment, [outcome.cell for outcome in outcomes], None) == 2
    assert "The rest of the analyses is missing: " in capsys.readouterr().out


def test_a_bug_in_an_analysis_shows_where_it_is(study, capsys, monkeypatch):
    spec = GLUE | {"analyse": "ranks", "full": GLUE["full"] | {"seeds": [0], "blocks": [["task=glue/rte"]]}}
    experiment, outcomes = study(spec, lambda label, s: 80)
    monkeypatch.setattr(report_write, "mirror_report", lambda *_: None)
    monkeypatch.setattr("dual_lora.lab.commands.sweep.run_cells", lambda *_: 0)
    monkeypatch.setattr("dual_lora.lab.report.analyses.kinds.analyse_missing", lambda *_: 1 / 0)
    assert run_experiment(experiment, [outcome.cell for outcome in outcomes], []) == 1
    said = capsys.readouterr().err
    assert "lambda *_: 1 / 0" in said and "not analysed: " in said
    assert "ZeroDivisionError: division by zero; internal error, please report it" in said


def test_a_report_computes_what_it_says_once(study, monkeypatch):
    experiment, outcomes = study(GLUE, lambda label, s: 80)
    counts = {"compare_outcomes": 0, "find_unreadable": 0}

    def count(name):
        original = getattr(report_write, name)

        def counted(*given):
            counts[name] += 1
            return original(*given)

        monkeypatch.setattr(report_write, name, counted)

    for name in counts:
        count(name)
    monkeypatch.setattr("dual_lora.lab.commands.sweep.run_cells", lambda *_: 0)
    assert run_experiment(experiment, [outcome.cell for outcome in outcomes], []) == 0  # with its mirror
    assert counts == {"compare_outcomes": 1, "find_unreadable": 1}


def test_an_error_in_one_report_does_not_cost_the_next(study, capsys, monkeypatch):
    experiment, outcomes = study(GLUE, lambda label, s: 80)
    whole = write_report
    monkeypatch.setattr(report_write, "write_report", lambda *_: 1 / 0)
    assert run_experiment(experiment, [outcome.cell for outcome in outcomes], None) == 1
    assert "made: no report" in (shown := capsys.readouterr().err) and "ZeroDivisionError" in shown
    monkeypatch.setattr(report_write, "write_report", whole)
    assert run_experiment(experiment, [outcome.cell for outcome in outcomes], None) == 0


def test_an_error_of_the_machine_costs_a_report_one_line(study, capsys, monkeypatch):
    experiment, done = study(GLUE, lambda label, s: 80)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(report_write, "write_report", fail)
    assert run_experiment(experiment, [cell.cell for cell in done], None) == 2
    said = capsys.readouterr().err
    assert said.startswith("made: no report: out of memory (MemoryError); ") and said.count("\n") == 1


# Published rows beside ours


def asides(spec: dict, *cells: str) -> list[list[str]]:
    """Return the published lines of an experiment's table, without empty cells, none of its runs done."""
    experiment = Experiment.from_content("made", spec)
    outcomes = find_outcomes(experiment.compose_cells(["seed=0"]), "made")
    values = build_frame(experiment, outcomes)
    table = build_main_table(experiment, outcomes, values, letter_reasons(values))
    return [[cell for cell in table.cells.iloc[i] if cell] for i in sorted(table.aside)]


def test_a_published_row_by_the_columns_setting_stands_once_under_its_values(runs_folder):
    held = ["method=dual_lora", "method.alpha=16", "method.magnitude_ratio=0.5"]
    cells = {"LoRA": ["method=lora", "method.rank=32"], "Dual LoRA": RATIOS["cells"]["Dual LoRA"], "scale held": held}
    spec = RATIOS | {"cells": cells, "full": {"seeds": [0], "run": ["model=llama3-8b", "task=commonsense"]}}
    table = "[dual_lora_fig2_magnitude_ratio, digitized]"
    assert asides(spec) == [
        ["commonsense", f"LoRA {table}", "80.90"],
        ["commonsense", f"Dual LoRA {table}", "85.45", "85.77"],
    ]


def test_a_published_row_by_rank_stands_under_every_rank(runs_folder):
    spec = {
        "title": "Ranks",
        "columns": "method.rank",
        "published": ["dora_table15_rank_robustness"],
        "cells": {"LoRA": ["method=lora", "method.rank=4,32,64"]},
        "full": {"seeds": [0], "run": ["model=llama-7b", "task=commonsense", "train.lr=3e-4"]},
    }
    table = "dora_table15_rank_robustness"
    assert asides(spec) == [
        [f"LoRA [{table}, printed in paper]", "39.5", "74.7", "65.8"],
        [f"LoRA [{table}, rank 32, printed in readme]", "76.3"],
    ]


def test_a_published_row_stands_at_its_own_learning_rate_and_two_of_a_kind_are_told_apart(runs_folder):
    way = ["method.rank=32", "model=llama-7b", "task=commonsense"]
    spec = SETS | {
        "baselines": [],
        "published": ["dora_table1_commonsense", "dual_lora_inferred"],
        "cells": {
            "LoRA, 1e-4": ["method=lora", "train.lr=1e-4", *way],
            "LoRA, 3e-4": ["method=lora", "train.lr=3e-4", *way],
            "DoRA": ["method=dora", "train.lr=5e-4", *way],
            "Dual LoRA": ["method=dual_lora", *way],
            "Dual LoRA, other rate": ["method=dual_lora", "train.lr=1e-2", *way],
        },
    }
    assert [line[1] for line in asides(spec)] == [
        "LoRA, 3e-4 [dora_table1_commonsense]",
        "DoRA [dora_table1_commonsense, printed in paper, lr 1e-4]",
        "DoRA [dora_table1_commonsense, printed in older version]",
        "Dual LoRA [dual_lora_inferred, inferred, base 78.4]",
        "Dual LoRA [dual_lora_inferred, inferred, base 78.1]",
    ]


def test_a_published_average_of_glue_stands_under_ours_of_all_eight_tasks_alone(runs_folder):
    names = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    spec = GLUE | {
        "published": [*GLUE["published"], "dual_lora_inferred"],
        "cells": {"Dual LoRA": ["method=dual_lora"]},
    }
    spec |= {"baselines": [], "full": GLUE["full"] | {"blocks": [[f"task=glue/{name}"] for name in names]}}
    assert asides(spec) == [["roberta-base", "Dual LoRA [dual_lora_inferred, inferred]", "88.8"]]
    assert asides(spec | {"full": GLUE["full"]}) == []


def test_published_tables_say_what_they_have_to_do_with_ours(study, tmp_path):
    spec = GLUE | {"published": ["lora_table2_glue", "dora_table15_rank_robustness", "own_rank_null"]}
    experiment, outcomes = study(spec, lambda label, s: 80)
    text = write_report(experiment, outcomes, tmp_path)
    assert "LoRA Table 2, GLUE development sets: roberta-base as above, and other models (published; version:" in text
    assert "by rank, LLaMA-7B: other models than above (published; version: PDF of 10 Jul 2024;" in text
    assert "Computed: Rank of the update at random initialisation" in text and "4096: of no single model (own;" in text


def test_the_mirror_gets_table_differences_and_published_tables(study, tmp_path, capsys):
    experiment, outcomes = study(RATIOS, lambda label, s: 80 + s.seed)
    assert {tag for outcome in outcomes for tag in outcome.settings.wandb.tags} == {"made", "full"}
    write_report(experiment, outcomes, tmp_path / "report")
    mirror_report(experiment, outcomes, tmp_path / "report", build_frame(experiment, outcomes))
    assert "W&B" not in capsys.readouterr().out
    media = next(tmp_path.glob("wandb/*/files/media"))
    found = {re.sub(r"_\d+_\w+\.table\.json$", "", path.name): path for path in media.glob("table/**/*.json")}
    assert found.keys() == {"table", "values", "differences", "dual_lora_fig2_magnitude_ratio"}
    assert json.loads(found["table"].read_text())["columns"][:3] == ["task", "method", "no magnitude ratio"]
    assert len(json.loads(found["differences"].read_text())["data"]) == 2
    assert {path.name.partition("_")[0] for path in media.glob("images/*")} == {"figure", "forest", "cost"}
