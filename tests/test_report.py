"""Reports from records made by hand: what stands in a cell, what is marked, what is said of differences."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pandas as pd
import pytest
import yaml

import tasks
from dual_lora.lab import document, grid, report, results
from dual_lora.lab.document import Table, Text
from dual_lora.lab.experiments import Experiment
from dual_lora.lab.runs import Record

GLUE = {
    "title": "GLUE",
    "rows": ["model.name"],
    "mean": "task.name",
    "columns": "published",
    "published": ["lora_table2_glue"],
    "baselines": ["LoRA"],
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"]},
    "full": {
        "seeds": [0, 1],
        "run": ["model=roberta-base", "method.rank=8", "eval.before=false"],
        "blocks": [["task=glue/sst2"], ["task=glue/rte"]],
    },
}
RATIOS = {
    "title": "Ratios",
    "rows": ["task.name"],
    "columns": "method.magnitude_ratio",
    "published": ["dual_lora_fig2_magnitude_ratio"],
    "baselines": ["LoRA"],
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora", "method.magnitude_ratio=0.25,0.5"]},
    "full": {"seeds": [0, 1, 2], "run": ["model=roberta-base", "task=glue/rte"]},
}


def finish(settings, right: int, of: int = 100, **changes) -> Record:
    """Write the record of a run that had `right` of `of` sentences right: the last ones, so that runs nest."""
    record = Record.of(settings)
    record.folder.mkdir(parents=True)
    record.write("config.yaml", yaml.safe_dump(asdict(settings)))
    environment = {"uncommitted_changes": False, "processor": "abacus", "threads": 1, "commit": "c0ffee" * 6}
    record.write("environment.json", environment | changes.pop("environment", {}))
    rows = [{"split": "validation", "id": f"v-{i}", "answer": int(i >= of - right), "gold": 1} for i in range(of)]
    record.write_lines("predictions.jsonl", rows)
    task = tasks.load(settings.task.name)
    facts = {"model": settings.model.name, "task": task.name, "method": settings.method.name, "seed": settings.seed}
    facts |= {"metric": task.metric, "task_version": task.version, "metrics": task.score({"validation": rows})}
    facts |= {"trainable_parameters": 887042, "steps": 10, "train_seconds": 5.0, "tokens_per_second": 9.0}
    data = {"validation": {"origin": "dev.tsv", "rows": of, "sha256": "0"}}
    record.write("result.json", facts | {"data": data, "identity": record.name} | changes)
    return record


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table's lines."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.fixture
def study(runs_folder):
    """A function that finishes an experiment's runs with the given numbers right and returns what is known of them.
    right: a function of the label, the settings; None leaves a run undone."""

    def study(spec, right, **changes):
        experiment = Experiment.read("made", spec)
        cells = experiment.compose([])
        for cell in cells:
            number = right(cell.label, cell.settings)
            if number is not None and not Record.of(cell.settings).result():
                finish(cell.settings, number, **changes)
        return experiment, grid.look_up(cells, "made")

    return study


def test_ours_stands_beside_the_published_rows_of_the_same_model_method_and_rank(study, tmp_path):
    experiment, done = study(GLUE, lambda label, s: 80 + 2 * s.seed + 5 * (label == "Dual LoRA"))
    text = report.write(experiment, done, tmp_path)
    head, *lines = rows_of(text)
    assert head == ["model", "method", "SST-2", "RTE", "mean of 2", "trained", "s/step"]
    ours, published, dual = lines[:3]
    assert ours[:5] == ["roberta-base", "LoRA", *3 * ["81.0 ± 1.4 (2)"]]
    assert published[:4] == ["roberta-base", "LoRA [lora_table2_glue]", "95.1±0.2", "86.6±0.7"]
    assert dual[2] == "**86.0 ± 1.4 (2)**" and dual[5:] == ["887,042", "0.50"]


def test_all_parts_make_the_published_average(study, tmp_path):
    names = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    whole = GLUE | {"full": GLUE["full"] | {"blocks": [[f"task=glue/{name}"] for name in names]}}
    experiment = Experiment.read("made", whole)
    done = grid.look_up(experiment.compose(["seed=0"]), "made")
    heads = [column.head for column in results.columns(experiment, done)]
    assert heads == ["MNLI", "SST-2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STS-B", "avg"]


def test_differences_are_tested_on_the_predictions_and_over_tasks(study, tmp_path):
    experiment, done = study(GLUE, lambda label, s: 60 + s.seed + 20 * (label == "Dual LoRA"))
    text = report.write(experiment, done, tmp_path)
    shown = [line for line in text.splitlines() if line.startswith("- glue/")]
    assert len(shown) == 2
    assert shown[0].startswith("- glue/sst2 (accuracy), model roberta-base: Dual LoRA - LoRA: +20.0, 95 % interval +1")
    assert "Holm" in shown[0] and shown[0].endswith(": shown")
    assert "better on 2 of 2 tasks; Wilcoxon" in text and "Interquartile mean" in text


def test_one_seed_shows_nothing_and_other_examples_cannot_be_compared(study, tmp_path):
    one = GLUE | {"full": GLUE["full"] | {"seeds": [0]}}
    experiment, done = study(one, lambda label, s: 60 + 20 * (label == "Dual LoRA"))
    text = report.write(experiment, done, tmp_path)
    assert "not shown" in text and "what a seed does is in neither" in text
    lines = done[0].record.folder / "predictions.jsonl"
    lines.write_text(lines.read_text().replace("v-0", "w-0"))
    assert "cannot be compared" in report.write(experiment, done, tmp_path)


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
    experiment, done = study(GLUE, lambda label, s: 80 if s.seed == 0 and label == "LoRA" else None, **changes)
    text = report.write(experiment, done, tmp_path)
    assert f"80.0 (1){mark} [a]" in text and f"- {mark}: {results.MARKS[mark]}" in text
    clean, done = study(GLUE, lambda label, s: 80)
    (dual,) = [cells for cells in rows_of(report.write(clean, done, tmp_path)) if cells[1] == "Dual LoRA"]
    assert mark not in "".join(dual)


def test_a_missing_part_leaves_the_mean_empty_and_a_failure_says_why(study, tmp_path):
    experiment, done = study(GLUE, lambda label, s: None if s.task.name.endswith("rte") else 80)
    (failed,) = [c for c in done if c.result is None and c.cell.label == "LoRA" and c.settings.seed == 0]
    record = Record.of(failed.settings)
    record.folder.mkdir(parents=True)
    record.write("config.yaml", yaml.safe_dump(asdict(failed.settings)))
    record.fail(RuntimeError("the loss is nan at step 3"))
    done = grid.look_up(experiment.compose([]), "made")
    _, ours, _, dual, *_ = rows_of(report.write(experiment, done, tmp_path))
    assert ours[2:5] == ["80.0 ± 0.0 (2)", "– [ab]", "– [c]"] and dual[3] == "– [b]"
    assert "[a]: failed: the loss is nan at step 3" in (tmp_path / "table.md").read_text()


def test_a_setting_heads_columns_and_what_lacks_it_has_its_own(study, tmp_path):
    experiment, done = study(RATIOS, lambda label, s: 70 + s.seed + (s.method.magnitude_ratio or 0) * 8)
    head, lora, dual, *_ = rows_of(report.write(experiment, done, tmp_path))
    assert head[:5] == ["task", "method", "none", "0.25", "0.5"]
    assert lora[2:5] == ["71.0 ± 1.0 (3)", "", ""] and dual[2:5] == ["", "73.0 ± 1.0 (3)", "**75.0 ± 1.0 (3)**"]
    shown = [line for line in (tmp_path / "table.md").read_text().splitlines() if "Dual LoRA - LoRA" in line]
    assert ["magnitude_ratio 0.25: " in shown[0], "magnitude_ratio 0.5: " in shown[1]] == [True, True]
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
    experiment, done = study(GLUE, lambda label, s: 80 + s.seed)
    for folder in ("a", "b"):
        report.write(experiment, done, tmp_path / folder)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("a", "b"))
    assert first == second
    page = Page()
    page.feed((tmp_path / "a" / "report.html").read_text())
    assert not page.open and page.cells > 20
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_latex_escapes_what_it_must():
    cells = pd.DataFrame([["a_b & 5 %", "1.0 ± 0.1 (2)‡"], ["– [a]", "{x}$"]], columns=["m#", "s/step"])
    bold = pd.DataFrame([[False, True], [False, False]], columns=cells.columns)
    text = document.latex([Text("no table"), Table(cells, "100 %", bold)])
    for part in (r"a\_b \& 5 \%", r"\textbf{1.0 $\pm$ 0.1 (2)\ddag{}}", r"m\#", r"\toprule", r"\caption{100 \%}"):
        assert part in text
    assert text.count("{") == text.count("}") and "‡" not in text and "–" not in text


def test_the_csv_holds_every_value(study, tmp_path):
    experiment, done = study(GLUE, lambda label, s: 80 + s.seed)
    report.write(experiment, done, tmp_path)
    values = pd.read_csv(tmp_path / "table.csv")
    runs = values.dropna(subset="run")
    for _, row in runs.iterrows():
        result = json.loads((grid.runs.RUNS / "made" / row["run"] / "result.json").read_text())
        assert row["value"] == pytest.approx(100 * result["metrics"]["accuracy"])
    assert len(runs) == 8 and len(values) == 12
