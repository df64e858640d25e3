"""Scores and judged rows of another form than a record takes are told before anything is trained."""

import json

import numpy as np
import pytest

import tasks
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.evaluate.evaluate import check_scoring
from dual_lora.lab.model.encode import encode_prompt
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from dual_lora.lab.train.trainer import RunTrainer
from tasks.base import Task
from tests.support.refused_runs import SHORT, refuse


class Planted(Task):
    """Texts to continue, whose scores and judged rows a test chooses."""

    name, version, form, metric = "demo/choice", 1, "generation", "accuracy"
    columns: dict = {}
    scores: dict = {"accuracy": 0.5}
    prompt = "say it"

    def split(self, name, data_dir=None):
        rows = [
            {"id": f"{name}-{n}", "prompt": self.prompt, "target": f"it is {n}", "references": [""]} for n in range(9)
        ]
        return tasks.Split(self.dataset(rows, "made up"), "made up")

    def source(self, data_dir=None):
        return {"generator": "made up"}

    def judge(self, row, output):
        return super().judge(row, output) | self.columns

    def score(self, results):
        return dict(self.scores)


def plant(monkeypatch, **attributes) -> Planted:
    task = Planted()
    for name, value in attributes.items():
        setattr(task, name, value)
    monkeypatch.setattr("dual_lora.lab.train.run.load_task", lambda settings: task)
    return task


PLANTED = ["model=tiny-gpt2", "task=demo/choice", "task.max_new_tokens=4"]


def test_numbers_of_numpy_are_kept_as_numbers(monkeypatch, runs_folder):
    columns = {"right": np.bool_(True), "length": np.int64(3), "share": np.float32(0.5), "parts": [np.float64(0.25)]}
    scores = {"accuracy": np.float32(0.5), "count": np.int64(3), "whole": 1}
    plant(monkeypatch, columns=columns, scores=scores)
    run = Run.prepare(load_settings([*SHORT, *PLANTED]))
    result = train_run(run)
    assert result["metrics"] == {"accuracy": 0.5, "count": 3.0, "whole": 1.0}
    row = json.loads((run.record.folder / "predictions.jsonl").read_text().splitlines()[0])
    assert {name: row[name] for name in columns} == {"right": True, "length": 3, "share": 0.5, "parts": [0.25]}


WRONG = {
    "a metric misspelt": (
        {"metric": "acuracy", "scores": {"accuracy": 1.0, "f1": 0.5}},
        "task=demo/choice: score() returns no 'acuracy', the task's metric, but accuracy, f1; set metric to one of "
        "them, or return it. Did you mean accuracy?",
    ),
    "no scores": ({"scores": {}}, "score() returns no 'accuracy', the task's metric, but nothing; set metric"),
    "a text for a score": (
        {"scores": {"accuracy": "0.5"}},
        "task=demo/choice: score() returns a str for accuracy; return a number",
    ),
    "a score named by a number": (
        {"scores": {"accuracy": 1.0, 0: 0.5}},
        "task=demo/choice: score() returns a score named 0, a int; name it by a text",
    ),
    "a missing score": ({"scores": {"accuracy": None}}, "score() returns a NoneType for accuracy; return a number"),
    "a set in a row": (
        {"columns": {"words": {"a"}}},
        "task=demo/choice: the judged row of validation-0, column 'words', is a set, which no record can hold; return",
    ),
    "not a number in a list": (
        {"columns": {"shares": [0.5, float("nan")]}},
        "task=demo/choice: the judged row of validation-0, column 'shares', is nan, which no record can hold; return",
    ),
    "an infinite number of numpy": (
        {"columns": {"share": np.float32("inf")}},
        "column 'share', is inf, which no record",
    ),
    "the output again": (
        {"columns": {"output": 3}},
        "task=demo/choice: the judged row of validation-0 has a column 'output', which every prediction has; give it",
    ),
    "another id": ({"columns": {"id": "a"}}, "has a column 'id', which every prediction has; give it another name"),
    "an array in a list": ({"columns": {"words": [np.zeros(2)]}}, "column 'words', is a ndarray, which no record"),
}


@pytest.mark.parametrize("what", WRONG)
def test_scores_of_another_form_are_told_before_the_model_is_loaded(what, monkeypatch, runs_folder):
    attributes, said = WRONG[what]
    plant(monkeypatch, **attributes)
    monkeypatch.setattr("dual_lora.lab.train.run.draw_initial_model", None)
    assert said in refuse(PLANTED)


def test_a_task_that_fails_on_right_answers_or_few_rows_is_left_to_its_outputs(monkeypatch, capsys):
    task = plant(monkeypatch)
    splits = {"validation": task.split("validation")}

    def fail(results):
        raise ZeroDivisionError("no wrong answer")

    task.score = fail
    check_scoring(task, splits)
    said = f"fails (ZeroDivisionError: no wrong answer; {__file__}, line {fail.__code__.co_firstlineno + 1}); unless"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: task=demo/choice: scoring the targets as outputs ") and said in line
    task.score = lambda results: {"accuracy": float("nan")}  # as a correlation of a few equal numbers
    check_scoring(task, splits)
    task.score = lambda results: {"accuracy": 1.0} if len(results["validation"]) == 9 else {}
    check_scoring(task, splits)
    assert not capsys.readouterr().err


def test_an_empty_prompt_to_score_is_named_before_training(monkeypatch, runs_folder):
    plant(monkeypatch, prompt="")
    monkeypatch.setattr(RunTrainer, "fit_run", None)
    said = refuse(PLANTED)
    assert "task=demo/choice: the prompt of validation-0 of validation is empty, and tiny-gpt2 adds no special" in said


def test_an_empty_prompt_is_scored_where_the_model_starts_every_text(monkeypatch, runs_folder):
    plant(monkeypatch, prompt="")
    settings = load_settings([*SHORT, "model=tiny-llama", *PLANTED[1:]])
    assert len(encode_prompt(load_tokenizer(settings), {"id": "1", "prompt": ""}, settings)) == 1
    assert train_run(Run.prepare(settings))["metrics"] == {"accuracy": 0.5}
