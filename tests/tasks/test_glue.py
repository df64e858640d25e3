"""GLUE: the official files and the hub's rows give identical examples; counts, labels and metrics are GLUE's."""

import gzip
import json
import os
import shutil

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

import tasks
from tasks import TaskError, glue
from tests.support.official_files import HEADERS, TEXTS, write_official


def hub_rows(subset: str) -> Dataset:
    """The same two rows as the hub's parquet files hold them."""
    spec = glue.SPECS[subset]
    label = Value("float32") if subset == "stsb" else ClassLabel(names=list(spec.labels))
    features = Features({**{c: Value("string") for c in spec.hub_text}, "label": label, "idx": Value("int32")})
    labels = [2.5, 5.0] if subset == "stsb" else [0, 1]
    rows = [{**dict(zip(spec.hub_text, TEXTS[i], strict=False)), "label": labels[i], "idx": i} for i in range(2)]
    return Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("subset", glue.SPECS)
def test_files_and_hub_give_identical_examples(subset, tmp_path, monkeypatch):
    asked = []

    def load_dataset(hub, config, revision, split):
        asked.append((hub, config, split))
        return hub_rows(subset)

    monkeypatch.setattr(glue, "load_dataset", load_dataset)
    write_official(tmp_path, subset)
    write_official(tmp_path / "packed", subset, packed=True)
    task = tasks.load(f"glue/{subset}")
    for split in ("train", *task.eval_splits):
        hub = task.split(split).rows
        for where in (tmp_path, tmp_path / "glue", tmp_path / "packed"):
            files = task.split(split, str(where)).rows
            assert files.features == hub.features
            assert files.to_list() == hub.to_list()
    assert asked == [("nyu-mll/glue", subset, split) for split in ("train", *task.eval_splits)]
    assert hub[0]["text"] == 'a "lone quote' and hub[1]["text"] == "null"
    assert task.source(str(tmp_path)) == task.source(str(tmp_path / "packed"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "no glue/RTE/dev.tsv"),
        (lambda f: f.write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\n"), "line 2 has 3 fields, not 4"),
        (
            lambda f: f.write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tyes\n"),
            "line 2: the label 'yes', not one of",
        ),
        (
            lambda f: f.write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\ta\t \tentailment\n"),
            "line 2: an empty text where GLUE's RTE",
        ),
        (
            lambda f: f.write_bytes(b"index\tsentence\tlabel\n0\ta\tentailment\n"),
            "no columns 'sentence1' and 'sentence2', only index, sentence, label",
        ),
        (
            lambda f: f.write_bytes(b"label\tsentence1\tsentence2\tlabel\n0\ta\tb\tx\n"),
            "the column 'label' occurs twice",
        ),
        (lambda f: f.write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\ta\t\xe9\tx\n"), "line 2 is not UTF-8"),
        (lambda f: f.write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\0\tx\n"), "line 2 holds a zero byte"),
        (lambda f: f.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda f: f.write_bytes(b"index\tsentence1\tsentence2\tlabel\n"), "no rows"),
    ],
)
def test_a_missing_or_damaged_file_names_itself(damage, message, tmp_path):
    write_official(tmp_path, "rte")
    damage(tmp_path / "glue/RTE/dev.tsv")
    with pytest.raises(TaskError, match=message) as caught:
        tasks.load("glue/rte").split("validation", str(tmp_path))
    assert "dev.tsv" in str(caught.value)


def test_a_half_downloaded_gz_names_itself(tmp_path):
    write_official(tmp_path, "rte", packed=True)
    path = tmp_path / "glue/RTE/dev.tsv.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(TaskError, match=r"dev\.tsv\.gz: cannot be read"):
        tasks.load("glue/rte").split("validation", str(tmp_path))


def test_microsofts_own_mrpc_file_is_divided_by_glues_list(tmp_path):
    """The same rows as GLUE's two files, in the file's order; nothing is guessed where the list is missing."""
    folder = tmp_path / "MRPC"
    folder.mkdir()
    rows = [f"{i % 2}\t{i}\t{i + 90}\tone {i}\tother {i}" for i in range(5)]
    (folder / "msr_paraphrase_train.txt").write_bytes("\r\n".join([HEADERS["mrpc"], *rows, ""]).encode())
    task = tasks.load("glue/mrpc")
    with pytest.raises(TaskError, match=r"msr_paraphrase_train.txt: not divided .*; put GLUE's dev_ids.tsv next to it"):
        task.split("train", str(tmp_path))
    (folder / "dev_ids.tsv").write_text("1\t91\n3\t93\n")
    train, held_out = (task.split(split, str(tmp_path)).rows for split in ("train", "validation"))
    assert train["text"][:] == ["one 0", "one 2", "one 4"] and held_out["text_pair"][:] == ["other 1", "other 3"]
    assert train["label"][:] == [0, 0, 0] and held_out["label"][:] == [1, 1]
    before = task.source(str(tmp_path))
    (folder / "dev_ids.tsv").write_text("1\t91\n")
    assert task.source(str(tmp_path)) != before
    (folder / "dev_ids.tsv").write_text("1\t91\n3\t93 \n")  # would train on that row, and say nothing
    with pytest.raises(TaskError, match="dev_ids.tsv: no row of msr_paraphrase_train.txt has the ids 3 and 93 ; fetch"):
        task.split("train", str(tmp_path))
    with gzip.open(folder / "dev_ids.tsv.gz", "wt") as packed:
        packed.write("1\t91\n")
    with pytest.raises(TaskError, match="dev_ids.tsv and dev_ids.tsv.gz: hold different data"):
        task.source(str(tmp_path))


def test_splits_come_from_one_folder(tmp_path):
    write_official(tmp_path, "rte")
    task, folder = tasks.load("glue/rte"), tmp_path / "glue/RTE"
    shutil.copytree(folder, tmp_path / "RTE")
    before = task.source(str(tmp_path))
    (folder / "dev.tsv").unlink()
    with pytest.raises(TaskError, match="RTE and .*RTE each hold some of the files; keep one of them"):
        task.source(str(tmp_path))
    shutil.rmtree(folder)
    assert task.source(str(tmp_path)) == before


def test_microsofts_file_gives_the_rows_of_glues_own(official_data, tmp_path):
    task, folder = tasks.load("glue/mrpc"), official_data / "glue/MRPC"
    if not (folder / "dev_ids.tsv").is_file():
        pytest.skip("no msr_paraphrase_train.txt with its dev_ids.tsv beside the official data")
    (tmp_path / "MRPC").mkdir()
    for name in ("msr_paraphrase_train.txt", "dev_ids.tsv"):
        (tmp_path / "MRPC" / name).symlink_to(folder / name)
    for split in ("train", "validation"):
        assert task.split(split, str(tmp_path)).rows.to_list() == task.split(split, str(official_data)).rows.to_list()


def test_of_two_samples_none_is_chosen(tmp_path):
    write_official(tmp_path, "rte")
    folder = tmp_path / "glue/RTE"
    (folder / "dev.tsv").rename(folder / "dev.sample10.tsv")
    assert len(tasks.load("glue/rte").split("validation", str(tmp_path)).rows) == 2
    (folder / "dev.sample9.tsv").write_bytes((folder / "dev.sample10.tsv").read_bytes())
    with pytest.raises(TaskError, match="dev.sample10.tsv and dev.sample9.tsv could each be dev.tsv; keep one"):
        tasks.load("glue/rte").split("validation", str(tmp_path))


# name: (rows of train, rows of every evaluation split, share of label 1 in the first evaluation split)
OFFICIAL = {
    "cola": (8551, [1043], 721 / 1043),
    "sst2": (67349, [872], 444 / 872),
    "mrpc": (3668, [408], 279 / 408),
    "stsb": (5749, [1500], None),
    "qqp": (32946, [1000], None),
    "mnli": (15130, [1000, 1000], None),
    "qnli": (9833, [5463], 2761 / 5463),
    "rte": (2490, [277], 131 / 277),
}


@pytest.mark.parametrize("subset", OFFICIAL)
def test_official_files(subset, official_data):
    task = tasks.load(f"glue/{subset}")
    train, held_out, share = OFFICIAL[subset]
    splits = [task.split(s, str(official_data)).rows for s in task.eval_splits]
    assert len(task.split("train", str(official_data)).rows) == train
    assert [len(rows) for rows in splits] == held_out
    if share:
        assert sum(splits[0]["label"]) / len(splits[0]) == share


@pytest.mark.parametrize(
    ("subset", "metric", "others"),
    [
        ("cola", "matthews", {"accuracy", "f1"}),
        ("mrpc", "accuracy", {"f1", "matthews"}),
        ("stsb", "pearson", {"spearman", "pearson_spearman_mean"}),
        ("mnli", "accuracy", {"mismatched_accuracy"}),
    ],
)
def test_metric_of_the_column_and_the_others_beside_it(subset, metric, others):
    task = tasks.load(f"glue/{subset}")
    gold = [0.0, 2.5, 5.0, 1.0] if subset == "stsb" else [0, 1, 1, 2] if subset == "mnli" else [0, 1, 1, 0]
    rows = [{"answer": g, "gold": g} for g in gold]
    scores = task.score(dict.fromkeys(task.eval_splits, rows))
    assert task.metric == metric and scores[metric] == pytest.approx(1.0)
    assert others <= set(scores)


def test_metrics_against_hand_made_values():
    from tasks import metrics

    scores = metrics.score_classification([1, 1, 0, 0, 1], [1, 0, 0, 1, 1], classes=2)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    assert metrics.score_regression([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])["spearman"] == pytest.approx(1.0)
    assert metrics.score_regression([1.0, 1.0], [1.0, 2.0])["pearson"] == 0.0


def test_f1_belongs_to_tasks_of_two_classes_whichever_labels_occur():
    """A few rows of MNLI may hold two of its three labels; one class of MRPC may be missing."""
    rows = [{"answer": a, "gold": g} for a, g in ((0, 0), (1, 0), (1, 1))]
    mnli, mrpc = tasks.load("glue/mnli"), tasks.load("glue/mrpc")
    assert set(mnli.score({"validation_matched": rows})) == {"accuracy", "matthews"}
    assert mrpc.score({"validation": rows})["f1"] == pytest.approx(2 / 3)
    assert mrpc.score({"validation": rows[:1]})["f1"] == 0


@pytest.mark.parametrize("odd", [0.7, 2, -1, "1", None])
def test_what_is_no_class_is_not_scored(odd):
    from tasks import metrics

    with pytest.raises(ValueError, match="not one of the 2 classes, 0 to 1"):
        metrics.score_classification([0, odd], [0, 1], classes=2)
    with pytest.raises(ValueError, match="nan is not a number"):
        metrics.score_regression([0.0, float("nan")], [0.0, 1.0])


@pytest.mark.parametrize("place", [".", "MSRParaphraseCorpus"])
def test_the_original_mrpc_file_is_named_where_it_does_not_belong(place, tmp_path):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "msr_paraphrase_train.txt").write_text("")
    with pytest.raises(TaskError) as refused:
        tasks.load("glue/mrpc").split("train", str(tmp_path))
    found = tmp_path / place / "msr_paraphrase_train.txt"
    assert f"; move {found} and GLUE's dev_ids.tsv to {tmp_path}/MRPC/" in str(refused.value)
    with pytest.raises(TaskError, match="below it$"):
        tasks.load("glue/rte").split("train", str(tmp_path))


def write_cached_rows(cache, commit: str) -> None:
    """Write what datasets keeps of SST-2 once it has fetched it at a commit."""
    folder = cache / "nyu-mll___glue" / "sst2" / "0.0.0" / commit
    rows = hub_rows("sst2")
    splits = {"train": {"name": "train", "num_examples": 2, "dataset_name": "glue"}}
    rows.save_to_disk(folder / "rows")
    next((folder / "rows").glob("*.arrow")).rename(folder / "glue-train.arrow")
    info = {"config_name": "sst2", "dataset_name": "glue", "features": rows.features.to_dict(), "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_a_folder_called_like_a_data_set_does_not_stand_in_for_it(tmp_path, monkeypatch):
    folder = tmp_path / "nyu-mll" / "glue" / "sst2"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"sentence": "mine", "label": 1, "idx": 0}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(ConnectionError, match="nyu-mll/glue"):
        tasks.load("glue/sst2").split("train")
    write_cached_rows(tmp_path / "cache", glue.REVISION)
    assert [row["text"] for row in tasks.load("glue/sst2").split("train").rows] == [text for text, _ in TEXTS]


def test_offline_another_revision_in_the_cache_does_not_stand_in_for_the_pinned_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    write_cached_rows(tmp_path, "0" * 40)
    with pytest.raises(TaskError, match=f"nyu-mll/glue@{glue.REVISION[:8]}: .* the cache holds 00000000, another"):
        tasks.load("glue/sst2").split("train")


def test_an_empty_question_of_qqp_is_read_as_the_official_file_has_some(tmp_path):
    write_official(tmp_path, "qqp")
    file = tmp_path / "glue/QQP/train.tsv"
    file.write_text(file.read_text() + "8\t8\t8\t\twhy ?\t0\n")
    assert tasks.load("glue/qqp").split("train", str(tmp_path)).rows[-1]["text"] == ""


@pytest.mark.parametrize("word", ["3.8", "0.4", "4.813", "5.000", "4.57142857142857", "2.11111111111111"])
def test_a_score_of_the_hub_is_that_of_the_official_file(word):
    assert glue.restore_score(float(np.float32(word))) == float(word)


TABLE = "sentence\tlabel\nfine\t1\n"


@pytest.fixture
def sst2(tmp_path):
    """A folder with SST-2's two files."""
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(TABLE)
    return folder


def read(folder):
    return glue.task("sst2").split("train", str(folder.parent)).rows.to_list()


def test_of_a_file_and_its_gz_with_other_data_none_is_chosen(sst2):
    with gzip.open(sst2 / "train.tsv.gz", "wt") as stream:
        stream.write(TABLE)
    assert len(read(sst2)) == 1
    with gzip.open(sst2 / "train.tsv.gz", "at") as stream:
        stream.write("bad\t0\n")
    with pytest.raises(TaskError, match="hold different data; keep one"):
        read(sst2)


def test_a_long_document_is_one_field(sst2):
    (sst2 / "train.tsv").write_text(f"sentence\tlabel\n{'word ' * 40_000}\t0\n")
    (row,) = read(sst2)
    assert len(row["text"]) == 200_000


def test_nobody_waits_for_a_pipe(sst2):
    (sst2 / "train.tsv").unlink()
    os.mkfifo(sst2 / "train.tsv")
    with pytest.raises(TaskError, match="a pipe or a device, not a file"):
        read(sst2)
