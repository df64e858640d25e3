"""Which score a report shows, in which unit, and which side of it is better: by what the run's own task says."""

from pathlib import Path
from unittest.mock import Mock

import pytest

import tasks
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.evaluate.model_card import format_scores
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.summary import format_summary
from dual_lora.lab.report.comparison.comparisons import compare_outcomes
from dual_lora.lab.report.comparison.floors import Floor, find_floors, find_unranked, predict_majority
from dual_lora.lab.report.comparison.matches import Predictions
from dual_lora.lab.report.figures.forest import describe_difference_axis
from dual_lora.lab.report.figures.layout import find_floor
from dual_lora.lab.report.figures.rates import collect_rates
from dual_lora.lab.report.figures.results import draw_results
from dual_lora.lab.report.figures.training import collect_costs
from dual_lora.lab.report.published import get_published_name
from dual_lora.lab.report.values import UNLEARNED, Column, build_frame
from dual_lora.lab.report.write import Findings, write_report
from dual_lora.lab.statistics.compare import compute_score
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes
from tasks.classification import Classification
from tasks.measures import Score, get_answer_and_gold
from tests.support.reports import GLUE, PLANNED, RATIOS, finish, rows_of

BY_TASK = PLANNED | {"columns": "task.name", "published": []}


@pytest.fixture
def low_glue(monkeypatch):
    """GLUE's accuracy as if it were a share of errors."""
    monkeypatch.setattr(type(tasks.load("glue/sst2")), "lower_is_better", ("accuracy",))


def list_bold(text: str) -> dict[tuple[str, ...], list[bool]]:
    """Return which scores of the table of runs are bold, by what heads the row."""
    head, *lines = rows_of("| " + text.partition("## Runs")[2].partition("\n| ")[2].partition("\n\n")[0])
    first, last = head.index("method") + 1, head.index("trained")
    ours = [line for line in lines if "[" not in line[first - 1]]
    return {tuple(line[:first]): [cell.startswith("**") for cell in line[first:last]] for line in ours}


def test_where_lower_is_better_the_lowest_row_wins(study, low_glue, tmp_path):
    experiment, outcomes = study(PLANNED, lambda label, s: 25 + s.seed - (20 + s.seed % 2) * (label == "Dual LoRA"))
    text = write_report(experiment, outcomes, tmp_path)
    verdicts = rows_of(text)[1:4]
    assert [line[0] for line in verdicts] == ["glue/sst2", "glue/rte", "mean of 2 tasks"]
    assert [(line[4], line[-2]) for line in verdicts] == [("-20.4", "better")] * 3
    bold = list_bold(text)
    assert bold[("roberta-base", "Dual LoRA")] == [True] * 3 and bold[("roberta-base", "LoRA")] == [False] * 3
    floors = [line for line in rows_of(text) if line[1] == "majority class"]
    assert [line[2:5] + line[-1:] for line in floors] == [["50.0", "Dual LoRA", "+43.4", "learned"]] * 2
    assert "Of glue/rte, glue/sst2 lower is better: above means below." in text
    found = compare_outcomes(experiment, outcomes, Predictions())
    assert describe_difference_axis(found.planned) == "difference in points; left: better"


def test_where_lower_is_better_a_high_row_has_learned_nothing(study, low_glue):
    experiment, outcomes = study(PLANNED, lambda label, s: 95)
    floors = find_floors(experiment, outcomes, Predictions())
    assert find_unranked(floors) == {("roberta-base", f"glue/{task}"): UNLEARNED for task in ("sst2", "rte")}
    assert [floor.above for floor in floors] == pytest.approx([-45, -45])


def test_the_majority_class_is_the_one_that_scores_best(low_glue):
    run = [{"split": "validation", "id": str(i), "answer": 0, "gold": int(i < 2)} for i in range(8)]
    (rows,) = predict_majority(tasks.load("glue/sst2"), {0: run}).values()
    assert {row["answer"] for row in rows} == {1}  # the accuracy of 2 in 8 is the lowest


@pytest.mark.parametrize(("lower", "score"), [(False, 60), (True, 50)])
def test_the_hardest_floor_is_drawn(study, lower, score):
    _, outcomes = study(RATIOS, lambda label, s: 70)
    place = ("roberta-base", "glue/rte")
    floors = [Floor(place, str(s), s, "LoRA", 9.0, 1.0, frozenset({("LoRA", ())}), lower) for s in (50, 60)]
    assert find_floor(outcomes, floors).score == score


def test_a_mean_over_tasks_that_disagree_has_no_best_row_and_no_verdict(study, monkeypatch, tmp_path):
    monkeypatch.setattr(type(tasks.load("demo/sentiment")), "lower_is_better", ("accuracy",))
    tasks_apart = {"blocks": [["task=glue/rte"], ["task=demo/sentiment"]], "seeds": [0, 1, 2, 3, 4]}
    spec = RATIOS | {"mean": "task.name", "published": [], "full": {"run": ["model=roberta-base"], **tasks_apart}}
    experiment, outcomes = study(spec, lambda label, s: (90 if s.task.name == "glue/rte" else 5) + (label == "LoRA"))
    text = write_report(experiment, outcomes, tmp_path)
    bold = {key: any(cells) for key, cells in list_bold(text).items()}
    assert bold == {
        **{("glue/rte", "LoRA"): True, ("glue/rte", "Dual LoRA"): False},
        **{("demo/sentiment", "LoRA"): False, ("demo/sentiment", "Dual LoRA"): True},
        **{("mean", "LoRA"): False, ("mean", "Dual LoRA"): False},
    }
    assert "no best row and no verdict: lower is better on demo/sentiment, higher on the others" in text
    assert "mean of 2 tasks" not in text
    planned = Experiment.from_content("made", spec | {"planned": ["Dual LoRA"]})
    assert compare_outcomes(planned, outcomes, Predictions()).family == 4  # two ratios on two tasks


def test_a_main_score_that_is_no_fraction_is_called_and_printed_so(study, monkeypatch, tmp_path):
    monkeypatch.setattr(type(tasks.load("glue/sst2")), "unscaled", ("accuracy",))
    spec = BY_TASK | {"margin": {"task": 1.0, "mean": 0.5}}
    experiment, outcomes = study(spec, lambda label, s: 60 + s.seed + 20 * (label == "Dual LoRA"))
    text = write_report(experiment, outcomes, tmp_path)
    assert "Main score (accuracy), by task.name:" in text and "0.62 ± 0.02 (5)" in text
    found = compare_outcomes(experiment, outcomes, Predictions())
    assert [c.margin for c in found.planned] == [None] * 3
    mixed = BY_TASK | {"full": PLANNED["full"] | {"blocks": [["task=glue/rte"], ["task=demo/sentiment"]]}}
    text = write_report(*study(mixed, lambda label, s: 60 + s.seed), tmp_path)
    assert "Main score (accuracy of glue/rte; accuracy in % of demo/sentiment), by task.name:" in text
    assert "0.62 ± 0.02 (5)" in text and "62.0 ± 1.6 (5)" in text


# The task with the options that a run has


@pytest.fixture
def own(study, own_data, monkeypatch):
    """An experiment on tables of one's own by macro-F1, which here counts as no fraction and as low where good: the
    default metric, accuracy, does not."""
    for name in ("unscaled", "lower_is_better"):
        monkeypatch.setattr(
            Classification, name, property(lambda task: {"macro_f1": ("macro_f1",)}.get(task.metric, ()))
        )
    run = ["model=roberta-base", "task=classification", "task.options.metric=macro_f1", f"data_dir={own_data}"]
    spec = BY_TASK | {"full": {"seeds": [0, 1, 2, 3, 4], "run": run}}
    return study(spec, lambda label, s: 40 - 20 * (label == "Dual LoRA"))


def test_a_report_names_the_metric_that_the_runs_have(own, tmp_path):
    experiment, outcomes = own
    text = write_report(experiment, outcomes, tmp_path)
    assert "Main score (macro_f1), by task.name:" in text and "accuracy" not in text
    assert list_bold(text) == {("roberta-base", "LoRA"): [False], ("roberta-base", "Dual LoRA"): [True]}
    (axes,) = draw_results(experiment, build_frame(experiment, outcomes), outcomes, []).axes
    assert axes.get_xlabel() == "macro_f1"
    assert set(collect_costs(experiment, outcomes, set())["score"].round(1)) == {0.4, 0.2}


def test_published_scores_stand_by_the_metric_that_the_run_has(own):
    experiment, (run, *_) = own
    assert get_published_name(experiment, Column("classification"), run) == "classification:macro_f1"


def test_rates_have_the_unit_and_the_better_side_of_the_runs_metric(own):
    experiment, (run, *_) = own
    object.__setattr__(run, "trials", ((1e-3, 0.7), (2e-3, 0.5)))
    frame = collect_rates(experiment, [run])
    assert frame["score"].tolist() == [0.7, 0.5] and frame["lower"].tolist() == [True, True]


def test_a_run_prints_its_scores_as_its_metric_says(own):
    _, (cell, *_) = own
    run = Run.prepare(cell.settings)
    result = cell.result | {"metrics_before": None, "parameters": 10**6, "peak_memory_bytes": 0, "data": {}}
    lines = [line.split() for line in format_summary(result, run).splitlines()]
    assert ["score", "before", "after"] in lines
    assert ["macro_f1", "-", "0.40"] in lines and ["accuracy", "%", "-", "40.0"] in lines
    task = load_task(cell.settings)
    card = format_scores(result, task).splitlines()
    assert "| macro_f1 | 0.40 |" in card and "| accuracy % | 40.0 |" in card


def test_a_mean_of_columns_is_best_by_its_parts(study, low_glue, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 20 + 5 * (label == "LoRA"))
    frame = build_frame(experiment, outcomes)
    assert set(frame.loc[frame["outcome"] == -1, "value"]) == {20, 25}
    assert list_bold(write_report(experiment, outcomes, tmp_path))[("roberta-base", "Dual LoRA")] == [True] * 3


# A task whose code has changed since the runs were done


def test_the_score_is_the_task_s_main_one_now_and_not_that_of_the_record(study, tmp_path):
    other = {"metric": "kappa", "metrics": {"accuracy": 0.7, "kappa": 0.4}}
    experiment, outcomes = study(BY_TASK, lambda label, s: 70, **other)
    text = write_report(experiment, outcomes, tmp_path)
    assert "Main score (accuracy), %, by task.name:" in text and "70.0 ± 0.0 (5)" in text and "40.0" not in text
    assert set(collect_costs(experiment, outcomes, set())["score"].round(6)) == {70}


def test_a_main_score_that_the_records_lack_is_not_measured(study, tmp_path):
    experiment, outcomes = study(BY_TASK, lambda label, s: 70, metric="kappa", metrics={"kappa": 0.4})
    text = write_report(experiment, outcomes, tmp_path)
    assert text.count("| – [a]") == 4 and "– [a]: accuracy not measured" in text and "40.0" not in text


@pytest.mark.parametrize(("known", "rate"), [(True, 2e-3), (False, None)])
def test_rates_are_chosen_by_the_task_s_main_score(study, known, rate, runs_folder):
    tune = {"holdout": 9, "grid": {"LoRA": [1e-3, 2e-3]}}
    one = {"cells": {"LoRA": ["method=lora"]}, "baselines": [], "planned": []}
    spec = BY_TASK | one | {"tune": tune, "full": GLUE["full"] | {"seeds": [0], "blocks": [["task=glue/rte"]]}}
    cells = Experiment.from_content("made", spec).compose_cells([])
    for trial in cells[0].tuning:
        score = 200 * trial.train.lr  # where accuracy is high, kappa is low
        finish(trial, 50, metric="kappa", metrics={"kappa": 1 - score} | ({"accuracy": score} if known else {}))
    (found,) = find_outcomes(cells, "made")
    assert found.rate == rate
    unmeasured = f"learning rate not chosen: {Run.prepare(cells[0].tuning[0]).record.name}: accuracy not measured"
    assert found.reason == ("not run" if known else unmeasured)


@pytest.mark.parametrize("known", [True, False])
def test_runs_start_from_the_best_by_the_task_s_main_score(study, known):
    spec = BY_TASK | {"starts": {"glue/rte": "glue/sst2"}, "cells": {"LoRA": ["method=lora"]}, "baselines": []}
    experiment = Experiment.from_content("made", spec | {"planned": [], "full": GLUE["full"]})
    cells = experiment.compose_cells([])
    first, last = (cell for cell in cells if cell.settings.task.name == "glue/sst2")
    for cell, kappa in ((first, 0.9), (last, 0.1)):
        scores = {"kappa": kappa} | ({"accuracy": 1 - kappa} if known else {})
        finish(cell.settings, 50, metric="kappa", metrics=scores)
    (found, _) = (cell for cell in find_outcomes(cells, "made") if cell.settings.task.name == "glue/rte")
    if known:
        assert Path(found.settings.init_from).name == Run.prepare(last.settings).record.name
    else:
        assert found.reason == "its start is not there: a run of glue/sst2 is missing, or its accuracy"


def test_runs_of_another_version_of_a_plugin_are_marked_and_stand_behind(study, tmp_path, monkeypatch):
    def record(version: str) -> dict:
        return {"environment": {"plugins": {"stars": {"path": "stars.py", "sha256": version}, "gone": {"sha256": "0"}}}}

    monkeypatch.setitem(tasks.plugins, "stars", tasks.Plugin(tasks, Path("stars.py"), "2"))
    experiment, outcomes = study(BY_TASK, lambda label, s: 70 if s.seed else None, **record("2"))
    for outcome in outcomes:
        if not outcome.result:
            finish(outcome.settings, 80, **record("1"))
    text = write_report(experiment, find_outcomes([outcome.cell for outcome in outcomes], "made"), tmp_path)
    assert "72.0 ± 4.5 (5)§‡" in text and "§: done with another version of a plugin" in text
    values = build_frame(experiment, find_outcomes([outcome.cell for outcome in outcomes], "made"))
    assert set(values[values["seed"] == 0]["marks"]) == {"‡§"} and set(values[values["seed"] > 0]["marks"]) == {"‡"}


@pytest.mark.parametrize(
    "error", [KeyError("length"), TypeError("no number"), AttributeError("x"), ZeroDivisionError()]
)
def test_what_a_task_raises_over_old_predictions_is_one_line(error, monkeypatch):
    monkeypatch.setattr(type(tasks.load("glue/rte")), "score", fail := Mock(side_effect=error))
    with pytest.raises(ValueError) as caught:
        compute_score([{"split": "validation", "id": "0", "answer": 0, "gold": 1}], tasks.load("glue/rte"), "accuracy")
    assert fail.called and str(caught.value).startswith(f"glue/rte cannot score these predictions ({error!r}), which")


@pytest.mark.parametrize("method", ["score", "declare_scores"])
def test_predictions_that_the_task_can_no_longer_score_are_told(study, method, tmp_path, monkeypatch):
    experiment, outcomes = study(PLANNED | {"full": GLUE["full"]}, lambda label, s: 70 + s.seed)
    monkeypatch.setattr(type(tasks.load("glue/rte")), method, Mock(side_effect=KeyError("length")))
    findings = Findings.compute(experiment, outcomes)
    said = "cannot score these predictions (KeyError('length')), which another version of the task may have written"
    (told,) = [trouble for trouble in findings.unreadable if "glue/rte" in trouble]
    assert told.startswith("majority class, floor of glue/rte (roberta-base): ") and f"glue/rte {said}" in told
    text = write_report(experiment, outcomes, tmp_path, findings)
    assert f"not read: {told}" in text and "70.5 ± 0.7 (2)" in text
    assert (f"cannot be compared (glue/rte {said}" in text) == (method == "declare_scores")


def test_a_run_whose_score_is_undefined_costs_neither_the_report_nor_the_other_task(study, monkeypatch, tmp_path):
    """A share of the answers 1, of which one run has none: 0/0."""

    def measure(columns, weights):
        return weights @ columns.prod(axis=1) / (weights @ columns[:, 0])

    experiment, outcomes = study(PLANNED, lambda label, s: 60 + s.seed + (20 + s.seed % 2) * (label == "Dual LoRA"))
    lost = next(o for o in outcomes if (o.label, o.settings.task.name) == ("LoRA", "glue/rte"))
    rte, read = tasks.load("glue/rte"), Predictions.read
    declare = type(rte).declare_scores
    monkeypatch.setattr(
        Predictions, "read", lambda self, o: [r | {"answer": 0} for r in read(self, o)] if o is lost else read(self, o)
    )
    score = Score(get_answer_and_gold, measure)
    monkeypatch.setattr(
        type(rte),
        "declare_scores",
        lambda self, row: {"accuracy": score} if self.name == rte.name else declare(self, row),
    )
    text = write_report(experiment, outcomes, tmp_path)
    said = "cannot be compared (accuracy is NaN or infinite for the predictions of a run)"
    verdicts = {line[0]: line[-2] for line in rows_of(text)[1:4]}
    assert (verdicts["glue/sst2"], verdicts["glue/rte"]) == ("better", said)
    assert "corrected for all 3 by Holm's method; 2 of them are not tested" in text


def test_a_row_whose_predictions_lack_a_column_does_not_cost_the_floor_the_others(study, monkeypatch):
    experiment, outcomes = study(PLANNED, lambda label, s: 70 + s.seed)
    read = Predictions.read_runs

    def drop_answers(self, cells):
        lost = {"answer"} if cells[0].label == "LoRA" else set()
        return {
            seed: [{k: row[k] for k in row.keys() - lost} for row in rows] for seed, rows in read(self, cells).items()
        }

    monkeypatch.setattr(Predictions, "read_runs", drop_answers)
    for floor in find_floors(experiment, outcomes, Predictions()):
        assert (floor.best, floor.trouble) == ("Dual LoRA", "LoRA: accuracy: the predictions of a run have no 'answer'")
