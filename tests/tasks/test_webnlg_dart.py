"""WebNLG and DART: LoRA's prompts, grouping and metrics."""

import json

import pytest

import tasks
from tasks import TaskError, metrics


def webnlg_entry(number: int, category: str, facts: list[tuple], texts: dict[str, str]) -> dict:
    keys = ("subject", "property", "object")
    entry = {
        "category": category,
        "lexicalisations": [{"lex": text, "comment": comment} for text, comment in texts.items()],
        "modifiedtripleset": [dict(zip(keys, fact, strict=True)) for fact in facts],
    }
    return {str(number): entry}


WEBNLG = {
    "entries": [
        webnlg_entry(1, "Food", [("Fig", "kind", "Fruit")], {"A fig is a fruit.": "good", "Fig fig.": "toFix"}),
        webnlg_entry(2, "Artist", [("Ann", "born", "1900"), ("Ann", "home", "Old_Town")], {"Ann cannot rest.": "good"}),
        webnlg_entry(3, "Artist", [("Fig", "kind", "Fruit")], {"The fig is a fruit.": "good"}),
    ]
}
DART = [
    {
        "tripleset": [["Fig", "KIND", "Fruit"]],
        "annotations": [{"source": "own", "text": "A fig is a fruit."}, {"source": "own", "text": "Figs are fruit."}],
    },
    {"tripleset": [["Ann", "BORN", "1900"], ["Ann", "HOME", "Old Town"]], "annotations": [{"text": "Ann, 1900."}]},
]


@pytest.fixture
def files(tmp_path):
    for folder, names, content in (
        ("webnlg_challenge_2017", ("train.json", "dev.json", "test.json"), WEBNLG),
        ("dart", [f"dart-v1.1.1-full-{s}.json" for s in ("train", "dev", "test")], DART),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(json.dumps(content))
    return tmp_path


def test_webnlg_learns_good_texts_and_groups_equal_facts(files):
    task = tasks.load("webnlg")
    train, test = (task.split(split, str(files)).rows for split in ("train", "test"))
    assert train["target"][:] == [" A fig is a fruit.", " Ann cannot rest.", " The fig is a fruit."]
    assert test["prompt"][:] == ["Fig : kind : Fruit ||", "Ann : born : 1900 | Ann : home : Old_Town ||"]
    assert test["references"][0] == ["A fig is a fruit.", "The fig is a fruit."]
    assert test["id"][:] == ["test-seen-0", "test-unseen-1"]


def test_webnlg_scores_all_seen_and_unseen(files, monkeypatch):
    monkeypatch.setattr(metrics, "meteor", lambda h, r, parts: {name: len(part) / 10 for name, part in parts.items()})
    task = tasks.load("webnlg")
    rows = task.split("test", str(files)).rows
    scores = task.score(
        {"test": [task.judge(row, output) for row, output in zip(rows, ["", "Ann rests."], strict=True)]}
    )
    assert {"BLEU", "METEOR", "TER", "seen_BLEU", "unseen_TER"} <= set(scores) and task.metric == "BLEU"
    assert (scores["METEOR"], scores["seen_METEOR"]) == (0.2, 0.1)
    assert scores["seen_TER"] == 1.0 and scores["TER"] == pytest.approx((1.0 + scores["unseen_TER"]) / 2)


def test_dart_writes_relations_in_lower_case(files):
    task = tasks.load("dart")
    assert len(task.split("train", str(files)).rows) == 3
    rows = task.split("test", str(files)).rows
    assert rows["prompt"][:] == ["Fig : kind : Fruit ||", "Ann : born : 1900 | Ann : home : Old Town ||"]
    assert list(map(len, rows["references"])) == [2, 1]


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("webnlg", "webnlg_challenge_2017/train.json", "train.json: entry 1 has no text where WebNLG 2017"),
        ("webnlg", "webnlg_challenge_2017/test.json", "test.json: entry 1 has no text where WebNLG 2017"),
        ("dart", "dart/dart-v1.1.1-full-train.json", "train.json: 'Fig : kind : Fruit' has no text where DART 1.1.1"),
        ("dart", "dart/dart-v1.1.1-full-test.json", "test.json: 'Fig : kind : Fruit' has no text where DART 1.1.1"),
    ],
)
def test_an_empty_text_is_refused(name, path, said, files):
    """As a reference it would be the closest in length to any short output."""
    file = files / path
    file.write_text(file.read_text().replace("A fig is a fruit.", " "))
    with pytest.raises(TaskError, match=said):
        tasks.load(name).split("train" if "train" in path else "test", str(files))


def test_text_is_split_as_lora_and_nltk_split_it():
    assert metrics.split_words('He "cannot" go-on, A_b\u00e9 1.5!') == 'he " cannot " go - on , a_b\u00e9 1 . 5 !'
    assert metrics.split_penn_words('he " cannot " gonna cannots') == "he `` can not `` gon na cannots"


def test_scores_of_groups_stand_in_the_same_order_in_every_process(monkeypatch):
    monkeypatch.setattr(metrics, "meteor", lambda hypotheses, references, parts: {})
    groups = ["unseen", "seen", "other", "more", "less", "none", "any"]
    names = [name for name in metrics.score_webnlg(["a"] * 7, [["a"]] * 7, groups) if name.endswith("BLEU")]
    assert names == ["BLEU", *(f"{group}_BLEU" for group in sorted(groups))]


def test_only_six_references_count_and_a_perfect_output_scores_perfectly(monkeypatch):
    monkeypatch.setattr(metrics, "meteor", lambda hypotheses, references, parts: {})
    six = [f"wrong answer number {n} entirely" for n in range(6)]
    late, first = (
        metrics.score_webnlg(["The fig, a fruit."], [refs])
        for refs in ([*six, "the fig, a fruit."], ["the fig , a fruit ."])
    )
    assert first["BLEU"] == pytest.approx(1.0) and first["TER"] == 0.0
    assert late["BLEU"] < 0.5 and late["TER"] > 0.5


def test_ter_counts_a_shift_as_one_edit():
    assert metrics.ter("c d a b", ["a b c d"]) == pytest.approx(1 / 4)
    assert metrics.ter("a x", ["a b", "q q"]) == pytest.approx(1 / 2)
    assert metrics.ter("", ["a b"]) == metrics.ter("a", [""]) == 1.0


# what pyter3 0.3 finds
PYTER = (
    ("d b a c a a d b", "b a d a c c", 5),
    ("c c a b d d a", "d a c b c a d d", 3),
)


@pytest.mark.parametrize(("output", "reference", "edits"), PYTER)
def test_ter_makes_the_shifts_pyter_makes(output, reference, edits):
    assert metrics.count_edits_with_shifts(output.split(), reference.split()) == edits


def test_missing_scorers_are_named(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.warns(UserWarning) as caught:
        assert set(metrics.score_webnlg(["a"], [["a"]])) == {"BLEU", "TER"}
    assert [str(w.message).split(" not")[0] for w in caught] == ["METEOR"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("webnlg", "webnlg_challenge_2017/test.json", None, "webnlg_challenge_2017/test.json"),
        ("webnlg", "webnlg_challenge_2017/test.json", '{"entries": [', "test.json: not JSON"),
        ("webnlg", "webnlg_challenge_2017/test.json", '{"entries": [{"7": {}}]}', "test.json: KeyError"),
        ("webnlg", "webnlg_challenge_2017/test.json", '{"entries": []}', "no rows"),
        ("webnlg", "webnlg_challenge_2017/test.json", '{"entries": [{"1": {}, "2": {}}]}', "entry 1 holds 2 entries"),
        ("webnlg", "webnlg_challenge_2017/test.json", '{"entries": [], "entries": []}', "'entries' occurs twice"),
        (
            "dart",
            "dart/dart-v1.1.1-full-test.json",
            '[{"tripleset": [["a", "b"]]}]',
            "full-test.json: not enough values",
        ),
        ("dart", "dart/dart-v1.1.1-full-test.json", None, "dart/dart-v1.1.1-full-test.json"),
    ],
)
def test_a_missing_or_damaged_file_names_itself(name, file, content, message, files):
    (files / file).unlink() if content is None else (files / file).write_text(content)
    with pytest.raises(TaskError, match=message):
        tasks.load(name).split("test", str(files))


def test_official_files(official_data):
    data = str(official_data)
    webnlg, dart = tasks.load("webnlg"), tasks.load("dart", {"scored": "validation"})
    # 6,940 and 872 sets of facts: one row a good text of training, one a distinct set with a good text elsewhere
    assert [len(webnlg.split(s, data).rows) for s in ("train", "validation", "test")] == [18025, 870, 1862]
    test = webnlg.split("test", data).rows
    assert sum(map(len, test["references"])) == 4928 and sum("-seen-" in i for i in test["id"]) == 971
    assert len(dart.split("validation", data).rows) == 2721  # of 2,768 entries, 47 repeat the facts of another
    with pytest.raises(TaskError, match="dart-v1.1.1-full-train.json"):
        dart.split("train", data)
