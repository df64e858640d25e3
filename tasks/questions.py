"""Questions by what they ask for: the six coarse classes of TREC (Li and Roth, Learning Question Classifiers, 2002).

    python train.py task=questions data_dir=DIR

DIR holds train.tsv and test.tsv (plain or gzipped), with columns `label` and `question`; quotation marks are text.
Scores: accuracy and macro-F1 (the unweighted mean over classes).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tasks import base
from tasks.base import Row, Split, Task, TaskError

if TYPE_CHECKING:
    from tasks.measures import Score

VERSION = 1


def task(subset: str) -> "Questions":
    """Return the task.

    Raises:
        TaskError: a subset is named; there is none.
    """
    if subset:
        raise TaskError(f"questions/{subset}: no such task, only questions")
    return Questions()


class Questions(Task):
    """Single questions: abbreviation, description, entity, human, location or number."""

    name, version, form, metric = "questions", VERSION, "classification", "accuracy"
    labels = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    eval_splits = ("test",)

    def find_file(self, split: str, data_dir: str | None) -> Path:
        """Return the file of a split.

        Raises:
            TaskError: no folder is given, or the file is not in it.
        """
        if data_dir is None:
            raise TaskError("task=questions: no data; give data_dir=DIR, a folder with train.tsv and test.tsv")
        return base.find_data_file(data_dir, (".",), (f"{split}.tsv",))

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        return {split: base.file_sha256(self.find_file(split, data_dir)) for split in ("train", *self.eval_splits)}

    def split(self, name: str, data_dir: str | None = None) -> Split:
        """Return the rows of a split from its file.

        Raises:
            TaskError: it is missing or damaged, has a question without text, or a class that is none of the six.
        """
        path = self.find_file(name, data_dir)
        rows = []
        for line, row in base.read_table(path, "\t", quoted=False, needed=("label", "question")):
            with base.translate_shape_errors("a question and its class", f"{path}: line {line}"):
                if not row["question"].strip():
                    raise ValueError("an empty question")
                found = {"text": row["question"], "text_pair": "", "label": self.parse_label(row["label"])}
            rows.append({"id": f"{name}-{len(rows)}", **found})
        return Split(self.dataset(rows, path), path.name)

    def parse_label(self, word: str) -> int:
        """Return the index of a class.

        Raises:
            ValueError: it is not one of the six.
        """
        if word not in self.labels:
            raise ValueError(f"the label {word!r}, not one of {', '.join(self.labels)},")
        return self.labels.index(word)

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return accuracy and macro-F1."""
        from tasks import metrics

        (rows,) = results.values()
        pairs = [row["answer"] for row in rows], [row["gold"] for row in rows]
        accuracy = metrics.score_classification(*pairs, len(self.labels))["accuracy"]
        return {"accuracy": accuracy, "macro_f1": metrics.macro_f1(*pairs)}

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        from tasks import measures

        return {
            "accuracy": measures.Score(measures.mark_correct, measures.mean),
            "macro_f1": measures.Score(measures.get_answer_and_gold, measures.macro_f1),
        }
