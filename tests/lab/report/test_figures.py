"""What the figures of a report show: verdicts in colours, chosen rates, curves from the records, costs."""

import os
import subprocess
import sys
from dataclasses import replace
from math import inf

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.colors import to_hex

import tasks
from dual_lora.analysis.cells.dots import Panel, draw_dots
from dual_lora.lab.present.histogram_figure import draw_histograms
from dual_lora.lab.report.comparison.blocks import explain_verdicts
from dual_lora.lab.report.comparison.comparisons import Comparison, add_tests, compare_outcomes
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.report.comparison.matches import Predictions
from dual_lora.lab.report.figures.draw import select_learned
from dual_lora.lab.report.figures.forest import VERDICT_COLORS, draw_forest
from dual_lora.lab.report.figures.layout import GREY, WIDTH, equalize_spans
from dual_lora.lab.report.figures.rates import collect_rates, draw_rates
from dual_lora.lab.report.figures.results import draw_results
from dual_lora.lab.report.figures.training import collect_costs, draw_costs, draw_curves
from dual_lora.lab.report.values import UNLEARNED, build_frame
from dual_lora.lab.report.write import write_report
from dual_lora.lab.statistics.compare import Difference
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import find_outcomes
from tests.support.places import ROOT
from tests.support.reports import GLUE, RATIOS, finish

COUNTS = {"histogram": [1, 2, 3], "histogram_null": [3, 2, 1]}
HISTOGRAMS = {"role": "q"} | {f"{part}_{n}": v for part in ("magnitude", "direction") for n, v in COUNTS.items()}


def compare(by_seed: list[float], baseline="LoRA", margin=1.0) -> Comparison:
    """Return a comparison whose seeds differ by so many points."""
    values, mean = tuple(v / 100 for v in by_seed), float(np.mean(by_seed)) / 100
    ends = (mean - 0.001, mean + 0.001)
    found = Difference(mean, *ends, 0.001, "paired permutation", 872, len(values), values)
    return add_tests(Comparison("Dual LoRA", baseline, "glue/sst2", "accuracy", {}, found, 100, margin=margin))


def test_the_forest_plot_has_a_row_a_comparison_with_seeds_mean_interval_and_band():
    better = compare([2.0, 2.1, 2.2, 2.0, 2.1], "LoRA+")
    equal, open_ = compare([0.05, -0.1, 0.1, 0.0, -0.1], "DoRA"), compare([3.0, -2.0, 1.0, -3.0, 2.0], "Full")
    assert [c.verdict for c in (better, equal, open_)] == ["better", "equivalent", "undecided"]
    figure = draw_forest([better, equal, open_])
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["glue/sst2 (accuracy)", "Dual LoRA - LoRA+", "Dual LoRA - DoRA", "Dual LoRA - Full"]
    means = {line.get_xdata()[0]: line for line in axes.get_lines() if line.get_marker() == "D"}
    assert sorted(means) == pytest.approx(sorted([2.08, -0.01, 0.2]))
    colors = [to_hex(line.get_color()).upper() for line in means.values()]
    assert colors == [VERDICT_COLORS["better"], VERDICT_COLORS["equivalent"], GREY]
    bands = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bands == [(-1, 2)] * 3 and figure.get_size_inches()[0] == WIDTH
    assert max(abs(end) for end in axes.get_xlim()) > 3


def test_equal_margins_of_one_task_and_of_a_mean_are_both_told():
    single = compare([0.1, 0.2])
    text = "; ".join(explain_verdicts([single, replace(single, unit=1)]))
    assert "a difference of 1 (one task) or 1 (mean over tasks) points" in text


def test_an_interval_that_leaves_the_frame_ends_in_an_arrow_and_two_seeds_have_none():
    wide = compare([3.0, -2.9, 0.2])  # t-interval of 7 points to each side
    markers = [line.get_marker() for line in draw_forest([wide]).axes[0].get_lines()]
    assert markers.count("<") == markers.count(">") == 1
    two = [line.get_marker() for line in draw_forest([compare([3.0, -2.9])]).axes[0].get_lines()]
    assert "<" not in two and two.count("o") == two.count("D") == 1
    assert draw_forest([]) is None and draw_forest([compare([1.0])]) is None


def test_a_row_far_from_all_others_does_not_hide_them():
    near = [compare([1.0, -1.0, 0.5, 0.2, 0.1], name) for name in ("Full", "LoRA", "LoRA+")]
    (axes,) = draw_forest([*near, compare([83.0, 72.0, 9.0, 0.0, 0.0], "DoRA")]).axes
    assert axes.get_xlim()[1] < 5  # 3 times the middle row's furthest seed
    assert [text.get_text() for text in axes.texts] == ["+32.8"]
    assert [line.get_marker() for line in axes.get_lines()].count(">") == 1


@pytest.mark.parametrize("lower", [False, True])
def test_the_chosen_rate_is_ringed_and_a_diverged_one_crossed(study, lower):
    tune = {"holdout": 9, "grid": {"LoRA": [1e-3, 2e-3, 4e-3], "Dual LoRA": [1e-3, 2e-3, 4e-3]}}
    spec = GLUE | {"tune": tune, "full": GLUE["full"] | {"blocks": [["task=glue/rte"]]}}
    experiment = Experiment.from_content("made", spec)
    cells = experiment.compose_cells([])
    for trial in {repr(t): t for cell in cells for t in cell.tuning}.values():
        if trial.train.lr < 4e-3:
            finish(trial, 60 + round(5000 * trial.train.lr))
    outcomes = find_outcomes(cells, "made")
    assert collect_rates(experiment, outcomes)["rate"].tolist() == [1e-3, 2e-3] * 2  # a missing rate did not diverge
    (rates,) = {tuple(rate for rate, _ in outcome.trials) for outcome in outcomes if outcome.label == "LoRA"}
    assert rates == (1e-3, 2e-3, 4e-3)
    frame = pd.DataFrame(
        [
            {"place": "rte", "label": "LoRA", "rate": rate, "score": score, "lower": lower, "decimals": 0}
            | {"chosen": rate == 2e-3}
            for rate, score in ((1e-3, 65.0), (2e-3, 70.0), (4e-3, np.nan))
        ]
    )
    (axes,) = draw_rates(frame).axes
    (dots,) = axes.collections
    assert [to_hex(color) for color in dots.get_edgecolors()][-1] == "#000000"
    assert [text.get_text() for text in axes.texts] == ["65", "70"]
    assert (dots.get_array()[0] > dots.get_array()[1]) == lower  # the lighter, the better
    assert axes.get_xscale() == "log"
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [4e-3]
    assert draw_rates(frame.assign(score=np.nan)) is None


def test_a_rate_that_diverged_has_no_score(study):
    experiment, outcomes = study(GLUE, lambda label, s: 80)
    object.__setattr__(outcomes[0], "trials", ((1e-3, -inf), (2e-3, 0.7)))
    frame = collect_rates(experiment, outcomes[:1])
    assert frame["score"].isna().tolist() == [True, False] and frame["score"][1] == pytest.approx(70)


def test_a_row_s_rate_of_which_one_seed_diverged_has_no_score(study):
    cells = {"LoRA": ["method=lora", "train.lr=1e-3,8e-3"]}
    spec = GLUE | {"columns": "train.lr", "published": [], "baselines": [], "cells": cells}
    spec |= {"full": GLUE["full"] | {"blocks": [["task=glue/rte"]]}}
    experiment, outcomes = study(spec, lambda label, s: None if (s.train.lr, s.seed) == (8e-3, 1) else 80)
    (lost,) = [outcome for outcome in outcomes if not outcome.result]
    record = finish(lost.settings, 80)
    (record.folder / "result.json").unlink()
    record.write_file("failure.json", {"error": "DivergedError", "message": "the loss is nan", "diverged": True})
    frame = collect_rates(experiment, find_outcomes([outcome.cell for outcome in outcomes], "made"))
    assert frame["rate"].tolist() == [1e-3, 8e-3] and frame["score"].isna().tolist() == [False, True]


def test_rows_are_named_at_the_left_of_every_line_of_panels(study):
    spec = GLUE | {"columns": "task.name", "published": []}
    blocks = [[f"task=glue/{name}"] for name in ("sst2", "rte", "qnli", "mrpc")]
    spec |= {"full": GLUE["full"] | {"blocks": blocks}}
    experiment, outcomes = study(spec, lambda label, s: 80 + s.seed)
    figure = draw_results(experiment, build_frame(experiment, outcomes), outcomes, [])
    assert [bool(axes.get_yticklabels()[0].get_text()) for axes in figure.axes] == [True, False, True, False]


def test_learning_curves_are_drawn_from_the_records(study, tmp_path):
    experiment, outcomes = study(GLUE, lambda label, s: 80)
    assert draw_curves(outcomes) is None  # nothing logged
    for outcome in outcomes:
        lines = [{"step": step, "train/loss": 1 / step + outcome.settings.seed} for step in (10, 20, 30)]
        outcome.record.write_lines("metrics.jsonl", [*lines, {"step": 30, "eval/accuracy": 0.8}])
    figure = draw_curves(outcomes)
    assert [axes.get_title() for axes in figure.axes] == ["glue/sst2", "glue/rte"]
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(drawn) == ["LoRA", "Dual LoRA"]
    assert drawn["LoRA"].get_ydata() == pytest.approx([1 / step + 0.5 for step in (10, 20, 30)])
    write_report(experiment, outcomes, tmp_path)
    assert (tmp_path / "curves.png").is_file()
    (outcomes[0].record.folder / "metrics.jsonl").write_text("{")
    assert draw_curves(outcomes[:1]) is None  # damaged: the other figures are drawn all the same


def test_costs_stand_against_the_mean_score_of_learned_tasks(study):
    experiment, outcomes = study(GLUE, lambda label, s: 80 + 5 * (label == "Dual LoRA"), peak_memory_bytes=2**30)
    frame = collect_costs(experiment, outcomes, set()).set_index("label")
    assert frame["score"].to_dict() == {"LoRA": 80, "Dual LoRA": 85}
    assert set(frame["seconds_per_step"]) == {0.5} and set(frame["peak_memory_mib"]) == {1024}
    assert len(draw_costs(frame.reset_index()).axes) == 2
    one = collect_costs(experiment, outcomes, {("roberta-base", "glue/rte")})
    assert set(one["score"]) == {80, 85}
    assert draw_costs(frame.reset_index()[:1]) is None  # nothing to compare


def test_a_task_that_one_model_failed_to_learn_is_left_out_for_this_model_alone(study):
    run = ["model=roberta-base,roberta-large", "method.rank=8", "eval.before=false"]
    spec = GLUE | {"full": GLUE["full"] | {"seeds": [0], "run": run}}
    experiment, outcomes = study(spec, lambda label, s: 80 if s.model.name == "roberta-base" else 60)
    lost = ("roberta-large", "glue/rte")
    found = select_learned(compare_outcomes(experiment, outcomes, Predictions(), {lost: UNLEARNED}), {lost})
    learned = {(c.place["model.name"], c.task) for c in found if not c.task.startswith("mean")}
    assert learned == {("roberta-base", "glue/rte"), ("roberta-base", "glue/sst2"), ("roberta-large", "glue/sst2")}
    frame = collect_costs(experiment, outcomes, {lost})
    assert sorted(frame["score"]) == [60, 60, 80, 80]


def test_memory_that_no_device_counted_is_missing_everywhere(study):
    columns = {"memory": "peak_memory_mib", "seconds": "seconds_per_step"}
    spec = GLUE | {"rows": ["task.name"], "columns": columns, "mean": None}
    experiment, outcomes = study(spec, lambda label, s: 80, peak_memory_bytes=0)
    values = build_frame(experiment, outcomes)
    missing = values[values["value"].isna()]
    assert set(missing["column"]) == {"memory"} and set(missing["reason"]) == {"peak_memory_mib not measured"}
    assert collect_costs(experiment, outcomes, set())["peak_memory_mib"].isna().all()


def test_rates_of_a_score_that_is_no_fraction_are_told_apart(study, monkeypatch):
    monkeypatch.setattr(type(tasks.load("glue/sst2")), "unscaled", ("accuracy",))
    experiment, outcomes = study(GLUE, lambda label, s: 80)
    object.__setattr__(outcomes[0], "trials", ((1e-3, 0.61), (2e-3, 0.64)))
    (axes,) = draw_rates(collect_rates(experiment, outcomes[:1])).axes
    assert [text.get_text() for text in axes.texts] == ["0.61", "0.64"]


def test_the_floor_in_a_title_has_the_decimals_of_its_score(study):
    experiment, outcomes = study(RATIOS, lambda label, s: 70 + s.seed)
    floor = Floor(("roberta-base", "glue/rte"), "head only", 0.125, "LoRA", 1.0, 0.1, frozenset({("LoRA", ())}), unit=1)
    (axes, *_) = draw_results(experiment, build_frame(experiment, outcomes), outcomes, [floor]).axes
    assert axes.get_title() == "glue/rte (floor: 0.12)"


def test_related_panels_have_one_span(study):
    figure = draw_forest([compare([0.0, 1.0])])
    one, other = figure.subplots(1, 2)
    one.set_ylim(0, 20), other.set_ylim(70, 71)
    equalize_spans([one, other])
    assert one.get_ylim() == (0, 20) and other.get_ylim() == (60.5, 80.5)
    equalize_spans([other.figure.add_subplot()])


def test_a_report_loads_neither_torch_nor_peft():
    code = "import sys, dual_lora.lab.report.write; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    environment = os.environ | {"DUAL_LORA_LAZY": "1"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_lines_show_seeds_beside_means(study, tmp_path):
    experiment, outcomes = study(RATIOS, lambda label, s: 70 + s.seed)
    text = write_report(experiment, outcomes, tmp_path)
    assert "small dots: 3 seeds each; large ones: their mean; bars: 95 % t-interval over seeds" in text


def test_the_users_matplotlibrc_changes_no_figure(study, tmp_path, monkeypatch):
    experiment, done = study(GLUE, lambda label, s: 70 + s.seed)

    def draw(name: str) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        write_report(experiment, done, folder)
        content = {"rows": [HISTOGRAMS], "magnitude_edges": [0.0, 1.0], "labels": {"magnitude": "m", "direction": "d"}}
        draw_histograms(content | {"direction_edges": [0.0, 1.0]}, folder)
        value = {"mean": 1.0, "low": 0.5, "high": 1.5, "values": [0.9, 1.1]}
        draw_dots([Panel("case", {"LoRA": value})], ["LoRA"], "unit", folder / "dots.png", 1)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".pdf")}

    plain = draw("plain")
    settings = {"text.usetex": True, "font.family": ["serif"], "lines.linewidth": 9.0, "savefig.bbox": "tight"}
    for name, value in settings.items():
        monkeypatch.setitem(rcParams, name, value)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "abc")
    assert {"figure.png", "figure.pdf", "histograms.pdf", "dots.png"} <= plain.keys() and draw("own") == plain
    assert rcParams["lines.linewidth"] == 9.0 and os.environ["SOURCE_DATE_EPOCH"] == "abc"
