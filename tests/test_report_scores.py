"""Which score a report shows, in which unit, and which side of it is better: by what the run's own task says."""

import pytest
from test_report import GLUE, PLANNED, RATIOS, rows_of, study  # noqa: F401 (a fixture)

import tasks
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.evaluate.model_card import format_scores
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.summary import format_summary
from dual_lora.lab.report.comparison.comparisons import compare_cells
from dual_lora.lab.report.comparison.floors import Floor, find_floors, find_unlearned, predict_majority
from dual_lora.lab.report.comparison.matches import Predictions
from dual_lora.lab.report.figures.forest import describe_difference_axis
from dual_lora.lab.report.figures.layout import find_floor
from dual_lora.lab.report.figures.rates import collect_rates
from dual_lora.lab.report.figures.results import draw_results
from dual_lora.lab.report.figures.training import collect_costs
from dual_lora.lab.report.published import get_published_name
from dual_lora.lab.report.values import Column, build_frame
from dual_lora.lab.report.write import write_report
from dual_lora.lab.study.experiment import Experiment
from tasks.classification import Classification

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


def test_where_lower_is_better_the_lowest_row_wins(study, low_glue, tmp_path):  # noqa: F811
    experiment, done = study(PLANNED, lambda label, s: 25 + s.seed - (20 + s.seed % 2) * (label == "Dual LoRA"))
    text = write_report(experiment, done, tmp_path)
    verdicts = rows_of(text)[1:4]
    assert [line[0] for line in verdicts] == ["glue/sst2", "glue/rte", "mean of 2 tasks"]
    assert [(line[4], line[-2]) for line in verdicts] == [("-20.4", "better")] * 3
    bold = list_bold(text)
    assert bold[("roberta-base", "Dual LoRA")] == [True] * 3 and bold[("roberta-base", "LoRA")] == [False] * 3
    floors = [line for line in rows_of(text) if line[1] == "majority class"]
    assert [line[2:5] + line[-1:] for line in floors] == [["50.0", "Dual LoRA", "+43.4", "learned"]] * 2
    assert "Of glue/rte, glue/sst2 lower is better: above means below." in text
    found = compare_cells(experiment, done, Predictions(), set())
    assert describe_difference_axis(found.planned) == "difference in points; left: better"


def test_where_lower_is_better_a_high_row_has_learned_nothing(study, low_glue):  # noqa: F811
    experiment, done = study(PLANNED, lambda label, s: 95)
    floors = find_floors(experiment, done, Predictions())
    assert find_unlearned(floors) == {("roberta-base", "glue/sst2"), ("roberta-base", "glue/rte")}
    assert [floor.above for floor in floors] == pytest.approx([-45, -45])


def test_the_majority_class_is_the_one_that_scores_best(low_glue):
    run = [{"split": "validation", "id": str(i), "answer": 0, "gold": int(i < 2)} for i in range(8)]
    (rows,) = predict_majority(tasks.load("glue/sst2"), {0: run}).values()
    assert {row["answer"] for row in rows} == {1}  # the accuracy of 2 in 8 is the lowest


@pytest.mark.parametrize(("lower", "score"), [(False, 60), (True, 50)])
def test_the_hardest_floor_is_drawn(study, lower, score):  # noqa: F811
    _, done = study(RATIOS, lambda label, s: 70)
    place = ("roberta-base", "glue/rte")
    floors = [Floor(place, str(s), s, "LoRA", 9.0, 1.0, frozenset({("LoRA", ())}), lower) for s in (50, 60)]
    assert find_floor(done, floors).score == score


def test_a_mean_over_tasks_that_disagree_has_no_best_row_and_no_verdict(study, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(type(tasks.load("demo/sentiment")), "lower_is_better", ("accuracy",))
    tasks_apart = {"blocks": [["task=glue/rte"], ["task=demo/sentiment"]], "seeds": [0, 1, 2, 3, 4]}
    spec = RATIOS | {"mean": "task.name", "published": [], "full": {"run": ["model=roberta-base"], **tasks_apart}}
    experiment, done = study(spec, lambda label, s: (90 if s.task.name == "glue/rte" else 5) + (label == "LoRA"))
    text = write_report(experiment, done, tmp_path)
    bold = {key: any(cells) for key, cells in list_bold(text).items()}
    assert bold == {
        **{("glue/rte", "LoRA"): True, ("glue/rte", "Dual LoRA"): False},
        **{("demo/sentiment", "LoRA"): False, ("demo/sentiment", "Dual LoRA"): True},
        **{("mean", "LoRA"): False, ("mean", "Dual LoRA"): False},
    }
    assert "no best row and no verdict: lower is better on demo/sentiment, higher on the others" in text
    assert "mean of 2 tasks" not in text
    planned = Experiment.from_content("made", spec | {"planned": ["Dual LoRA"]})
    assert compare_cells(planned, done, Predictions(), set()).family == 4  # two ratios on two tasks


def test_a_main_score_that_is_no_fraction_is_called_and_printed_so(study, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(type(tasks.load("glue/sst2")), "unscaled", ("accuracy",))
    spec = BY_TASK | {"margin": {"task": 1.0, "mean": 0.5}}
    experiment, done = study(spec, lambda label, s: 60 + s.seed + 20 * (label == "Dual LoRA"))
    text = write_report(experiment, done, tmp_path)
    assert "Main score (accuracy), by task.name:" in text and "0.62 ± 0.02 (5)" in text
    found = compare_cells(experiment, done, Predictions(), set())
    assert [c.margin for c in found.planned] == [None] * 3
    mixed = BY_TASK | {"full": PLANNED["full"] | {"blocks": [["task=glue/rte"], ["task=demo/sentiment"]]}}
    text = write_report(*study(mixed, lambda label, s: 60 + s.seed), tmp_path)
    assert "Main score (accuracy of glue/rte; accuracy in % of demo/sentiment), by task.name:" in text
    assert "0.62 ± 0.02 (5)" in text and "62.0 ± 1.6 (5)" in text


# The task with the options that a run has


@pytest.fixture
def own(study, own_data, monkeypatch):  # noqa: F811
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
    experiment, done = own
    text = write_report(experiment, done, tmp_path)
    assert "Main score (macro_f1), by task.name:" in text and "accuracy" not in text
    assert list_bold(text) == {("roberta-base", "LoRA"): [False], ("roberta-base", "Dual LoRA"): [True]}
    (axes,) = draw_results(experiment, build_frame(experiment, done), done, []).axes
    assert axes.get_xlabel() == "macro_f1"
    assert set(collect_costs(experiment, done, set())["score"].round(1)) == {0.4, 0.2}


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


def test_a_mean_of_columns_is_best_by_its_parts(study, low_glue, tmp_path):  # noqa: F811
    experiment, done = study(GLUE, lambda label, s: 20 + 5 * (label == "LoRA"))
    frame = build_frame(experiment, done)
    assert set(frame.loc[frame["cell"] == -1, "value"]) == {20, 25}
    assert list_bold(write_report(experiment, done, tmp_path))[("roberta-base", "Dual LoRA")] == [True] * 3
