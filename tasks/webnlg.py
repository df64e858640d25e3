"""WebNLG 2017: DBpedia facts to text (aclanthology.org/W17-3518), as LoRA measures it (arXiv 2106.09685, appendix F).

The prompt is "subject : property : object | ..." of the modified triples and " ||". Texts marked "good" are learnt and
accepted. Scores are of all 1,862 sets of facts of the test set, and of those whose category training has ("seen_...",
971) or has not ("unseen_...", 891). In `data_dir`: webnlg_challenge_2017/{train,dev,test}.json as LoRA keeps them; the
hub's copy (webnlg-challenge/web_nlg) is a script, so without `data_dir` they come from LoRA's repository at one commit.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import base
from tasks.base import Row, TaskError
from tasks.data_to_text import SEPARATOR, DataToText, Pair, format_triples

if TYPE_CHECKING:
    from tasks.measures import Score

VERSION = 2  # 1: no output repeated an n-gram of its prompt
SEEN = {
    "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University",
    "WrittenWork",
}  # fmt: skip


def task(subset: str, separator: str = SEPARATOR, scored: str = "test") -> "WebNlg":
    """Return the task; the options are explained in tasks/data_to_text.py.

    Raises:
        TaskError: a subset is named.
    """
    if subset:
        raise TaskError(f"webnlg/{subset}: no such task, only webnlg")
    return WebNlg(separator, scored)


class WebNlg(DataToText):
    """Facts of DBpedia; a row's id names its group, "test-unseen-1200"."""

    name, version, metric = "webnlg", VERSION, "BLEU"
    lower_is_better = ("TER", "seen_TER", "unseen_TER")
    folder = "webnlg_challenge_2017"
    files = {"train": ("train.json",), "validation": ("dev.json",), "test": ("test.json",)}

    def read_pairs(self, path: Path) -> Iterator[Pair]:
        """As in `DataToText`: the texts that the file calls good.

        Raises:
            TaskError: the file is not one of WebNLG 2017's, or a good text is empty.
        """
        with base.translate_shape_errors("WebNLG 2017", path):
            for number, holder in enumerate(base.read_json(path)["entries"], start=1):
                if len(holder) > 1:
                    raise ValueError(f"entry {number} holds {len(holder)} entries")
                entry = holder[str(number)]
                facts = format_triples((t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"])
                group = "seen" if entry["category"] in SEEN else "unseen"
                good = [text["lex"] for text in entry["lexicalisations"] if text["comment"] == "good"]
                if not all(text.strip() for text in good):
                    raise ValueError(f"entry {number} has no text")
                yield from ((facts, text, group) for text in good)

    def judge(self, row: Row, output: str) -> Row:
        return super().judge(row, output) | {"group": row["id"].split("-")[1]}

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return BLEU, METEOR and TER of all rows, of the seen and of the unseen categories."""
        from tasks import metrics

        (rows,) = results.values()
        texts = [r["answer"] for r in rows], [r["references"] for r in rows]
        return metrics.score_webnlg(*texts, groups=[r["group"] for r in rows])

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        """Return BLEU of all rows, of the seen and of the unseen categories."""
        from tasks import measures

        scores = super().declare_scores(example)
        parts = [
            measures.restrict_scores(scores, f"{group}_", partial(is_in_group, group)) for group in ("seen", "unseen")
        ]
        return scores | parts[0] | parts[1]


def is_in_group(group: str, row: Row) -> bool:
    """Return whether a row is of seen or of unseen categories, as `group` says."""
    return row["group"] == group
