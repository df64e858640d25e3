"""DART 1.1.1: open-domain facts to text (arXiv 2007.02871), as LoRA measures it (arXiv 2106.09685, table 13).

The prompt is "subject : relation : object | ..." with the relation in lower case, and " ||"; every annotation is learnt
and accepted. Scores are WebNLG's three, on sets of facts taken as one where they are equal. In `data_dir`:
dart/dart-v1.1.1-full-{train,dev,test}.json; the hub's copy (Yale-LILY/dart) is a script, so without `data_dir` they
come from LoRA's repository at one commit.
"""

from collections.abc import Iterator
from pathlib import Path

from tasks import base
from tasks.base import Row, TaskError
from tasks.data_to_text import SEPARATOR, DataToText, Pair, format_triples

VERSION = 2  # 1: no output repeated an n-gram of its prompt


def task(subset: str, separator: str = SEPARATOR, scored: str = "test") -> "Dart":
    """Return the task; the options are explained in tasks/data_to_text.py.

    Raises:
        TaskError: a subset is named.
    """
    if subset:
        raise TaskError(f"dart/{subset}: no such task, only dart")
    return Dart(separator, scored)


class Dart(DataToText):
    """Facts from tables, WebNLG and E2E."""

    name, version, metric, lower_is_better = "dart", VERSION, "BLEU", ("TER",)
    folder = "dart"
    files = {
        s: (f"dart-v1.1.1-full-{f}.json",) for s, f in (("train", "train"), ("validation", "dev"), ("test", "test"))
    }

    def read_pairs(self, path: Path) -> Iterator[Pair]:
        """As in `DataToText`.

        Raises:
            TaskError: the file is not one of DART's, or an annotation has no text.
        """
        with base.translate_shape_errors("DART 1.1.1", path):
            for entry in base.read_json(path):
                facts = format_triples(
                    (subject, relation.lower(), obj) for subject, relation, obj in entry["tripleset"]
                )
                texts = [annotation["text"] for annotation in entry["annotations"]]
                if not all(text.strip() for text in texts):
                    raise ValueError(f"{facts!r} has no text")
                yield from ((facts, text, "") for text in texts)

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return BLEU, METEOR and TER."""
        from tasks import metrics

        (rows,) = results.values()
        return metrics.score_webnlg([r["answer"] for r in rows], [r["references"] for r in rows])
