"""Planned contrasts within a row: what a file may declare, what is computed, how it is judged."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.comparison.comparisons import compare_outcomes
from dual_lora.lab.report.comparison.matches import Predictions
from dual_lora.lab.report.write import DIFFERENCES_FILE, write_report
from dual_lora.lab.statistics.multiple import adjust_holm
from dual_lora.lab.study.experiment import Experiment
from tests.support.reports import rows_of

SPEC = {
    "title": "Ratio",
    "rows": ["task.name"],
    "columns": "method.magnitude_ratio",
    "contrasts": [{"plus": [0.5], "minus": [0.25, 0.75]}],
    "margin": {"task": 1.0, "mean": 0.5},
    "cells": {
        "Dual LoRA": ["method=dual_lora", "method.magnitude_ratio=0.25,0.5,0.75"],
        "held": ["method=dual_lora", "method.alpha=8", "method.magnitude_ratio=0.25,0.5"],
    },
    "full": {"seeds": [0, 1, 2, 3, 4], "run": ["model=roberta-base", "task=glue/rte,glue/sst2"]},
}
ENDS = {0.25: -4, 0.75: -6}
LUCK = (0, 3, -2, 1, 2)


def right(label, settings):
    """Return 70 in the middle, 5 fewer at the ends on average, 9 for SST-2, and each seed's luck, twice at one end."""
    ratio, luck = settings.method.magnitude_ratio, LUCK[settings.seed]
    return 70 + ENDS.get(ratio, 0) + luck * (2 if ratio == 0.25 else 1) + 9 * (settings.task.name == "glue/sst2")


def test_a_contrast_is_the_middle_minus_the_mean_of_the_ends_by_seed(study):
    experiment, outcomes = study(SPEC, right)
    found = compare_outcomes(experiment, outcomes, Predictions())
    assert not found.exploratory and not found.further
    assert [(c.label, c.baseline, c.task) for c in found.planned] == [
        ("Dual LoRA, magnitude ratio 0.5", "mean of 0.25 and 0.75", task)
        for task in ("glue/rte", "glue/sst2", "mean of 2 tasks")
    ]  # the other row lacks a column
    corrected = adjust_holm([max(c.difference.p, c.seed_test.p) for c in found.planned])
    for c, p in zip(found.planned, corrected, strict=True):
        expected = [5 - luck / 2 for luck in LUCK]
        assert np.array(c.difference.by_seed) * c.unit == pytest.approx(expected)
        assert c.seed_test.p == pytest.approx(stats.ttest_1samp(expected, 0).pvalue)
        assert c.p == pytest.approx(p) and c.verdict == "better"
        assert c.margin == (0.5 if c.unit == 1 else 1.0)


def test_a_contrast_is_tested_on_predictions_too(study):
    """One example tells the columns apart with every seed: the seeds all agree, other examples might not."""
    spec = SPEC | {"full": {"seeds": [0, 1, 2, 3, 4], "run": ["model=roberta-base", "task=glue/sst2"]}}
    experiment, outcomes = study(spec, lambda label, s: 70 + (s.method.magnitude_ratio == 0.5))
    (found,) = compare_outcomes(experiment, outcomes, Predictions()).planned
    assert found.seed_test.p == 0 and found.difference.test == "paired permutation" and found.difference.p == 1
    assert found.verdict == "undecided"


def test_runs_of_other_data_make_no_contrast(study):
    experiment, outcomes = study(SPEC, lambda label, s: None if s.method.magnitude_ratio == 0.25 else right(label, s))
    other = {"data": {"validation": {"origin": "dev.tsv", "rows": 100, "sha256": "1"}}}
    experiment, outcomes = study(SPEC, right, **other)
    for c in compare_outcomes(experiment, outcomes, Predictions()).planned:
        assert c.p is None and c.verdict == "undecided"
        assert c.task.startswith("mean") or "different scored rows" in c.difference.test


def test_the_report_tells_contrasts_from_other_differences(study, tmp_path):
    experiment, outcomes = study(SPEC, right)
    text = write_report(experiment, outcomes, tmp_path)
    line = next(line for line in rows_of(text) if line[0] == "mean of 2 tasks")
    assert line[2:4] == ["Dual LoRA, magnitude ratio 0.5 - mean of 0.25 and 0.75", "+4.6"] and "better" in line
    assert "a contrast sets the mean over some columns" in text
    assert "0.5 (mean over tasks)" in text and "1 (one task)" in text
    listed = pd.read_csv(tmp_path / DIFFERENCES_FILE)
    assert listed["planned"].all() and len(listed) == 3
    assert (tmp_path / "forest.png").is_file()


def test_a_seed_that_lacks_a_column_is_left_out_and_four_decide_nothing(study):
    def lacking(label, settings):
        gone = settings.seed == 4 and settings.method.magnitude_ratio == 0.75
        return None if gone else right(label, settings)

    experiment, outcomes = study(SPEC, lacking)
    found = compare_outcomes(experiment, outcomes, Predictions())
    assert {c.difference.seeds for c in found.planned} == {4} and {c.verdict for c in found.planned} == {"undecided"}


def test_contrasts_stand_in_one_family_with_planned_rows(study):
    cells = SPEC["cells"] | {"LoRA": ["method=lora"]}
    experiment, outcomes = study(SPEC | {"cells": cells, "baselines": ["LoRA"], "planned": ["held"]}, right)
    found = compare_outcomes(experiment, outcomes, Predictions())
    # two ratios on two tasks and in the mean, and the contrast's three
    assert len(found.planned) == 9 and sum(c.contrast for c in found.planned) == 3
    assert {c.label for c in found.exploratory} == {"Dual LoRA"}
    assert len({c.pool for c in found.planned}) == 6


def test_a_contrast_that_is_given_twice_is_refused():
    twice = [*SPEC["contrasts"], {"plus": [0.5], "minus": [0.75, 0.25]}]
    with pytest.raises(UserError, match="^conf/experiment/made.yaml: contrasts: .*: given twice; drop one"):
        Experiment.from_content("made", SPEC | {"contrasts": twice})


def test_a_contrast_of_columns_that_no_row_has_is_refused():
    experiment = Experiment.from_content("made", SPEC | {"contrasts": [{"plus": [0.5], "minus": [0.9]}]})
    with pytest.raises(UserError, match="^conf/experiment/made.yaml: contrasts: no row has all of the columns 0.5, 0"):
        experiment.compose_cells([])
    one = Experiment.from_content("made", SPEC).compose_cells(["method.magnitude_ratio=0.5"])  # chosen on purpose
    assert {cell.settings.method.magnitude_ratio for cell in one} == {0.5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contrasts": [{"plus": [0.5]}]}, "contrasts: .*plus: .*minus: .* is needed"),
        ({"contrasts": [{"plus": [0.5], "minus": []}]}, "contrasts: .* is needed"),
        ({"contrasts": [{"plus": [0.5], "minus": [1], "than": [2]}]}, "contrasts: .* is needed"),
        ({"contrasts": [{"plus": [0.5], "minus": [0.25, 0.5]}]}, "contrasts: .0.5.: on both sides"),
        ({"contrasts": [{"plus": [0.5, 0.5], "minus": [0.25]}]}, "contrasts: plus: 0.5: given twice; drop one"),
        ({"columns": "task.name"}, "contrasts: need columns with the values of one setting"),
        ({"columns": {"score": "accuracy"}}, "contrasts: need columns"),
        ({"contrasts": [0.5]}, "contrasts: '.0.5.' has the wrong form"),
        ({"contrasts": [{"plus": 0.5, "minus": [1]}]}, "contrasts: .* has the wrong form"),
    ],
)
def test_a_contrast_that_cannot_be_computed_is_refused(changes, said):
    with pytest.raises(UserError, match=f"^conf/experiment/made.yaml: {said}"):
        Experiment.from_content("made", SPEC | changes)


def test_a_row_without_a_value_of_its_setting_is_in_the_table(study, tmp_path):
    cells = {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora", "method.magnitude_ratio=0.25,0.5"]}
    spec = {"title": "Rows", "rows": ["method.magnitude_ratio"], "columns": "task.name", "cells": cells}
    experiment, outcomes = study(spec | {"full": SPEC["full"]}, lambda label, settings: 70)
    lines = {tuple(line[:2]): line for line in rows_of(write_report(experiment, outcomes, tmp_path))}
    assert {("none", "LoRA"), ("0.25", "Dual LoRA"), ("0.5", "Dual LoRA")} <= lines.keys()
    assert lines["none", "LoRA"][2].strip("*") == "70.0 ± 0.0 (5)"
