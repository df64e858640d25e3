"""The eight GLUE tasks that LoRA's table 2 reports (arXiv 1804.07461; columns: arXiv 2106.09685, table 2).

Every metric of a column is stored; `metric` is the one LoRA's table prints: matched accuracy for MNLI, Matthews
correlation for CoLA, Pearson for STS-B, accuracy for the rest. Scores are of the development sets, whose labels are
public. Sources: the hub's `nyu-mll/glue`, or the official TSV files below `data_dir` (plain or gzipped, in `glue/SST-2`
or `SST-2`). MRPC may also be Microsoft's msr_paraphrase_train.txt, which GLUE's dev_ids.tsv divides. One difference is
known: the hub's MRPC text is tokenized ("doesn 't"), the official file's is not.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import base
from tasks.base import Row, Split, Task, TaskError, load_dataset

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.measures import Score

VERSION = 1
HUB, REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
ORIGINAL, IDS = "msr_paraphrase_train.txt", ("#1 ID", "#2 ID")


@dataclass(frozen=True)
class Spec:
    """Where the columns of one task are: official folder, text columns of the files and of the hub, label column."""

    folder: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    hub_text: tuple[str, ...]
    metric: str
    named: bool = False  # labels are words in the official files, not indices
    header: tuple[str, ...] | None = None
    holes: bool = False  # the official file has rows with missing fields, which are dropped


# Tasks of which no official file has an empty text. The full QQP has some; of MNLI and QNLI that is not known.
WITHOUT_EMPTY_TEXTS = ("cola", "sst2", "mrpc", "stsb", "rte")
ENTAILMENT = ("entailment", "not_entailment")
SPECS = {
    "cola": Spec(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        ("sentence",),
        "matthews",
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Spec("SST-2", ("sentence",), "label", ("negative", "positive"), ("sentence",), "accuracy"),
    "mrpc": Spec(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        ("sentence1", "sentence2"),
        "accuracy",
    ),
    "stsb": Spec("STS-B", ("sentence1", "sentence2"), "score", (), ("sentence1", "sentence2"), "pearson"),
    "qqp": Spec(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        ("question1", "question2"),
        "accuracy",
        holes=True,
    ),
    "mnli": Spec(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("premise", "hypothesis"),
        "accuracy",
        named=True,
    ),
    "qnli": Spec(
        "QNLI", ("question", "sentence"), "label", ENTAILMENT, ("question", "sentence"), "accuracy", named=True
    ),
    "rte": Spec(
        "RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, ("sentence1", "sentence2"), "accuracy", named=True
    ),
}


def task(subset: str) -> "Glue":
    """Return one GLUE task by its hub name, e.g. "sst2".

    Raises:
        TaskError: there is no such task.
    """
    if subset not in SPECS:
        raise TaskError(f"glue/{subset}: no such GLUE task; known: {', '.join(SPECS)}")
    return Glue(subset)


class Glue(Task):
    """A sentence or sentence-pair task; `classification`, but `regression` for STS-B."""

    version = VERSION

    def __init__(self, subset: str) -> None:
        self.subset, self.spec = subset, SPECS[subset]
        self.name = f"glue/{subset}"
        self.form = "classification" if self.spec.labels else "regression"
        self.labels, self.metric = self.spec.labels, self.spec.metric
        if subset == "mnli":
            self.eval_splits = ("validation_matched", "validation_mismatched")
            self.further_metrics = (f"mismatched_{self.metric}",)

    def find_file(self, split: str, data_dir: str) -> Path:
        """Return the official file of a split; a file named "sample" stands in where the full one is absent.

        Raises:
            TaskError: there is none, or there are several.
        """
        stem = {"train": "train", "validation": "dev"}.get(split, split.replace("validation", "dev"))
        folders = (f"glue/{self.spec.folder}", self.spec.folder)
        original = (ORIGINAL,) if self.subset == "mrpc" else ()
        try:
            return base.find_data_file(data_dir, folders, (f"{stem}.tsv", f"{stem}.sample*.tsv", *original))
        except TaskError as error:
            raise TaskError(f"{error}{self.locate_original(data_dir) if original else ''}") from error

    def locate_original(self, data_dir: str) -> str:
        """Return where Microsoft's MRPC file lies, if it is in data_dir but not where it belongs."""
        root = Path(data_dir).expanduser()
        found = next((path for path in (root / ORIGINAL, *root.glob(f"*/{ORIGINAL}")) if path.is_file()), None)
        return f"; move {found} and GLUE's dev_ids.tsv to {root / self.spec.folder}/" if found else ""

    def find_dev_ids(self, path: Path) -> Path | None:
        """Return the file that says which rows of Microsoft's MRPC file GLUE validates on; None for GLUE's own files.

        Raises:
            TaskError: it is not there.
        """
        if path.name.removesuffix(".gz") != ORIGINAL:
            return None
        found = [path.with_name(name) for name in ("dev_ids.tsv", "dev_ids.tsv.gz") if path.with_name(name).is_file()]
        if not found:
            raise TaskError(f"{path}: not divided into train and dev; put GLUE's dev_ids.tsv next to it")
        base.check_gzipped_copy(found[0])
        return found[0]

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        """Return the revision of the hub's data, or the hash of every split's file.

        Raises:
            TaskError: a file is missing, or the files lie in two folders.
        """
        if data_dir is None:
            return {"hub": f"{HUB}@{REVISION}"}
        paths = {split: self.find_file(split, data_dir) for split in ("train", *self.eval_splits)}
        if len(folders := {path.parent for path in paths.values()}) > 1:  # they may be of different versions
            one, other = sorted(map(str, folders))
            raise TaskError(f"data_dir={data_dir}: {one} and {other} each hold some of the files; keep one of them")
        files = {split: filter(None, (path, self.find_dev_ids(path))) for split, path in paths.items()}
        return {split: " ".join(map(base.file_sha256, found)) for split, found in files.items()}

    def split(self, name: str, data_dir: str | None = None) -> Split:
        if data_dir is None:
            rows = load_dataset(HUB, self.subset, revision=REVISION, split=name)
            return Split(self.convert_hub_rows(rows, name), f"{HUB}/{self.subset}@{REVISION[:8]}")
        path = self.find_file(name, data_dir)
        return Split(self.read_file_rows(path, name), f"{path.parent.name}/{path.name}")

    def convert_hub_rows(self, rows: "Dataset", split: str) -> "Dataset":
        """Return the hub's rows in this project's columns."""
        texts = [[row[c] for c in self.spec.hub_text] for row in rows]
        labels = [restore_score(row["label"]) if self.form == "regression" else row["label"] for row in rows]
        found = (self.build_row(split, i, *pair) for i, pair in enumerate(zip(texts, labels, strict=True)))
        return self.dataset(found, HUB)

    def read_file_rows(self, path: Path, split: str) -> "Dataset":
        """Return the rows of an official file in this project's columns.

        Raises:
            TaskError: it is damaged, or has an empty text, which the official one does not.
        """
        spec, rows, needed = self.spec, [], (*self.spec.text, self.spec.label)
        listed = self.find_dev_ids(path)
        ids = self.read_dev_ids(listed) if listed else set()
        left = set(ids)
        for line, row in base.read_table(path, "\t", False, needed, spec.header, skip_short=spec.holes):
            with base.translate_shape_errors(f"GLUE's {spec.folder}", f"{path}: line {line}"):
                label, texts = self.parse_label(row[spec.label]), [row[c] for c in spec.text]
                if self.subset in WITHOUT_EMPTY_TEXTS and not all(text.strip() for text in texts):
                    raise ValueError("an empty text")
                pair = tuple(row[name] for name in IDS) if listed else None
                left.discard(pair)
                if not listed or (pair in ids) == (split == "validation"):
                    rows.append(self.build_row(split, len(rows), texts, label))
        if left:  # a damaged id would leave its row in the training set
            raise TaskError(f"{listed}: no row of {path.name} has the ids {' and '.join(min(left))}; {base.FETCH}")
        return self.dataset(rows, path)

    def read_dev_ids(self, path: Path) -> set[tuple[str, ...]]:
        """Return the pairs of ids of the rows of Microsoft's MRPC file that GLUE validates on."""
        return {tuple(row.values()) for _, row in base.read_table(path, "\t", False, columns=IDS)}

    def parse_label(self, word: str) -> int | float:
        """Return a label of an official file as a class index or, for STS-B, as its score.

        Raises:
            ValueError: it is not such a label.
        """
        if self.form == "regression":
            score = base.parse_number(word)
            if not 0 <= score <= 5:
                raise ValueError(f"a score of {word}, which is not in [0, 5],")
            return score
        known = self.labels if self.spec.named else tuple(map(str, range(len(self.labels))))
        if word not in known:
            raise ValueError(f"the label {word!r}, not one of {', '.join(known)},")
        return known.index(word)

    @staticmethod
    def build_row(split: str, number: int, texts: list[str], label: int | float) -> Row:
        return {
            "id": f"{split}-{number}",
            "text": texts[0],
            "text_pair": texts[1] if len(texts) == 2 else "",
            "label": label,
        }

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return every metric of the column; MNLI's mismatched set is added as "mismatched_..."."""
        from tasks import metrics

        scores = {}
        for split, rows in results.items():
            prefix = "mismatched_" if is_mismatched(split) else ""
            pairs = [r["answer"] for r in rows], [r["gold"] for r in rows]
            regression = self.form == "regression"
            found = (
                metrics.score_regression(*pairs)
                if regression
                else metrics.score_classification(*pairs, len(self.labels))
            )
            scores.update({prefix + key: value for key, value in found.items()})
        return scores

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        from tasks import measures

        regression = self.form == "regression"
        scores = (
            measures.declare_regression_scores()
            if regression
            else measures.declare_classification_scores(len(self.labels))
        )
        parts = {"": lambda row: not is_mismatched(row["split"])}
        if self.subset == "mnli":
            parts["mismatched_"] = lambda row: is_mismatched(row["split"])
        found = [measures.restrict_scores(scores, prefix, belongs) for prefix, belongs in parts.items()]
        return {name: score for part in found for name, score in part.items()}


def restore_score(score: float) -> float:
    """Return a score of STS-B from the hub, which is float32, as in the official file: with at most three decimals, or
    with 15 digits if it is one of the few means of up to 15 judgements, such as 32/7."""
    rounded = round(score, 3)
    mean = Fraction(score).limit_denominator(15)
    return rounded if abs(rounded - score) < 1e-6 else float(f"{float(mean):.15g}")


def is_mismatched(split: str) -> bool:
    """Return whether a split is MNLI's of other genres than training's."""
    return split.endswith("mismatched")
