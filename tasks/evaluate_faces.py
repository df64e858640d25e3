"""Our metrics as `evaluate.Metric`s, for code that speaks that interface. Built directly; nothing is downloaded.

    from tasks.evaluate_faces import E2eMetrics, GlueMetrics

    GlueMetrics("mrpc").compute(predictions=[0, 1, 1], references=[0, 1, 0])
    GlueMetrics("stsb").compute(predictions=[0.5, 2.0, 4.5], references=[1.0, 2.5, 5.0])
    E2eMetrics().compute(predictions=["a pub"], references=[["a pub", "one pub"]])

`add_batch` works as for any metric. `evaluate.load("glue")` is another thing and needs the hub. Importing this module
takes seconds, since `evaluate` imports transformers; no task imports it.
"""

import evaluate
from datasets import Features, List, Value

from tasks import glue, metrics


class GlueMetrics(evaluate.Metric):
    """All metrics of one GLUE task, "sst2" say; label indices, or numbers for "stsb".

    Raises:
        TaskError: there is no such GLUE task.
    """

    def _info(self) -> evaluate.MetricInfo:
        self.form = glue.task(self.config_name).form
        value = Value("float64" if self.form == "regression" else "int64")
        return evaluate.MetricInfo(
            description="Accuracy, F1 and Matthews correlation, or Pearson and Spearman correlation.",
            citation="arXiv 1804.07461",
            features=Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        measure = metrics.regression if self.form == "regression" else metrics.classification
        return measure(predictions, references)


class E2eMetrics(evaluate.Metric):
    """BLEU, NIST, METEOR, ROUGE_L and CIDEr of the E2E NLG script; `references` holds a list for each output."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU, NIST, METEOR, ROUGE_L and CIDEr as measure_scores.py -p prints them.",
            citation="arXiv 1706.09254",
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return metrics.e2e(predictions, references)
