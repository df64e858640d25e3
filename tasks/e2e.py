"""E2E NLG: a restaurant's record to a sentence (arXiv 1706.09254), as LoRA's table 3 measures it (arXiv 2106.09685).

Scores are those of the challenge's script with `-p` (tasks/metrics.py) on the 630 records of the test set, each with
all of its references, 4,693 together. There are two forms of the same data; `references` chooses one for training and
scoring alike; a mixture costs 2 to 4 BLEU points:

    tokenised  LoRA's text files, whose sentences are split by spaCy ("family - friendly", "£ 20 - 25"). Scores of
               LoRA's table are on these, and about one BLEU point higher than the challenge's own for the same system.
    official   the challenge's CSV files, text as written; what the challenge's own results are on.

The prompt has LoRA's form in both, "name : Blue Spice | Type : coffee shop | area : city centre ||", with the slot
names LoRA uses. Sources without `data_dir`: LoRA's files from its repository at one commit; the official ones from the
hub's parquet conversion of tuetschek/e2e_nlg, whose rows are the CSV files'. In `data_dir`: e2e/e2e-dataset/*.csv, and
LoRA's train.txt (or a reconstruction, train.reconstructed.txt), valid.txt and test.txt.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from tasks import base
from tasks.base import Row, Split, TaskError, load_dataset
from tasks.data_to_text import SEPARATOR, DataToText, Pair

VERSION = 2  # 1: no output repeated an n-gram of its prompt
HUB, REVISION = "tuetschek/e2e_nlg", "refs/convert/parquet"
SLOTS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
SLOT = r"\s*([^\[\],]+)\[([^\[\]]*)\]"
RECORD = re.compile(r"\w\[[^\]]*\]")  # what no sentence holds, unless a quotation mark was lost before it
FORMS = {"tokenised": "LoRA's tokenised text", "official": "the official text"}


def task(subset: str, references: str = "tokenised", separator: str = SEPARATOR, scored: str = "test") -> "E2e":
    """Return the task; `references` and `separator` are explained above and in tasks/data_to_text.py.

    Raises:
        TaskError: an option is wrong.
    """
    if subset:
        raise TaskError(f"e2e/{subset}: no such task, only e2e")
    if references not in FORMS:
        raise TaskError(f"task.options.references={references}: must be {' or '.join(FORMS)}")
    return (Tokenised if references == "tokenised" else Official)(separator, scored)


class E2e(DataToText):
    """What both forms share."""

    name, version, metric, unscaled = "e2e", VERSION, "BLEU", ("NIST", "CIDEr")
    words = False
    form_of_text: str

    def describe_origin(self, name: str, path: Path, data_dir: str | None) -> str:
        return f"{super().describe_origin(name, path, data_dir)} ({FORMS[self.form_of_text]})"

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return BLEU, NIST, METEOR, ROUGE_L and CIDEr; without Java only the first two."""
        from tasks import metrics

        (rows,) = results.values()
        return metrics.score_e2e([r["answer"] for r in rows], [r["references"] for r in rows])


class Tokenised(E2e):
    """LoRA's text files: "record||sentence" on each line."""

    form_of_text = "tokenised"
    folder = "e2e"
    files = {"train": ("train.txt", "train.*.txt"), "validation": ("valid.txt",), "test": ("test.txt",)}

    def find_file(self, split: str, data_dir: str | None) -> Path:
        """As in `DataToText`, with a hint at the other form of the text.

        Raises:
            TaskError: it is missing or cannot be fetched.
        """
        try:
            return super().find_file(split, data_dir)
        except TaskError as error:
            hint = "; task.options.references=official reads the challenge's CSV files"
            raise TaskError(f"{error}{hint}") from error

    def read_pairs(self, path: Path) -> Iterator[Pair]:
        """As in `DataToText`.

        Raises:
            TaskError: a line is not of the form RECORD||SENTENCE.
        """
        for number, line in enumerate(base.read_text(path).split("\n"), start=1):
            record, *sentences = line.strip().split("||")
            if line.strip() and not (record.strip() and len(sentences) == 1 and sentences[0].strip()):
                raise TaskError(f"{path}: line {number} is not of the form RECORD||SENTENCE; fetch the file again")
            if line.strip():
                yield record, sentences[0], ""


class Official(E2e):
    """The challenge's CSV files: "mr" and "ref" on each row, quoted, some with line breaks inside."""

    form_of_text = "official"
    folder = "e2e-dataset"
    files = {"train": ("trainset.csv",), "validation": ("devset.csv",), "test": ("testset_w_refs.csv",)}

    def list_folders(self) -> tuple[str, ...]:
        return ("e2e/e2e-dataset", "e2e-dataset", "e2e", "")

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        return {"hub": f"{HUB}@{REVISION}"} if data_dir is None else super().source(data_dir)

    def split(self, name: str, data_dir: str | None = None) -> Split:
        if data_dir is not None or name not in self.files:
            return super().split(name, data_dir)
        rows = load_dataset(HUB, revision=REVISION, split=name)
        pairs = [(spell_out_record(r["meaning_representation"]), r["human_reference"], "") for r in rows]
        return Split(self.build_rows(name, pairs, HUB), f"{HUB}@{REVISION} ({FORMS['official']})")

    def read_pairs(self, path: Path) -> Iterator[Pair]:
        """As in `DataToText`.

        Raises:
            TaskError: a row has no sentence, or one that has swallowed another row.
        """
        for line, row in base.read_table(path, ",", quoted=True, needed=("mr", "ref")):
            with base.translate_shape_errors("a row of mr and ref", f"{path}: line {line}"):
                record, sentence = spell_out_record(row["mr"]), row["ref"]
                if not sentence.strip():
                    raise ValueError(f"{row['mr']!r} has no ref")
                if RECORD.search(sentence):
                    raise ValueError(f"{row['mr']!r} has a ref that holds another record")
                yield record, sentence, ""


def spell_out_record(record: str) -> str:
    """Return "name[Blue Spice], eatType[pub]" as "name : Blue Spice | Type : pub".

    Raises:
        ValueError: it is not a record.
    """
    if not re.fullmatch(rf"{SLOT}(?:,{SLOT})*\s*", record):
        raise ValueError(f"{record!r} lists no slots")
    slots = re.findall(SLOT, record)
    return " | ".join(f"{SLOTS.get(slot.strip(), slot.strip())} : {value}" for slot, value in slots)
