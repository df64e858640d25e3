"""Tasks on tables of one's own: the same rows from every kind of file, stated splits, scores, and one line for each
wrong file or column."""

# ruff: noqa: E501 - a table

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import f1_score

import tasks
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate.evaluate import evaluate_splits
from dual_lora.lab.evaluate.trained import reevaluate_run
from dual_lora.lab.inputs.splits import load_scored_splits
from dual_lora.lab.model.encode import encode_prompt
from dual_lora.lab.model.load import load_model, load_tokenizer
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.statistics.compare import compare_means, is_resampled
from dual_lora.lab.train.run import train_run
from tasks import TaskError, base, measures, metrics, own_files

ROWS = [("soup, cold", "bad"), ('a "fine" film', "good"), ("N/A", "bad"), ("line\nbreak", "good")]
OTHER = [("null", "good"), ("none", "bad")]


def write_table(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> Path:
    """Write rows as the ending of the path says, and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        Dataset.from_list(objects).to_parquet(str(path))
        return path
    if kind in ("csv", "tsv"):
        separator = {"csv": ",", "tsv": "\t"}[kind]
        quoted = [['"' + str(value).replace('"', '""') + '"' for value in row] for row in [columns, *rows]]
        text = "".join(separator.join(row) + "\n" for row in quoted)
    else:
        text = json.dumps(objects) if kind == "json" else "".join(json.dumps(o) + "\n" for o in objects)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def classes(folder: Path, kind: str = "csv") -> Path:
    write_table(folder / f"train.{kind}", ("text", "label"), ROWS)
    write_table(folder / f"test.{kind}", ("text", "label"), OTHER)
    return folder


def rows_of(folder: Path, name: str = "classification", split: str = "train", **options) -> list[dict]:
    return tasks.load(name, options, str(folder)).split(split, str(folder)).rows.to_list()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "jsonl.gz"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    """Separators, quotation marks and line breaks inside a text, and words that mean "missing" to pandas."""
    folder = classes(tmp_path, kind)
    task = tasks.load("classification", {}, str(folder))
    assert task.labels == ("bad", "good") and task.eval_splits == ("test",)
    assert [(row["text"], task.labels[row["label"]]) for row in rows_of(folder)] == ROWS
    assert rows_of(folder, split="test")[0] == {"id": "test-0", "text": "null", "text_pair": "", "label": 1}
    assert task.split("train").origin == f"train.{kind}"


def test_rows_and_labels_follow_the_files(tmp_path):
    """The identity of a run changes with them, and nothing is remembered of what they were."""
    task = tasks.load("classification", {}, str(classes(tmp_path)))
    before, labels = task.source(str(tmp_path)), task.labels
    write_table(tmp_path / "train.csv", ("text", "label"), [*ROWS, ("more", "ugly")])
    write_table(tmp_path / "test.csv", ("text", "label"), [*OTHER, ("most", "ugly")])
    assert task.source(str(tmp_path)) != before and (labels, task.labels) == (("bad", "good"), ("bad", "good", "ugly"))


def test_class_indices_of_a_parquet_file_are_its_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    for split, texts in (("train", ["a", "b"]), ("test", ["c", "d"])):
        Dataset.from_dict({"text": texts, "label": [0, 1]}, features=features).to_parquet(tmp_path / f"{split}.parquet")
    task = tasks.load("classification", {}, str(tmp_path))
    assert task.labels == ("neg", "pos") and [row["label"] for row in rows_of(tmp_path)] == [1, 0]
    listed = {"labels": ["pos", "neg"]}
    assert tasks.load("classification", listed, str(tmp_path)).labels == ("pos", "neg")
    assert [row["label"] for row in rows_of(tmp_path, **listed)] == [0, 1]


@pytest.mark.parametrize("word", ["1e999", "-1e999", "nan", "1_0"])
def test_a_number_is_finite_and_plain(word):
    with pytest.raises(ValueError, match=f"^'{word}' is not a finite number$"):
        base.parse_number(word)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([0, 1, -1], [0, 1, 0], "train.parquet: row 3, column 'label': empty; fill it in or remove the row"),
        (
            [0, 1, 0],
            [-1, -1, -1],
            "test.parquet: row 1, column 'label': empty; .*; task.options.scored=validation leaves",
        ),
        ([0, 1, -1], [0, 1, -1], "row 3, column 'label': empty"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"metric": "pearson"}, {"labels": ["pos", "neg", "-1"]}])
def test_no_class_in_a_parquet_file_is_a_gap(train, test, said, options, tmp_path):
    """datasets writes -1 for it; the rows of a test set whose labels are hidden all have it."""
    names = ["0", "1"] if "metric" in options else ["pos", "neg"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    for split, labels in (("train", train), ("test", test)):
        texts = [f"{split} {i}" for i in range(3)]
        Dataset.from_dict({"text": texts, "label": labels}, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(TaskError, match=said):
        rows_of(tmp_path, **options)


def test_pairs_numbers_and_columns_by_name(tmp_path):
    for split, start in (("train", 0), ("valid", 5)):
        rows = [(f"q{i}", f"a{i}", i / 2) for i in range(start, start + 3)]
        write_table(tmp_path / f"{split}.tsv", ("question", "answer", "score"), rows)
    options = {"text": "question", "text_pair": "answer", "label": "score", "metric": "pearson"}
    task = tasks.load("classification", options, str(tmp_path))
    assert (task.form, task.labels, task.metric, task.eval_splits) == ("regression", (), "pearson", ("validation",))
    found = rows_of(tmp_path, split="validation", **options)
    assert found[1] == {"id": "validation-1", "text": "q6", "text_pair": "a6", "label": 3.0}
    rows = [{"answer": 2 * r["label"], "gold": r["label"]} for r in found]
    assert task.score({"validation": rows})["pearson"] == pytest.approx(1)


def test_whole_numbers_and_truth_values_are_class_names_in_the_order_of_numbers(tmp_path):
    for split, start in (("train", 0), ("test", 100)):
        write_table(tmp_path / f"{split}.jsonl", ("text", "label"), [(str(start + i), i % 11) for i in range(22)])
    assert tasks.load("classification", {}, str(tmp_path)).labels == tuple(map(str, range(11)))
    for split, texts in (("train", "ab"), ("test", "cd")):
        write_table(tmp_path / f"{split}.jsonl", ("text", "label"), [(texts[0], True), (texts[1], False)])
    assert tasks.load("classification", {}, str(tmp_path)).labels == ("false", "true")


def test_quotation_marks_are_text_where_the_settings_say_so(tmp_path):
    for split, word in (("train", "a"), ("test", "b")):
        (tmp_path / f"{split}.tsv").write_text(f'text\tlabel\n"{word}" lone "mark\tx\n{word} 5" disk\ty\n')
    assert [row["text"] for row in rows_of(tmp_path, quotes=False)] == ['"a" lone "mark', 'a 5" disk']
    with pytest.raises(TaskError, match="train.tsv: line 2 .*task.options.quotes=false"):
        rows_of(tmp_path)


# Splits


@pytest.mark.parametrize(
    ("files", "scored", "expected"),
    [
        (["train.csv", "test.csv", "dev.csv"], "test", "test"),
        (["train.csv", "test.csv", "dev.csv"], "validation", "validation"),
        (["training.csv", "val.csv"], "test", "validation"),
        (["Train-clean.CSV", "validation_2.csv"], "test", "validation"),
        (["train-00000-of-00001.parquet", "valid-00000-of-00001.parquet"], "test", "validation"),
    ],
)
def test_a_files_name_says_its_split(files, scored, expected, tmp_path):
    for number, name in enumerate(files):
        rows = [(f"{text} {number}", label) for text, label in ROWS]
        write_table(tmp_path / name.replace("CSV", "csv"), ("text", "label"), rows)
        (tmp_path / name.replace("CSV", "csv")).rename(tmp_path / name)
    task = tasks.load("classification", {"scored": scored}, str(tmp_path))
    assert task.eval_splits == (expected,) and set(task.source(str(tmp_path))) == {"train", expected}
    prefix = {"test": "test", "validation": ("val", "dev")}[expected]
    assert task.split(expected).origin.startswith(prefix)


def test_the_parts_of_a_split_are_read_in_order(tmp_path):
    for part, rows in enumerate((ROWS[:2], ROWS[2:])):
        write_table(tmp_path / f"train-0000{part}-of-00002.parquet", ("text", "label"), rows)
    write_table(tmp_path / "test.csv", ("text", "label"), OTHER)
    assert [row["text"] for row in rows_of(tmp_path)] == [text for text, _ in ROWS]
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(TaskError, match="1 of its 2 parts are there; fetch the others"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["train-0000{}-of-00002-a09b74b3ef9c3b56", "train_0000{}_of_00002", "train-{}-of-2", "reviews-0000{}-of-00002"],
)
def test_half_of_a_split_is_refused_by_whatever_name(name, tmp_path):
    rows = [(f"t{i}", str(i % 2)) for i in range(20)]
    path = write_table(tmp_path / f"{name.format(0)}.parquet", ("text", "label"), rows)
    with pytest.raises(TaskError, match=f"{path.name}: 1 of its 2 parts are there; fetch the others"):
        rows_of(tmp_path)
    if name.startswith("train"):
        write_table(
            tmp_path / f"{name.format(1)}.parquet", ("text", "label"), [(f"u{i}", str(i % 2)) for i in range(20)]
        )
        assert len(rows_of(tmp_path)) == 36


def test_a_part_may_be_there_once_and_parts_may_be_counted_from_one(tmp_path):
    for part in (1, 2):
        rows = [(f"{part} {i}", str(i % 2)) for i in range(20)]
        write_table(tmp_path / f"train-{part}-of-2.csv", ("text", "label"), rows)
    assert len(rows_of(tmp_path)) == 36
    shutil.copy(tmp_path / "train-1-of-2.csv", tmp_path / "train-00001-of-00002.csv")
    with pytest.raises(
        TaskError, match=": train-00001-of-00002.csv and train-1-of-2.csv are the same part; keep one of"
    ):
        rows_of(tmp_path)


def test_rows_of_a_single_file_are_set_apart_as_the_settings_say(tmp_path):
    """Of every class the same share, equal texts on one side, the same rows for every run, said in the origin."""
    rows = [(f"text {i // 2}", "rare" if i < 20 else "common") for i in range(200)]
    write_table(tmp_path / "reviews.csv", ("text", "label"), rows)
    task = tasks.load("classification", {"held_out": 0.2}, str(tmp_path))
    train, held = (task.split(split).rows.to_list() for split in ("train", "validation"))
    assert len(train) + len(held) == 200 and not {r["text"] for r in train} & {r["text"] for r in held}
    assert [sum(row["label"] == i for row in held) for i in (0, 1)] == [36, 4]
    assert task.split("validation").origin == "reviews.csv, 20 % set apart with seed 0"
    assert rows_of(tmp_path, split="validation", held_out=0.2) == held
    assert rows_of(tmp_path, split="validation", held_out=0.2, split_seed=1) != held


def test_only_a_train_file_is_a_single_file_too(tmp_path):
    write_table(tmp_path / "train.csv", ("text", "label"), [(f"t{i}", str(i % 2)) for i in range(20)])
    write_table(tmp_path / "test.csv", ("text", "label"), OTHER)
    task = tasks.load("classification", {"scored": "validation"}, str(tmp_path))
    assert len(task.split("validation").rows) == 2 and set(task.source(str(tmp_path))) == {"train"}


# Instructions


def test_prompts_and_responses(tmp_path):
    for split, word in (("train", "a"), ("test", "b")):
        write_table(tmp_path / f"{split}.csv", ("prompt", "response"), [(f"say {word}", f" {word}\n")])
    assert rows_of(tmp_path, "instruction") == [
        {
            "id": "train-0",
            "prompt": "say a\n",
            "target": " a\n",
            "references": [" a\n"],
            "messages": [{"role": "user", "content": "say a"}],
        }
    ]
    assert rows_of(tmp_path, "instruction", separator=" =>")[0]["prompt"] == "say a =>"


def test_alpacas_columns_give_alpacas_prompt(tmp_path):
    rows = [("Add.", "1, 2", "3"), ("Wave.", None, "*waves*")]
    write_table(tmp_path / "alpaca.json", ("instruction", "input", "output"), rows)
    task = tasks.load("instruction", {}, str(tmp_path))
    found = {r["target"]: r for split in ("train", "validation") for r in task.split(split).rows}
    assert found["3"]["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert found["*waves*"]["prompt"] == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nWave.\n\n### Response:\n"
    )
    assert found["3"]["messages"] == [{"role": "user", "content": "Add.\n\n1, 2"}]


def test_of_a_chat_the_last_answer_is_learnt(tmp_path):
    turns = ["system", "user", "assistant", "user", "assistant"]
    for split in ("train", "test"):
        chat = [{"role": role, "content": f"{split} {i}"} for i, role in enumerate(turns)]
        write_table(tmp_path / f"{split}.jsonl", ("messages",), [(chat,)])
    (row,) = rows_of(tmp_path, "instruction")
    assert row["target"] == "train 4" and [m["content"] for m in row["messages"]] == [f"train {i}" for i in range(4)]
    assert row["prompt"].startswith("### System:\ntrain 0\n\n### User:\ntrain 1\n\n### Assistant:\ntrain 2\n\n")
    assert row["prompt"].endswith("### User:\ntrain 3\n\n### Assistant:\n")


def test_scores_of_responses(tmp_path):
    for split, words in (("train", "ab"), ("test", "cd")):
        write_table(tmp_path / f"{split}.csv", ("prompt", "response"), [(w, f"the {w} is red") for w in words])
    task = tasks.load("instruction", {}, str(tmp_path))
    rows = task.split("test").rows.to_list()
    judged = [task.judge(row, text) for row, text in zip(rows, (" the c is red\n", "red is the d"), strict=True)]
    assert [task.choices(row) for row in rows] == [["the c is red"], ["the d is red"]]
    more = [task.judge_choice(rows[0], [-3.0], [4]), task.judge_choice(rows[1], [-5.0], [6])]
    judged = [a | b for a, b in zip(judged, more, strict=True)]
    scores = task.score({"test": judged})
    assert scores["exact_match"] == 0.5 and scores["loss"] == pytest.approx((3 + 5) / (4 + 6))
    assert scores["rouge_l"] == pytest.approx((1 + 2 * 2 / 8) / 2) and 0.5 < scores["chrf"] < 1
    assert task.metric == "rouge_l" and task.unscaled == task.lower_is_better == ("loss",)
    for name, score in task.declare_scores(judged[0]).items():
        columns = np.array([score.columns(row) for row in judged], dtype=float)
        assert score.measure(columns, np.ones((1, 2))) == pytest.approx(scores[name]), name
    assert not tasks.load("instruction", {"loss": False}, str(tmp_path)).choices(rows[0])


@pytest.mark.parametrize(
    ("output", "reference", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("the cat", "a cat sat on the mat", 2 * 1 / 8),
        ("police killed the gunman", "the gunman police killed", 2 * 2 / 8),
        ("", "the cat", 0.0),
        ("...", "the cat", 0.0),
        ("на\u00efve \u0437\u0438\u043c\u0430", "\u0437\u0438\u043c\u0430", 2 * 1 / 3),
    ],
)
def test_rouge_l_by_hand(output, reference, value):
    assert metrics.rouge_l(output, [reference]) == pytest.approx(value)
    assert metrics.rouge_l(output, ["q", reference]) == pytest.approx(value)


@pytest.mark.parametrize(
    ("output", "reference", "value"),
    [
        ("लड़की", "लड़का", 0.0),  # they differ in a vowel sign alone
        ("लड़की घर", "लड़का घर", 0.5),
        ("ที่", "ทั", 0.0),
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("I \u2764\ufe0f it", "I it", 1.0),  # an emoji, and the mark that belongs to it, are no words
    ],
)
def test_marks_belong_to_the_words_of_rouge_l(output, reference, value):
    assert metrics.rouge_l(output, [reference]) == pytest.approx(value)


def test_the_form_of_accents_changes_no_score_of_a_response():
    target = "un caf\u00e9 l\u00e0"
    row = {"prompt": "a", "target": target, "references": [target], "messages": []}
    judged = tasks.load("instruction").judge(row, "un cafe\u0301 la\u0300 ")
    assert [judged[name] for name in ("exact_match", "rouge_l", "chrf")] == pytest.approx([1, 1, 1])


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, other = (" ".join(rng.choice(list("abcde"), size=rng.integers(1, 9))) for _ in range(2))
        assert metrics.rouge_l(one, [other]) == pytest.approx(scorer.score(other, one)["rougeL"].fmeasure)


# Scores of classes


def test_macro_f1_on_a_resample_is_sklearns_on_the_same_rows():
    rng = np.random.default_rng(2)
    gold, answers = rng.integers(4, size=30), rng.integers(4, size=30)
    indices = rng.integers(30, size=(20, 30))
    weights = np.stack([np.bincount(row, minlength=30) for row in indices]).astype(float)
    columns = np.stack([answers, gold], axis=1).astype(float)
    expected = [f1_score(gold[i], answers[i], average="macro", zero_division=0) for i in indices]
    np.testing.assert_allclose(measures.macro_f1(columns, weights), expected)
    assert metrics.macro_f1([0, 0, 1], [0, 1, 1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "matthews", "f1"])
def test_scores_of_classes_and_their_declarations(metric, tmp_path):
    task = tasks.load("classification", {"metric": metric}, str(classes(tmp_path)))
    rows = [{"answer": a, "gold": g} for a, g in ((0, 0), (1, 0), (1, 1), (1, 1))]
    scores = task.score({"test": rows})
    assert task.metric == metric and set(scores) == {"accuracy", "macro_f1", "matthews", "f1"}
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    declared = task.declare_scores(rows[0])
    assert set(declared) == set(scores)
    for name, score in declared.items():
        columns = np.array([score.columns(row) for row in rows], dtype=float)
        assert score.measure(columns, np.ones((1, 4))) == pytest.approx(scores[name])


def test_the_questions_of_six_classes(tmp_path):
    """What docs/own-data.md shows: a TSV of questions, the class before the text."""
    kinds = {"ABBR": "stand for", "DESC": "work", "ENTY": "eat", "HUM": "invent", "LOC": "lie", "NUM": "cost"}
    for split, start in (("train", 0), ("test", 50)):
        rows = [(kind, f"What does number {start + i} {verb} ?") for i in range(4) for kind, verb in kinds.items()]
        write_table(tmp_path / f"{split}.tsv", ("coarse", "question"), rows)
    options = {"text": "question", "label": "coarse", "metric": "macro_f1"}
    task = tasks.load("classification", options, str(tmp_path))
    assert task.labels == tuple(kinds) and len(task.split("train").rows) == len(task.split("test").rows) == 24
    rows = [task.judge(row, row["label"]) for row in task.split("test").rows]
    assert task.score({"test": rows}) == {"accuracy": 1, "matthews": 1, "macro_f1": 1}


# Wrong files and columns: (task, options, files by name, what is said); files that are not named are good.

GOOD = {"train.csv": "text,label\na,x\nb,y\n", "test.csv": "text,label\nc,x\nd,y\n"}
NUMBERS = {"metric": "pearson"}
CHAT = {
    "train.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "test.jsonl": '{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}\n',
}
C, N = "classification", "instruction"
# fmt: off
WRONG = {
    "no folder": (C, {}, None, "no such folder"),
    "an empty folder": (C, {}, {}, "no .csv, .tsv, .jsonl, .json or .parquet in it; put train"),
    "a folder too high": (C, {}, {"data/train.csv": "text,label\n"}, "no table in it, but in data/: give data_dir=HERE/data"),
    "a file of another name": (C, {}, GOOD | {"vaild.csv": "text,label\n"}, "vaild.csv: not named after a split; rename it"),
    "no training file": (C, {}, {"test.csv": GOOD["test.csv"], "dev.csv": ""}, "no file called train, only dev.csv, test.csv"),
    "two files of a split": (C, {}, GOOD | {"train.tsv": ""}, "train.csv and train.tsv: both are the train split; keep one"),
    "a missing column": (C, {}, GOOD | {"train.csv": "text,class\na,x\n"}, "train.csv: no column 'label', only text, class; name yours with task.options.text, text_pair and label"),
    "a column in other capitals": (C, {}, GOOD | {"train.csv": "Text,label\na,x\n"}, "train.csv: no column 'text', but 'Text'; name yours"),
    "a blank before a column": (C, {}, GOOD | {"train.csv": "text, label\na,x\n"}, "train.csv: no column 'label', but ' label'"),
    "a column twice": (C, {}, GOOD | {"train.csv": "text,label,label\na,x,y\n"}, "train.csv: the column 'label' occurs twice"),
    "semicolons": (C, {}, GOOD | {"train.csv": "text;label\na;x\n"}, "train.csv: its header is separated by semicolons, not by commas; save it with commas"),
    "tabs in a CSV": (C, {}, GOOD | {"train.csv": "text\tlabel\na\tx\n"}, "separated by tabs, not by commas; save it with commas or name it .tsv"),
    "a ragged row": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb, c,y\n"}, "train.csv: line 3 has 3 fields, not 2; write every row with all of its fields, in quotation marks"),
    "a short row": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb\n"}, "train.csv: line 3 has 1 fields, not 2"),
    "a lost quotation mark": (C, {}, GOOD | {"train.csv": 'text,label\n"a,x\nb,y\n'}, "train.csv: line 2 cannot be read as a row (unexpected end of data)"),
    "a lone quotation mark": (C, {}, GOOD | {"train.csv": 'text,label\na 5" disk,x\nb,y\n'}, "train.csv: line 2 cannot be read as a row (a quotation mark has no partner)"),
    "an empty label": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb, \n"}, "train.csv: line 3, column 'label': empty; fill it in or remove the row"),
    "an empty text": (C, {}, GOOD | {"train.csv": "text,label\na,x\n,y\n"}, "train.csv: line 3, column 'text': empty"),
    "an empty text of a pair": (C, {"text_pair": "label", "label": "c"}, GOOD | {"train.csv": "text,label,c\na,b,x\na,,y\n"}, "line 3, column 'label': empty"),
    "a class only in training": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb,y\ne,z\n"}, "train.csv: line 4, column 'label': the class 'z' is in train but not in test"),
    "a class only in the scored rows": (C, {}, GOOD | {"test.csv": "text,label\nc,x\nd,y\ne,Q\n"}, "test.csv: line 4, column 'label': the class 'Q' is in test but not in train"),
    "classes that differ in capitals": (C, {}, GOOD | {"train.csv": "text,label\na,x\nb,X\nz,y\n"}, "train.csv: line 2, column 'label': 'x' and 'X' differ in spelling only"),
    "one class": (C, {}, {"train.csv": "text,label\na,x\nb,x\n", "test.csv": "text,label\nc,x\n"}, "column 'label' has one class only, 'x'"),
    "a class for every row": (C, {}, {"data.csv": "text,label\n" + "".join(f"t{i},{i}.5\n" for i in range(40))}, "column 'label' has 40 classes in 40 rows; name another column, or take task.options.metric=pearson"),
    "a class that is not listed": (C, {"labels": ["x", "z"]}, GOOD, "train.csv: line 3, column 'label': 'y' is not one of task.options.labels, x, z"),
    "a text in both splits": (C, {}, GOOD | {"test.csv": "text,label\nc,x\nb,y\n"}, "test.csv: line 3: the same example as train.csv line 3, which training sees; remove one"),
    "Latin-1": (C, {}, GOOD | {"train.csv": "text,label\na,x\né,y\n".encode("latin-1")}, "train.csv: cannot be read (line 3 is not UTF-8: invalid continuation byte); save it as UTF-8"),
    "UTF-16": (C, {}, GOOD | {"train.csv": "text,label\na,x\n".encode("utf-16")}, "train.csv: cannot be read (it is UTF-16); save it as UTF-8"),
    "zero bytes": (C, {}, GOOD | {"train.csv": b"text,label\na\0,x\n"}, "train.csv: cannot be read (line 2 holds a zero byte"),
    "header only": (C, {}, GOOD | {"train.csv": "text,label\n"}, "train.csv: no rows"),
    "nothing": (C, {}, GOOD | {"train.csv": ""}, "train.csv: no rows"),
    "a number with decimals for a class": (C, {}, {"train.jsonl": '{"text": "a", "label": 1.5}\n', "test.csv": ""}, "train.jsonl: line 1, column 'label': 1.5 is not a class"),
    "a word for a number": (C, NUMBERS, GOOD, "train.csv: line 2, column 'label': 'x' is not a finite number; write one like 2.5"),
    "a decimal comma": (C, NUMBERS, GOOD | {"train.csv": 'text,label\na,"2,5"\n'}, "column 'label': '2,5' is not a finite number"),
    "no number": (C, NUMBERS, GOOD | {"train.csv": "text,label\na,nan\n"}, "column 'label': 'nan' is not a finite number"),
    "a number with an underscore": (C, NUMBERS, GOOD | {"train.csv": "text,label\na,1_0\n"}, "train.csv: line 2, column 'label': '1_0' is not a finite number"),
    "full-width digits": (C, NUMBERS, GOOD | {"train.csv": "text,label\na,\uff11\uff12\n"}, "column 'label': '\uff11\uff12' is not a finite number"),
    "a number beyond float32": (C, NUMBERS, GOOD | {"train.csv": "text,label\na,1\nb,-1e300\n"}, "train.csv: line 3, column 'label': '-1e300' is beyond 1e+18, so the loss overflows"),
    "a whole number beyond float32": (C, NUMBERS, {"train.jsonl": '{"text": "a", "label": 1%s}\n' % ("0" * 30), "test.csv": ""}, "is beyond 1e+18"),
    "F1 of three classes": (C, {"metric": "f1"}, {"train.csv": "text,label\na,1\nb,2\nc,3\n", "test.csv": "text,label\nd,1\ne,2\nf,3\n"}, "task.options.metric=f1: there are 3 classes, not 2; take macro_f1"),
    "too few rows": (C, {}, {"data.csv": "text,label\na,x\nb,y\n"}, "data.csv: 2 rows are too few to set some apart"),
    "a number for a text": (C, {}, {"train.jsonl": '{"text": 5, "label": "x"}\n', "test.csv": ""}, "train.jsonl: line 1, column 'text': 5 is not text"),
    "a null": (C, {}, {"train.jsonl": '{"text": "a", "label": null}\n', "test.csv": ""}, "train.jsonl: line 1, column 'label': empty"),
    "a column that one line lacks": (C, {}, {"train.jsonl": '{"text": "a", "label": "x"}\n{"text": "b"}\n', "test.csv": ""}, "train.jsonl: line 2: no column 'label', only text"),
    "a list of a line": (C, {}, {"train.jsonl": '["a", "x"]\n', "test.csv": ""}, "train.jsonl: line 1: ['a', 'x'] is not an object with columns"),
    "a line that is no JSON": (C, {}, {"train.jsonl": '{"text": "a", "label": "x"}\n{"text": \n', "test.csv": ""}, "train.jsonl: line 2: not JSON (Expecting value"),
    "a key twice": (C, {}, {"train.jsonl": '{"text": "a", "text": "b", "label": "x"}\n', "test.csv": ""}, "train.jsonl: line 1: not JSON (the key 'text' occurs twice"),
    "half of a character": (C, {}, {"train.jsonl": '{"text": "\\ud800", "label": "x"}\n', "test.csv": ""}, "train.jsonl: line 1, column 'text': holds half a character"),
    "an object for a list": (C, {}, {"train.json": '{"data": []}', "test.csv": ""}, "train.json: not a list; give a list of objects"),
    "no Parquet": (C, {}, {"train.parquet": b"PAR1 no", "test.csv": ""}, "train.parquet: cannot be read as Parquet"),
    "other columns than a prompt's": (N, {}, GOOD, "train.csv: no columns 'prompt' and 'response', only text, label; name yours with task.options.prompt and response, or give instruction and output, or messages"),
    "an empty response": (N, {}, {"data.csv": "prompt,response\na,b\nc,\n"}, "data.csv: line 3, column 'response': empty"),
    "a prompt in both splits": (N, {}, CHAT | {"test.jsonl": CHAT["train.jsonl"]}, "test.jsonl: line 1: the same example as train.jsonl line 1"),
    "an unknown role": (N, {}, CHAT | {"train.jsonl": CHAT["train.jsonl"].replace("user", "human")}, "train.jsonl: line 1, column 'messages': message 1 has the role 'human', not one of system, user, assistant"),
    "no answer": (N, {}, CHAT | {"train.jsonl": CHAT["train.jsonl"].replace("assistant", "user")}, "column 'messages': ends with the user; the last message must be the assistant's"),
    "messages as a text": (N, {}, {"data.csv": "messages,x\nhello,1\n"}, "data.csv: line 2, column 'messages': is text, not a list of messages; save the table as .jsonl"),
    "an input of 0": (N, {}, {"data.jsonl": '{"instruction": "a", "input": 0, "output": "b"}\n'}, "data.jsonl: line 1, column 'input': 0 is not text; write it in quotation marks"),
    "an input of false": (N, {}, {"data.jsonl": '{"instruction": "a", "input": false, "output": "b"}\n'}, "data.jsonl: line 1, column 'input': False is not text"),
    "an input in capitals": (N, {}, {"data.csv": "instruction,Input ,output\na,b,c\n"}, "data.csv: line 2: no column 'input', but 'Input '; name it input, or remove it"),
    "a field of a message": (N, {}, CHAT | {"train.jsonl": CHAT["train.jsonl"].replace('"b"', '"b", "name": null, "weight": 0')}, "train.jsonl: line 1, column 'messages': message 2 has 'weight', of which nothing is trained on; remove it"),
    "a spreadsheet beside tables": (C, {}, {"train.csv": GOOD["train.csv"], "test.xlsx": "x"}, "test.xlsx: not read; save it as one of .csv, .tsv"),
    **{
        f"{name} beside tables": (C, {}, {"train.csv": GOOD["train.csv"], name: "x"}, f"{name.partition('/')[0]}: {said}; ")
        for said, names in {
            "not read": "test.ndjson test.txt Test.TAB test.jsonlines test.parq test.sqlite test.tar.gz test validation.txt "
            "dev.dat test.csv.dvc my_test.xlsx train-2.txt",
            "a folder, which is not read": "test/part.csv validation/x",
        }.items()
        for name in names.split()
    },
    "a test file beside a single table": (C, {}, {"reviews.csv": GOOD["train.csv"], "reviews_test.xlsx": "x"}, "reviews_test.xlsx: not read; save it"),
    "a packed table beside others": (C, {}, {"train.csv": GOOD["train.csv"], "Validation-1.csv.zip": "x"}, "Validation-1.csv.zip: not read"),
    "a message without content": (N, {}, CHAT | {"train.jsonl": CHAT["train.jsonl"].replace('"a"', "null")}, "column 'messages': message 1 has no content"),
}
# fmt: on


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_or_column_is_answered_in_one_line(what, tmp_path):
    name, options, files, said = WRONG[what]
    folder = tmp_path / "data"
    for file, content in (files or {}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    if files == {}:
        folder.mkdir()
    task = tasks.load(name, options, str(folder))
    with pytest.raises(TaskError) as caught:
        task.source(str(folder))
        task.split("train", str(folder))
        task.split(task.eval_splits[0], str(folder))
    message = str(caught.value).replace(str(folder), "HERE")
    assert said in message and len(message.splitlines()) == 1 and len(message) < 400, message


def test_what_names_no_split_may_lie_beside_tables(tmp_path):
    others = [
        "README.md",
        "train.py",
        "test_notes.md",
        "testing.txt",
        ".test.csv.swp",
        "train.csv.dvc",
        "test.csv.sha256",
        "figures/test.txt",
    ]
    for file, content in (GOOD | dict.fromkeys(others, "x")).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    assert len(rows_of(tmp_path)) == 2


def test_classes_may_be_listed_on_purpose(tmp_path):
    """Then one may be missing on either side, and their order is the user's."""
    for file, content in GOOD.items():
        (tmp_path / file).write_text(content.replace("d,y", "d,z"))
    assert tasks.load("classification", {"labels": ["z", "y", "x"]}, str(tmp_path)).labels == ("z", "y", "x")
    assert [row["label"] for row in rows_of(tmp_path, labels=["z", "y", "x"])] == [2, 1]


def test_an_overlap_may_be_allowed_on_purpose(tmp_path):
    for file in GOOD:
        (tmp_path / file).write_text(GOOD["train.csv"])
    assert len(rows_of(tmp_path, overlap=True)) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (C, {"metric": "bleu"}, "task.options.metric=bleu: must be one of accuracy, macro_f1"),
        (C, {"labels": ["x"]}, "must be two class names or more, all different"),
        (C, {"labels": ["x", " x"]}, "must be two class names or more, all different"),
        (C, {"labels": [["x"], "y"]}, "is not a class name"),
        (C, {"labels": [None, "y"]}, "None is not a class name"),
        (C, {"labels": ["x", "y"], "metric": "pearson"}, "pearson is of numbers, which have no classes"),
        (C, {"label": "text"}, "must be the names of different columns"),
        (C, {"held_out": 1.0}, "task.options.held_out=1.0: must be between 0 and 1"),
        (C, {"scored": "train"}, "task.options.scored=train: must be test or validation"),
        (N, {"metric": "loss"}, "task.options.metric=loss: must be one of rouge_l"),
        (N, {"response": "prompt"}, "must be the names of different columns"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(TaskError, match=message):
        tasks.load(name, options)
    with pytest.raises(TaskError, match=f"{name}/x: no such task"):
        tasks.load(f"{name}/x")


@pytest.mark.parametrize(
    ("name", "files", "option", "said"),
    [
        (
            C,
            GOOD,
            "held_out=0.3",
            "task.options.held_out=0.3: test.csv is scored, so no rows of training are set apart",
        ),
        (C, GOOD, "split_seed=3", "task.options.split_seed=3: test.csv is scored"),
        (C, {"data.csv": "text,label\n" + "a,x\nb,y\nc,x\nd,y\n"}, "split_seed=3", None),
        (
            N,
            CHAT,
            "separator=X",
            "task.options.separator=X: only rows of a prompt and a response use it, and train.jsonl",
        ),
        (N, {"a.csv": "instruction,output\na,b\nc,d\n"}, "prompt=q", "has instruction, output; drop it"),
        (N, {"a.csv": "q,response\na,b\nc,d\n"}, "prompt=q", None),
        (
            N,
            CHAT,
            "quotes=false",
            "task.options.quotes=False: it is about .csv and .tsv files, and train.jsonl is neither",
        ),
        (C, GOOD, "quotes=false", None),
        (C, GOOD, "overlap=true", None),
        (
            C,
            {"data.csv": "text,label\n" + "a,x\nb,y\nc,x\nd,y\n"},
            "overlap=true",
            "overlap=True: no other file is scored, but rows set apart from data.csv; drop it",
        ),
        (
            C,
            {"data.csv": "text,label\n" + "a,x\nb,y\nc,x\nd,y\n"},
            "scored=validation",
            "there is no test file, so rows set apart from data.csv will be scored anyway; drop it",
        ),
        (
            C,
            {"train.csv": GOOD["train.csv"], "dev.csv": GOOD["test.csv"]},
            "scored=validation",
            "there is no test file, so dev.csv will be scored anyway; drop it",
        ),
        (C, GOOD | {"train.csv": GOOD["train.csv"] + "e,x\nf,y\n"}, "scored=validation", None),
    ],
)
def test_an_option_without_effect_on_the_files_is_refused(name, files, option, said, tmp_path):
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    model = "tiny-roberta" if name == C else "tiny-llama"
    words = [f"model={model}", f"task={name}", f"data_dir={tmp_path}", f"task.options.{option}"]
    if said is None:
        load_settings(words)
        return
    with pytest.raises(UserError) as caught:
        load_settings(words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [C, N])
def test_without_a_folder_there_are_no_files(name):
    with pytest.raises(TaskError, match=f"task={name}: reads files of your own; give data_dir=DIR"):
        tasks.load(name).source(None)
    assert tasks.load(name).metric and not tasks.load(name).labels


SHORT = ["train.max_steps=2", "train.batch_size=8", "wandb.mode=disabled", "eval.before=false"]


@pytest.mark.parametrize("method", ["lora", "dual_lora"])
def test_a_run_on_own_classes_is_evaluated_again_from_its_record(method, own_data, runs_folder, capsys):
    words = ["model=tiny-roberta", "task=classification", f"method={method}", f"data_dir={own_data}", *SHORT]
    settings = load_settings([*words, "task.options.metric=macro_f1"])
    result = train_run(Run.prepare(settings))
    assert result["metric"] == "macro_f1" and set(result["metrics"]) == {"accuracy", "macro_f1", "matthews", "f1"}
    assert result["data"]["test"] == tasks.load("classification").split("test", str(own_data)).describe()
    record = Record(runs_folder / "adhoc" / result["identity"])
    assert reevaluate_run(settings, record) == 0
    rows = [json.loads(line) for line in (record.folder / "predictions.jsonl").open()]
    task, seeds = load_task(settings), {0: rows}
    assert is_resampled(task, "accuracy", rows[0]) and compare_means([seeds], [seeds], task, "accuracy").p == 1
    moved = own_data.rename(own_data.with_name("moved"))
    with pytest.raises(UserError, match="own: no such folder"):
        reevaluate_run(settings, record)
    assert evaluate_command([f"run={record.folder}", f"data_dir={moved}"]) == 0


def test_the_loss_of_a_response_is_the_models_own_mean_over_its_tokens(own_data, runs_folder):
    """By transformers' loss on each response, without the end of text."""
    words = ["model=tiny-llama", "task=instruction", "method=lora", f"data_dir={own_data}", *SHORT]
    settings = load_settings([*words, "task.max_new_tokens=4", "eval.batch_size=5"])
    task = load_task(settings)
    split = load_scored_splits(task, settings)
    model, tokenizer = load_model(settings, task)
    scores, rows = evaluate_splits(model, tokenizer, task, split, settings)
    total, tokens = 0.0, 0
    for row in split["test"].rows:
        target = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
        prompt = encode_prompt(tokenizer, row, settings)
        labels = torch.tensor([[-100] * len(prompt) + target])
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([prompt + target]), labels=labels).loss.item()
        total, tokens = total + loss * len(target), tokens + len(target)
    assert scores["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert sum(row["tokens"] for row in rows) == tokens and {"rouge_l", "chrf", "exact_match"} < set(scores)


def test_a_chat_template_sees_the_messages(own_data):
    settings = load_settings(["model=tiny-llama", "task=instruction", f"data_dir={own_data}"])
    tokenizer = load_tokenizer(settings)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    chat = replace(settings, model=replace(settings.model, chat=True))
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say it"}]
    for row, text in (
        ({"id": "1", "prompt": "not this", "messages": turns}, "system:be brief;user:say it;"),
        ({"id": "2", "prompt": "a prompt"}, "user:a prompt;"),
    ):
        assert encode_prompt(tokenizer, row, chat) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_that_the_chat_template_refuses_is_named_before_the_model_is_loaded(
    split, tmp_path, runs_folder, monkeypatch
):
    folder = shutil.copytree(BUNDLED / "tiny-llama", tmp_path / "model")
    refuses = "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}"
    (folder / "chat_template.jinja").write_text(f"{{% for m in messages %}}{refuses}{{% endfor %}}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name in ("train", "test"):
        system = [{"role": "system", "content": "be brief"}] if name == split else []
        rows = [([*head, {**turns[0], "content": f"{name} {n}"}, turns[1]],) for n, head in enumerate(([], system))]
        write_table(tmp_path / f"data/{name}.jsonl", ("messages",), rows)
    words = ["model=tiny-llama", f"model.path={folder}", "model.chat=true", "task=instruction", *SHORT]
    run = Run.prepare(load_settings([*words, f"data_dir={tmp_path / 'data'}"]))
    monkeypatch.setattr("dual_lora.lab.train.run.draw_initial_model", None)
    line = rf"chat template fails on {split}-1 of instruction \(System role not supported\); change the row, or take"
    with pytest.raises(UserError, match=line) as caught:
        train_run(run)
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    path = write_table(tmp_path / "train.csv", ("text", "label"), ROWS)
    with pytest.raises(TaskError, match="train.csv: is a file; give the folder it is in"):
        own_files.find_files(str(path), "classification")


@pytest.mark.parametrize(
    ("name", "train"),
    [
        (C, "text,label\n" + "".join(f"t{n},{'xy'[n % 2]}\n" for n in range(20))),
        (N, "prompt,response\n" + "".join(f"t{n},r{n}\n" for n in range(20))),
    ],
)
def test_a_test_file_without_labels_is_left_out(name, train, tmp_path):
    """The remedy that the refusal names is accepted, and rows of training are set apart."""
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "test.csv").write_text(f"{train.partition(',')[0]}\nsomething\n")
    words = [f"model={'tiny-roberta' if name == C else 'tiny-llama'}", f"task={name}", f"data_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"test.csv: no column .*; task.options.scored=validation leaves the test file"):
        load_settings(words)
    chosen = load_settings([*words, "task.options.scored=validation", "task.options.held_out=0.2"])
    assert {split: len(found.rows) for split, found in load_scored_splits(load_task(chosen), chosen).items()} == {
        "validation": 4
    }


def test_the_first_rows_of_a_sorted_table_are_a_warning(tmp_path, capfd):
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "test.csv").write_text("text,label\n" + "".join(f"t{n},{'x' if n < 6 else 'y'}\n" for n in range(9)))
    words = ["model=tiny-roberta", f"task={C}", f"data_dir={tmp_path}"]
    for count, warns in ((6, True), (7, False)):
        chosen = load_settings([*words, f"eval.max_examples={count}"])
        load_scored_splits(load_task(chosen), chosen)
        said = "warning: test: the first 6 of 9 rows have one label only; scores mean little"
        assert (said in capfd.readouterr().err) == warns


def test_a_warning_is_printed_once_and_recorded(tmp_path, runs_folder, capfd):
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "test.csv").write_text("text,label\n" + "".join(f"t{n},{'x' if n < 6 else 'y'}\n" for n in range(9)))
    words = ["model=tiny-roberta", f"task={C}", f"data_dir={tmp_path}", "eval.max_examples=6", *SHORT]
    result = train_run(Run.prepare(load_settings(words)))
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert told == [f"warning: {result['warnings'][0]}"] and "have one label only" in told[0]
