"""What tasks declare of their scores gives the task's own score, on all rows and on rows drawn anew."""

import json

import numpy as np
import pytest

import tasks
from dual_lora.lab.statistics.compare import compare_means
from tasks import measures
from tests.support.answers import chosen, judged, labels, numbers, results, written
from tests.support.places import GOLDEN

# What no task declares: a scorer that would have to run thousands of times, or a share nobody asked about.
UNDECLARED = {"NIST", "METEOR", "ROUGE_L", "CIDEr", "TER", "seen_TER", "unseen_TER", "slot_accuracy", "unanswered"}


def runs_of(name: str, count: int) -> list[list[dict]]:
    """Return the judged rows of some runs of a task on the same examples."""
    task, rng = tasks.load(name), np.random.default_rng(7)
    if name == "commonsense":
        return [chosen(rng, {split: 20 + 5 * i for i, split in enumerate(task.eval_splits)}, 0.7) for _ in range(count)]
    if task.form == "generation" and name != "demo/choice":
        rows = written(8, count)
        return [[row | {"split": task.eval_splits[0]} for row in run] for run in rows]
    classes = len(task.labels) or 3
    gold = {split: np.random.default_rng(1).integers(classes, size=60) for split in task.eval_splits}
    if task.form == "regression":
        return [judged(numbers(rng, gold["validation"], 1.0), gold["validation"].tolist()) for _ in range(count)]
    answers = [{split: labels(rng, g, 0.8, classes) for split, g in gold.items()} for _ in range(count)]
    return [[row for s, g in gold.items() for row in judged(found[s], g.tolist(), s)] for found in answers]


TASKS = [f"glue/{subset}" for subset in ("cola", "mnli", "mrpc", "sst2", "stsb")]
TASKS += ["commonsense", "dart", "demo/choice", "demo/restaurants", "demo/sentiment", "e2e", "webnlg"]


def value(score: measures.Score, rows: list[dict]) -> float:
    """Return a score as its declaration computes it on rows."""
    strata: dict[str, list] = {}
    for row in rows:
        if (name := score.stratum(row)) is not None:
            strata.setdefault(name, []).append(score.columns(row))
    return float(np.mean([score.measure(np.array(c, dtype=float), np.ones((1, len(c)))) for c in strata.values()]))


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(measures.metrics, "score_on_penn_tokens", lambda *_: {})
    monkeypatch.setattr(measures.metrics, "meteor", lambda *_: {})


@pytest.mark.parametrize("name", TASKS)
def test_a_declaration_gives_the_tasks_own_score(name, no_java):
    task, (rows,) = tasks.load(name), runs_of(name, 1)
    scores, declared = task.score(results(rows)), task.declare_scores(rows[0])
    assert set(scores) - UNDECLARED == set(declared)
    for metric, score in declared.items():
        assert value(score, rows) == pytest.approx(scores[metric], abs=1e-12), metric
    assert not set(task.lower_is_better) - set(scores)
    assert {metric for metric in scores if "unanswered" in metric} <= set(task.lower_is_better)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_a_declaration_gives_the_same_intervals_and_tests_to_the_last_digit(name, seeds, no_java):
    """The golden values are those of the harness's former rules, which knew tasks and scores by name."""
    task, runs = tasks.load(name), runs_of(name, 2 * seeds)
    ours, theirs = dict(enumerate(runs[:seeds])), dict(enumerate(runs[seeds:]))
    golden = json.loads((GOLDEN / "differences.json").read_text())
    declared = task.declare_scores(runs[0][0])
    assert {f"{name} {metric} {seeds}" for metric in declared} == {
        key for key in golden if key.startswith(f"{name} ") and key.endswith(f" {seeds}")
    }
    for metric in declared:
        found = compare_means([ours], [theirs], task, metric, resamples=60)
        expected = golden[f"{name} {metric} {seeds}"]
        assert [found.mean, found.low, found.high, found.p] == pytest.approx(expected[:4], rel=1e-12), metric
        assert found.test == expected[4] and np.mean(found.by_seed) == pytest.approx(found.mean, abs=1e-12)
