"""The metrics as `evaluate.Metric`s give what tasks/metrics.py gives."""

import pytest

from tasks import TaskError, metrics

faces = pytest.importorskip("tasks.evaluate_faces")


@pytest.mark.parametrize("subset", ["sst2", "mrpc", "cola", "mnli"])
def test_classification(subset):
    answers, gold = [0, 1, 1, 0, 1], [0, 1, 0, 0, 1]
    found = faces.GlueMetrics(subset).compute(predictions=answers, references=gold)
    assert found == pytest.approx(metrics.classification(answers, gold))


def test_regression_keeps_all_digits():
    answers, gold = [0.123456789, 2.0, 4.5, 3.3], [1.0, 2.5, 5.0, 3.0]
    found = faces.GlueMetrics("stsb").compute(predictions=answers, references=gold)
    assert found == pytest.approx(metrics.regression(answers, gold), rel=1e-12)


def test_an_unknown_task_is_refused():
    with pytest.raises(TaskError, match="glue/nli"):
        faces.GlueMetrics("nli")


def test_e2e_takes_batches_with_several_references(monkeypatch):
    monkeypatch.setattr(metrics, "on_penn_tokens", lambda *texts: {"METEOR": 0.5, "ROUGE_L": 0.5, "CIDEr": 1.0})
    texts, references = ["the oak is a pub", "a fig", "a bar"], [["the oak is a pub"], ["a fig", "the fig"], ["pub"]]
    face = faces.E2eMetrics()
    face.add_batch(predictions=texts[:2], references=references[:2])
    face.add(prediction=texts[2], reference=references[2])
    assert face.compute() == pytest.approx(metrics.e2e(texts, references))
