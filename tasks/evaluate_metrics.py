"""Our metrics as `evaluate.Metric`s, for code that uses that library. They are built directly; nothing is downloaded.

    from tasks.evaluate_metrics import E2eMetrics, GlueMetrics

    GlueMetrics("mrpc").compute(predictions=[0, 1, 1], references=[0, 1, 0])
    GlueMetrics("stsb").compute(predictions=[0.5, 2.0, 4.5], references=[1.0, 2.5, 5.0])
    E2eMetrics().compute(predictions=["a pub"], references=[["a pub", "one pub"]])

`add_batch` works as for any metric. `evaluate.load("glue")` is unrelated and needs the hub. Importing this module
takes seconds, since `evaluate` imports transformers; no task imports it.
"""

from collections.abc import Iterable
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value

from tasks import glue, metrics


class Checked(evaluate.Metric):
    """A metric that refuses values of another type: `datasets` would cut 0.7 to the class 0, and write 5 as "5"."""

    def check(self, predictions: Iterable[Any], references: Iterable[Any]) -> None:
        """Refuse values this metric cannot score.

        Raises:
            ValueError: with the first of them.
        """
        raise NotImplementedError

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one output and what was right. Raises ValueError as `check`."""
        self.check([prediction], [reference])
        super().add(prediction=prediction, reference=reference, **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add outputs and what was right, as `compute` does with those it is given. Raises ValueError as `check`."""
        self.check(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)


class GlueMetrics(Checked):
    """All metrics of one GLUE task, "sst2" say; label indices, or numbers for "stsb".

    Raises:
        TaskError: there is no such GLUE task.
    """

    def _info(self) -> evaluate.MetricInfo:
        task = glue.task(self.config_name)
        self.form, self.classes = task.form, len(task.labels)
        value = Value("float64" if self.form == "regression" else "int64")
        return evaluate.MetricInfo(
            description="Accuracy, F1 and Matthews correlation, or Pearson and Spearman correlation.",
            citation="arXiv 1804.07461",
            features=Features({"predictions": value, "references": value}),
        )

    def check(self, predictions: Iterable[Any], references: Iterable[Any]) -> None:
        """Refuse what is not a class index, or not a finite number for "stsb".

        Raises:
            ValueError: with the first such value.
        """
        for name, values in (("predictions", predictions), ("references", references)):
            found = np.asarray(values)
            if found.ndim != 1 or found.dtype.kind not in "biuf":
                raise ValueError(
                    f"{name}: {' '.join(str(values).split())[:80]} is not a list of one number for each example"
                )
            fits = np.isfinite(found) if self.form == "regression" else np.isin(found, range(self.classes))
            if not fits.all():
                wanted = "finite number" if self.form == "regression" else f"class index from 0 to {self.classes - 1}"
                raise ValueError(f"{name}: {found[~fits][0]} is not a {wanted}")

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        if self.form == "regression":
            return metrics.score_regression(predictions, references)
        return metrics.score_classification(predictions, references, self.classes)


class E2eMetrics(Checked):
    """BLEU, NIST, METEOR, ROUGE_L and CIDEr of the E2E NLG script; `references` holds a list for each output."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU, NIST, METEOR, ROUGE_L and CIDEr as measure_scores.py -p prints them.",
            citation="arXiv 1706.09254",
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def check(self, predictions: Iterable[Any], references: Iterable[Any]) -> None:
        """Refuse outputs that are not texts, and references that are not lists of texts.

        Raises:
            ValueError: with the first such value.
        """
        for text in predictions:
            if not isinstance(text, str):
                raise ValueError(f"predictions: {text!r} is not text")
        for texts in references:
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"references: {texts!r} is not a list of texts; every output needs a list")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return metrics.score_e2e(predictions, references)
