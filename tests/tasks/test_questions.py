"""Questions in six classes: the rows of the files, files that are wrong, the scores, and a short run."""

import gzip

import numpy as np
import pytest

import tasks
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tasks import TaskError

KINDS = {"ABBR": "stand for", "DESC": "work", "ENTY": "eat", "HUM": "invent", "LOC": "border", "NUM": "cost"}
GOOD = 'label\tquestion\nLOC\tWhere is "it ?\nNUM\tHow many ?\n'


@pytest.fixture
def folder(tmp_path):
    for split, start in (("train", 0), ("test", 50)):
        rows = [f"{kind}\tWhat does number {start + i} {verb} ?" for i in range(4) for kind, verb in KINDS.items()]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["label\tquestion", *rows, ""]))
    return tmp_path


def test_rows_are_those_of_the_files_plain_or_packed(tmp_path):
    (tmp_path / "train.tsv").write_text(GOOD)
    (tmp_path / "test.tsv.gz").write_bytes(gzip.compress(GOOD.encode()))
    task = tasks.load("questions")
    rows = task.split("train", str(tmp_path)).rows.to_list()
    assert rows[0] == {"id": "train-0", "text": 'Where is "it ?', "text_pair": "", "label": 4}
    packed = task.split("test", str(tmp_path)).rows.to_list()
    assert [row | {"id": ""} for row in packed] == [row | {"id": ""} for row in rows]
    assert len(set(task.source(str(tmp_path)).values())) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "no ./train.tsv"),
        ("", "train.tsv: no rows"),
        ("label\tquestion\n", "train.tsv: no rows"),
        ("coarse\tquestion\nLOC\tWhere ?\n", "no column 'label'"),
        ("label\tquestion\nLOC\tWhere ?\tfar\n", "line 2 has 3 fields, not 2"),
        ("label\tquestion\nLOC\tWhere ?\nloc\tWhere ?\n", "line 3: the label 'loc', not one of ABBR, DESC"),
        ("label\tquestion\nLOC\t \n", "line 2: an empty question where a question and its class was expected"),
        ("label\tquestion\nLOC\tWh\0ere ?\n", "zero byte"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(TaskError) as error:
        tasks.load("questions").split("train", str(tmp_path))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_folder_and_no_subset():
    with pytest.raises(TaskError, match="give data_dir=DIR"):
        tasks.load("questions").source()
    with pytest.raises(TaskError, match="only questions"):
        tasks.load("questions/fine")


def test_declared_scores_are_the_tasks_own():
    task, rng = tasks.load("questions"), np.random.default_rng(0)
    gold, other = rng.integers(6, size=(2, 60))
    answers = np.where(rng.random(60) < 0.6, gold, other)
    rows = [{"answer": int(a), "gold": int(g)} for a, g in zip(answers, gold, strict=True)]
    scores, declared = task.score({"test": rows}), task.declare_scores(rows[0])
    assert list(scores) == list(declared) == ["accuracy", "macro_f1"] and task.metric == "accuracy"
    for name, score in declared.items():
        columns = np.array([score.columns(row) for row in rows], float)
        assert score.measure(columns, np.ones((1, 60)))[0] == pytest.approx(scores[name], abs=1e-12)


def test_a_run_of_two_steps(folder, runs_folder):
    words = ["model=tiny-roberta", "task=questions", "method=lora", f"data_dir={folder}", "train.max_steps=2"]
    words += ["train.batch_size=8", "eval.before=false", "wandb.mode=disabled"]
    result = train_run(Run.prepare(load_settings(words)))
    assert result["metric"] == "accuracy" and set(result["metrics"]) == {"accuracy", "macro_f1"}
    assert result["data"]["test"] == tasks.load("questions").split("test", str(folder)).describe()
