"""What E2E, DART and WebNLG share, after LoRA's examples/NLG (arXiv 2106.09685, section 5.4 and table 11).

One training row is a meaning with one of its texts; one evaluation row is a meaning with all of its texts, in the order
of first appearance. The prompt is the meaning and a separator, the target a blank and the text. LoRA's separator is
GPT-2's end-of-text token (gpt2_encode.py --add_bos), which other models do not have; the default " ||" is how its data
files write it. Without `data_dir` the files come from LoRA's repository at one commit, so that both give the same rows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tasks import base
from tasks.base import Output, Row, Split, Task, TaskError

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.measures import Score

REPOSITORY, COMMIT = "microsoft/LoRA", "c4593f060e6a368d7bb5af5273b8e42810cdef90"
FOLDER = "examples/NLG/data"
SEPARATOR = " ||"

Pair = tuple[str, str, str]  # a meaning, one text of it, and a group ("" where the task has none)


class DataToText(Task):
    """A generation task of pairs. Subclasses set `name`, `folder`, `files`, `metric` and define `read_pairs` and
    `score`.

    Attributes:
        folder: of the files, in LoRA's data folder.
        files: names of each split's file, the official one first.
        words: whether BLEU is taken on the words of `metrics.score_webnlg`.
        scored: the split whose outputs are scored; "validation" is for choosing settings without seeing the test set.
    """

    form, scoring_options = "generation", ("scored",)
    words: ClassVar[bool] = True
    folder: ClassVar[str]
    files: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(self, separator: str, scored: str) -> None:
        if scored not in ("test", "validation"):
            raise TaskError(f"task.options.scored={scored}: must be test or validation")
        self.separator, self.eval_splits = separator, (scored,)

    def read_pairs(self, path: Path) -> Iterator[Pair]:
        """Yield what the official file says.

        Raises:
            TaskError: it is damaged.
        """
        raise NotImplementedError

    def find_file(self, split: str, data_dir: str | None) -> Path:
        """Return the official file of a split, below `data_dir` or downloaded.

        Raises:
            TaskError: there is no such split, or its file is missing or cannot be fetched.
        """
        if split not in self.files:
            raise TaskError(f"{self.name} has no split {split!r}, only {', '.join(self.files)}")
        if data_dir is None:
            return base.fetch_file(REPOSITORY, COMMIT, f"{FOLDER}/{self.folder}/{self.files[split][0]}")
        return base.find_data_file(data_dir, self.list_folders(), self.files[split])

    def list_folders(self) -> tuple[str, ...]:
        """Return where below `data_dir` the files may lie: in a copy of LoRA's repository or of its data folder."""
        tops = ("e2e/microsoft_LoRA/data/", f"{FOLDER}/", "")
        return tuple(top + self.folder for top in tops)

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        if data_dir is None:
            return {"files": f"github.com/{REPOSITORY}@{COMMIT}/{FOLDER}/{self.folder}"}
        return {split: base.file_sha256(self.find_file(split, data_dir)) for split in ("train", *self.eval_splits)}

    def split(self, name: str, data_dir: str | None = None) -> Split:
        path = self.find_file(name, data_dir)
        return Split(self.build_rows(name, self.read_pairs(path), path), self.describe_origin(name, path, data_dir))

    def describe_origin(self, name: str, path: Path, data_dir: str | None) -> str:
        if data_dir is None:
            return f"{REPOSITORY}@{COMMIT[:8]}/{self.folder}/{self.files[name][0]}"
        return f"{path.parent.name}/{path.name}"

    def build_rows(self, split: str, pairs: Iterable[Pair], source: object) -> "Dataset":
        """Return the rows of a split as a Dataset.

        Raises:
            TaskError: there are none.
        """
        with base.translate_shape_errors(f"{self.name}'s file", source):
            grouped = group_texts(pairs) if split != "train" else (((m, g), [text]) for m, text, g in pairs)
        return self.dataset((self.build_row(split, i, *group) for i, group in enumerate(grouped)), source)

    def build_row(self, split: str, number: int, meaning: tuple[str, str], texts: list[str]) -> Row:
        context, group = meaning
        return {
            "id": "-".join(filter(None, (split, group, str(number)))),
            "prompt": context + self.separator,
            "target": " " + texts[0],
            "references": texts,
        }

    def judge(self, row: Row, output: Output) -> Row:
        from tasks import metrics

        answer = cut_output(output)
        return {
            "prompt_sha256": base.text_sha256(row["prompt"]),
            "answer": answer,
            "gold": row["references"][0],
            "references": row["references"],
            "score": metrics.sentence_bleu(answer, row["references"]),
        }

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        from tasks import measures

        return {"BLEU": measures.Bleu(words=self.words).score()}


def group_texts(pairs: Iterable[Pair]) -> list[tuple[tuple[str, str], list[str]]]:
    """Return every (meaning, group) with all of its texts; equal meanings are one, of the group seen first."""
    groups: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for meaning, text, group in pairs:
        groups.setdefault(meaning, group)
        texts.setdefault(meaning, []).append(cut_output(text))
    return [((meaning, groups[meaning]), found) for meaning, found in texts.items()]


def cut_output(text: str) -> str:
    """Return an output up to the end of its text, as LoRA's gpt2_decode.py cuts it."""
    return text.split("<|endoftext|>")[0].split("\n\n")[0].strip()


def format_triples(parts: Iterable[tuple[str, str, str]]) -> str:
    """Return "subject : relation : object | ..." as LoRA's format_converting scripts write it."""
    return " | ".join(" : ".join(part) for part in parts)
