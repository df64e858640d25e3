"""The metrics as `evaluate.Metric`s give what tasks/metrics.py gives."""

import numpy as np
import pytest

from tasks import TaskError, metrics

faces = pytest.importorskip("tasks.evaluate_metrics")


@pytest.mark.parametrize(("subset", "classes"), [("sst2", 2), ("mrpc", 2), ("cola", 2), ("mnli", 3)])
def test_classification(subset, classes):
    answers, gold = [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]
    found = faces.GlueMetrics(subset).compute(predictions=answers, references=gold)
    assert found == pytest.approx(metrics.score_classification(answers, gold, classes))
    assert ("f1" in found) == (classes == 2)
    assert faces.GlueMetrics(subset).compute(predictions=np.array(answers), references=gold) == found


PROBABILITIES = [[0.1, 0.9], [0.8, 0.2]]


@pytest.mark.parametrize(
    ("subset", "predictions", "message"),
    [
        ("sst2", [0.7, 1], "0.7 is not a class index from 0 to 1"),
        ("sst2", np.array([0.7, 0.2]), "0.7 is not a class index"),
        ("sst2", [0, 2], "2 is not a class index"),
        ("mnli", [-1, 2], "-1 is not a class index from 0 to 2"),
        ("sst2", [float("nan"), 1], "nan is not a class index"),
        ("sst2", PROBABILITIES, "is not a list of one number for each example"),
        ("sst2", ["0", "1"], "is not a list of one number"),
        ("sst2", [None, 1], "is not a list of one number"),
        ("stsb", [float("inf"), 1.0], "inf is not a finite number"),
        ("stsb", ["1.0", 2.0], "is not a list of one number"),
        ("stsb", [[1.0], [2.0]], "is not a list of one number"),
    ],
)
def test_what_datasets_would_cut_or_rewrite_is_refused(subset, predictions, message):
    with pytest.raises(ValueError, match=f"predictions: .*{message}"):
        faces.GlueMetrics(subset).compute(predictions=predictions, references=[0, 1])
    with pytest.raises(ValueError, match="references: "):
        faces.GlueMetrics(subset).compute(predictions=[0, 1], references=predictions)
    face = faces.GlueMetrics(subset)
    with pytest.raises(ValueError, match="predictions: "):
        face.add_batch(predictions=predictions, references=[0, 1])


def test_a_single_output_is_checked_like_a_batch():
    face = faces.GlueMetrics("sst2")
    face.add(prediction=1, reference=1)
    with pytest.raises(ValueError, match="predictions: 0.7 is not a class index"):
        face.add(prediction=0.7, reference=1)
    assert face.compute()["accuracy"] == 1


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a pub"], ["a pub"], "references: 'a pub' is not a list of texts"),
        (["a pub"], [[5]], r"references: \[5\] is not a list of texts"),
        (["a pub"], [None], "references: None is not a list of texts"),
        ([5], [["a pub"]], "predictions: 5 is not text"),
    ],
)
def test_texts_are_texts(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        faces.E2eMetrics().compute(predictions=predictions, references=references)


def test_regression_keeps_all_digits():
    answers, gold = [0.123456789, 2.0, 4.5, 3.3], [1.0, 2.5, 5.0, 3.0]
    found = faces.GlueMetrics("stsb").compute(predictions=answers, references=gold)
    assert found == pytest.approx(metrics.score_regression(answers, gold), rel=1e-12)


def test_an_unknown_task_is_refused():
    with pytest.raises(TaskError, match="glue/nli"):
        faces.GlueMetrics("nli")


def test_e2e_takes_batches_with_several_references(monkeypatch):
    monkeypatch.setattr(metrics, "score_on_penn_tokens", lambda *texts: {"METEOR": 0.5, "ROUGE_L": 0.5, "CIDEr": 1.0})
    texts, references = ["the oak is a pub", "a fig", "a bar"], [["the oak is a pub"], ["a fig", "the fig"], ["pub"]]
    face = faces.E2eMetrics()
    face.add_batch(predictions=texts[:2], references=references[:2])
    face.add(prediction=texts[2], reference=references[2])
    assert face.compute() == pytest.approx(metrics.score_e2e(texts, references))
