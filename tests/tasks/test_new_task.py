"""A task that nobody's code has heard of gets intervals and tests from its own file alone."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import f1_score

import tasks
from dual_lora.lab.statistics.compare import compare_means, estimate_difference
from tasks.base import Task, TaskError

SOURCE = '''
import numpy as np

from tasks import measures
from tasks.base import Task

LABELS = ("who", "what", "where")


def overlap(row):
    """ROUGE-L: the F-measure of the longest common subsequence of words."""
    ours, gold = row["answer"].split(), row["references"][0].split()
    length = np.zeros((len(ours) + 1, len(gold) + 1), int)
    for i, word in enumerate(ours, 1):
        for j, other in enumerate(gold, 1):
            same = length[i - 1, j - 1] + 1
            length[i, j] = same if word == other else max(length[i - 1, j], length[i, j - 1])
    return 2 * length[-1, -1] / max(len(ours) + len(gold), 1)


def macro_f1(columns_NC, weights_RN):
    """The unweighted mean of F1 over classes, from (answer, gold) and how often each row occurs."""
    scores = []
    for label in range(len(LABELS)):
        both = (columns_NC == label).all(axis=1)
        either = (columns_NC == label).sum(axis=1)
        scores.append(measures.divide_or_zero(2.0 * (weights_RN @ both), weights_RN @ either))
    return np.mean(scores, axis=0)


class Questions(Task):
    name, version, form, metric = "planted", 1, "generation", "ROUGE_L"

    def score(self, results):
        rows = [row for part in results.values() for row in part]
        ones = np.ones((1, len(rows)))
        declared = self.declare_scores(rows[0])
        return {
            name: float(score.measure(np.array([score.columns(row) for row in rows], float), ones)[0])
            for name, score in declared.items()
        }

    def declare_scores(self, example):
        return {
            "macro_f1": measures.Score(lambda row: (row["class"], row["true_class"]), macro_f1),
            "exact_match": measures.Score(measures.mark_correct, measures.mean),
            "ROUGE_L": measures.Score(lambda row: (overlap(row),), measures.mean),
            "BLEU": measures.Bleu().score(),
        }


def task(subset):
    return Questions()
'''
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "the", "door", "of", "a", "house"]


@pytest.fixture
def planted(monkeypatch) -> Task:
    module = types.ModuleType("tasks.planted")
    exec(SOURCE, module.__dict__)
    monkeypatch.setitem(sys.modules, "tasks.planted", module)
    return module.task("")


def write_run(quality: float, seed: int, examples: int = 80) -> list[dict]:
    """Return the judged rows of a run that copies each reference word with probability `quality`."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(5)
    rows = []
    for number in range(examples):
        gold, label = " ".join(shared.choice(WORDS, size=8)), int(shared.integers(3))
        words = [word if rng.random() < quality else str(rng.choice(WORDS)) for word in gold.split()]
        answer = gold if rng.random() < quality / 2 else " ".join(words)
        guess = label if rng.random() < quality else int(rng.integers(3))
        row = {"split": "validation", "id": str(number), "answer": answer, "gold": gold, "references": [gold]}
        rows.append(row | {"class": guess, "true_class": label})
    return rows


@pytest.mark.parametrize("metric", ["macro_f1", "exact_match", "ROUGE_L", "BLEU"])
def test_a_planted_task_has_intervals_and_tests_for_every_score(planted, metric):
    ours = {seed: write_run(0.9, seed) for seed in range(5)}
    theirs = {seed: write_run(0.5, 10 + seed) for seed in range(5)}
    found = compare_means([ours], [theirs], planted, metric, resamples=200)
    scores = [[planted.score({"validation": rows})[metric] for rows in method.values()] for method in (ours, theirs)]
    assert found.by_seed == pytest.approx(tuple(np.subtract(*scores)))
    assert 0 < found.low < found.mean < found.high and found.p < 0.05 and found.test == "paired permutation"
    mean, error = estimate_difference(ours, theirs, planted, metric)
    assert mean == pytest.approx(found.mean) and 0 < error < mean
    alone = compare_means([{0: ours[0]}], [{0: theirs[0]}], planted, metric, resamples=200)
    assert alone.test == ("McNemar" if metric == "exact_match" else "paired permutation")
    same = compare_means([ours], [ours], planted, metric, resamples=200)
    assert same.mean == 0 and same.p == 1


def test_the_planted_scores_are_those_of_the_libraries(planted):
    rows = write_run(0.7, 3)
    scores = planted.score({"validation": rows})
    classes = [[row[key] for row in rows] for key in ("true_class", "class")]
    assert scores["macro_f1"] == pytest.approx(f1_score(*classes, average="macro"))
    corpus = sacrebleu.corpus_bleu(
        [row["answer"] for row in rows], [[row["gold"] for row in rows]], lowercase=True, smooth_method="none"
    )
    assert scores["BLEU"] == pytest.approx(corpus.score / 100)
    assert scores["exact_match"] == np.mean([row["answer"] == row["gold"] for row in rows])


def test_a_list_is_given_for_an_option_whose_default_is_a_tuple(monkeypatch):
    given = []

    def task(subset, words=("a",)):
        given.append(words)
        return tasks.load("demo/sentiment")

    monkeypatch.setitem(tasks.plugins, "made", tasks.Plugin(types.SimpleNamespace(task=task), Path("made.py"), "0"))
    tasks.load("made", {"words": ["b"]})
    assert given == [["b"]]
    with pytest.raises(TaskError, match=r"words=b: must be like \['a'\], its default"):
        tasks.load("made", {"words": "b"})


def test_two_rows_of_one_id_are_refused():
    """Runs are paired by ids, after all of them are done."""
    task, (row, *_) = tasks.load("demo/sentiment"), tasks.load("demo/sentiment").split("validation").rows
    with pytest.raises(TaskError, match="^made up: two rows have the id 'x'; give each an id of its own$"):
        task.dataset([row | {"id": name} for name in ("x", "y", "x")], "made up")
