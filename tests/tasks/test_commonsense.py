"""Commonsense: prompts byte for byte, answers by the published rule, the same items from the files and the hub."""

import hashlib
import json

import pytest
from datasets import Dataset

import tasks
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.inputs import splits
from tasks import TaskError, base, commonsense
from tasks.commonsense import SPECS, extract_answer, extract_answer_leniently
from tests.support.official_files import ITEMS, official

# Rows as the hub's columns hold them, and the instruction and answer LLM-Adapters writes for them.
HUB_ROWS = {
    "boolq": {"question": "is a fig a fruit", "answer": True, "passage": "not shown"},
    "piqa": {"goal": "dry a {plate}", "sol1": "use a towel ", "sol2": "use a spoon", "label": 0},
    "social_i_qa": {
        "context": "Ann met Bea.",
        "question": "Who met?",
        "answerA": "Ann",
        "answerB": "Bob",
        "answerC": "Cy",
        "label": "1",
    },
    "hellaswag": {
        "activity_label": "Sewing",
        "ctx": "Ann sews. she",
        "ctx_a": "Ann sews.",
        "ctx_b": "she",
        "endings": ["sings.", "sleeps.", "cuts the thread.", "[title] flies."],
        "label": "2",
    },
    "winogrande": {"sentence": "Ann met Bea, _ waved.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    "ARC-Easy": {
        "question": "What is wet?",
        "choices": {"text": ["sand", "ice", "glass", "wood", "rain"], "label": ["1", "2", "3", "4", "5"]},
        "answerKey": "5",
    },
    "ARC-Challenge": {
        "question": "What is dry?",
        "choices": {"text": ["rain", "sand", "a river"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "question_stem": "There is fog around",
        "choices": {"text": ["a marsh", "a tundra", "the plains", "a desert"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
}


@pytest.fixture
def files(tmp_path):
    for name in SPECS:
        (tmp_path / f"dataset/{name}").mkdir(parents=True)
        (tmp_path / f"dataset/{name}/test.json").write_text(json.dumps([official(name)]))
    (tmp_path / "ft-training_set").mkdir()
    (tmp_path / "ft-training_set/commonsense_170k.json").write_text(json.dumps([official(n) for n in SPECS]))
    return tmp_path


def test_prompts_are_those_of_llm_adapters_byte_for_byte(files):
    task, blanks = tasks.load("commonsense"), " " * 16
    row = task.split("boolq", str(files)).rows[0]
    assert row == {
        "id": "boolq-0",
        "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        f"request. \n\n{blanks}### Instruction:\n{blanks}{ITEMS['boolq'][0]}\n\n{blanks}### Response:\n{blanks}",
        "target": "the correct answer is true",
        "references": ["true"],
    }
    assert task.split("train", str(files)).rows[0]["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        f"request.  \n\n{blanks}### Instruction:\n{blanks}{ITEMS['boolq'][0]}\n"
        f"{blanks}\n{blanks}### Response:\n{blanks}"
    )


@pytest.mark.parametrize("name", SPECS)
def test_files_and_hub_give_identical_items(name, files, monkeypatch):
    asked = []

    def load_dataset(hub, config, revision, split):
        asked.append((hub, config, split, len(revision)))
        return Dataset.from_list([HUB_ROWS[name]])

    monkeypatch.setattr(commonsense, "load_dataset", load_dataset)
    task = tasks.load("commonsense")
    from_hub, from_files = task.split(name).rows, task.split(name, str(files)).rows
    assert from_hub.features == from_files.features and from_hub.to_list() == from_files.to_list()
    assert asked == [(SPECS[name].hub, SPECS[name].config, SPECS[name].split, 40)]


def test_the_training_file_comes_from_a_pinned_commit_or_the_folder(files, monkeypatch):
    def fetch(repository, commit, path):
        assert repository == "AGI-Edgerunners/LLM-Adapters" and len(commit) == 40
        return files / path

    monkeypatch.setattr(base, "fetch_file", fetch)
    task = tasks.load("commonsense")
    fetched, local = task.split("train"), task.split("train", str(files))
    assert fetched.rows.to_list() == local.rows.to_list()
    assert local.origin == "ft-training_set/commonsense_170k.json" and fetched.origin.endswith(local.origin)


@pytest.mark.parametrize("scored", ["test", "held_out"])
def test_the_downloaded_training_file_is_the_official_one_whatever_its_name(scored, training_file, monkeypatch):
    """datasets keeps downloads under a hash."""
    folder, _ = training_file
    cached = (folder / "ft-training_set/commonsense_170k.json").rename(folder / "5f2c9e8b")
    monkeypatch.setattr(base, "fetch_file", lambda *given: cached)
    task = tasks.load("commonsense", {"scored": scored})
    named = f"AGI-Edgerunners/LLM-Adapters@{commonsense.COMMIT[:8]}/ft-training_set/commonsense_170k.json"
    assert task.split("train").origin == named
    if scored == "held_out":
        assert task.split("boolq").origin == f"{named} (held out)"


def test_a_training_file_that_stands_in_is_named_as_what_it_is(files):
    folder = files / "ft-training_set"
    whole = json.loads((folder / "commonsense_170k.json").read_text())
    (folder / "commonsense_170k.json").unlink()
    (folder / "commonsense_130k.part.json").write_text(json.dumps([i for i in whole if "ending" not in i["answer"]]))
    (folder / "commonsense_15k.part.json").write_text(json.dumps(whole))
    origin = tasks.load("commonsense").split("train", str(files)).origin
    assert origin.endswith("130k.part.json (7 rows, not the official file; without HellaSwag)")
    origin = tasks.load("commonsense", {"train": "15k"}).split("train", str(files)).origin
    assert origin.endswith("15k.part.json (8 rows, not the official file)")


# The published rule, with what is surprising in it: no word ends, case matters, options a question does not have.
STRICT = [
    ("boolq", "the correct answer is false", "false"),
    ("boolq", "This is not true; the correct answer is false", "true"),
    ("boolq", "the claim is untrue", "true"),
    ("boolq", "False", ""),
    ("piqa", "solution12", "solution1"),
    ("piqa", "My resolution1 was broken, the correct answer is solution2", "solution1"),
    ("piqa", "the correct answer is solution 2", ""),
    ("openbookqa", "answer10", "answer1"),
    ("social_i_qa", "answer4", "answer4"),
    ("ARC-Challenge", "the correct answer is 2", ""),
    ("winogrande", "Answer format: option1/option2", "option1"),
    ("hellaswag", "  ending4 and ending1", "ending4"),
    ("ARC-Easy", "", ""),
    ("gsm8k", "answer1", None),
]
LENIENT = [
    ("boolq", "This is not true; the correct answer is false", "false"),
    ("boolq", "the claim is untrue", ""),
    ("boolq", "FALSE.", "false"),
    ("piqa", "solution12", ""),
    ("piqa", "My resolution1 was broken, Solution 2 is right", "solution2"),
    ("ARC-Challenge", "The correct answer is: 2", "answer2"),
    ("ARC-Challenge", "answer10", ""),
    ("winogrande", "Option #2", "option2"),
    ("hellaswag", "not ending1, the correct answer is ending4", "ending4"),
    ("openbookqa", "I do not know", ""),
    ("gsm8k", "answer1", None),
]


@pytest.mark.parametrize(("name", "text", "answer"), STRICT)
def test_strict_answers_follow_the_published_rule(name, text, answer):
    assert extract_answer(name, text) == answer


@pytest.mark.parametrize(("name", "text", "answer"), LENIENT)
def test_lenient_answers(name, text, answer):
    assert extract_answer_leniently(name, text) == answer


@pytest.mark.parametrize("name", SPECS)
def test_both_rules_read_every_target(name):
    for word in SPECS[name].words:
        assert extract_answer(name, f"the correct answer is {word}") == word
        assert extract_answer_leniently(name, f"the correct answer is {word}") == word


def test_the_original_scripts_answers(official_data):
    cases = official_data.parent / "fixtures/commonsense_answers.json"
    if not cases.is_file():
        pytest.skip("no fixtures beside the official data")
    cases = json.loads(cases.read_text())
    assert all(extract_answer(c["dataset"], c["output"]) == c["expected"] for c in cases["pairs"])
    for case in cases["response_split"]:
        text = commonsense.cut_response(case["decoded"].split(commonsense.RESPONSE, maxsplit=1)[1])
        assert text == case["response_llm_adapters"]
        assert extract_answer(case["dataset"], text) == case["expected_llm_adapters"]


def test_a_second_response_marker_ends_the_answer():
    assert commonsense.cut_response("  answer2\n\n   ### Response:\n answer1") == "answer2"


def test_predictions_hold_both_answers_and_scores_are_unweighted(files):
    task, results = tasks.load("commonsense"), {}
    for name in task.eval_splits:
        row = task.split(name, str(files)).rows[0]
        outputs = ["the correct answer is " + row["references"][0], row["references"][0].upper(), "none"]
        results[name] = [task.judge(row, output) for output in outputs[: 3 if name == "boolq" else 2]]
    verdict = results["boolq"][1]
    assert verdict == {
        "prompt_sha256": hashlib.sha256(task.split("boolq", str(files)).rows[0]["prompt"].encode()).hexdigest()[:16],
        "answer": "",
        "lenient_answer": "true",
        "gold": "true",
        "score": 0.0,
        "lenient_score": 1.0,
    }
    scores = task.score(results)
    assert scores["boolq"] == pytest.approx(1 / 3) and scores["lenient_boolq"] == pytest.approx(2 / 3)
    assert scores["average"] == pytest.approx((1 / 3 + 7 / 2) / 8) and task.metric == "average"
    assert scores["lenient_average"] == pytest.approx((2 / 3 + 7) / 8)
    assert scores["unanswered_boolq"] == pytest.approx(2 / 3) and scores["lenient_unanswered_piqa"] == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no commonsense/dataset/piqa/test.json or dataset/piqa/test.json"),
        ("[{", "piqa/test.json: not JSON"),
        ("[]", "piqa/test.json: no rows"),
        ('[{"question": "a"}]', "piqa/test.json: KeyError.'instruction'"),
        ('[{"answer": "solution1", "answer": "solution2"}]', "not JSON .the key 'answer' occurs twice in one object"),
        ("[NaN]", "not JSON .NaN is not a finite number"),
        ("[-1e999]", "not JSON .-1e999 is not a finite number"),
    ],
)
def test_a_missing_or_damaged_file_names_itself(content, message, files):
    path = files / "dataset/piqa/test.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(TaskError, match=message):
        tasks.load("commonsense").split("piqa", str(files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "solution1"}, "has the answer 'solution1' and the output 'the correct answer is solution2'"),
        ({"answer": "answer1"}, "has the answer 'answer1', not one of solution1, solution2"),
        (
            {"instruction": "Which?\n\nAnswer format: solution1"},
            "has the answer 'solution2', which its instruction does not offer",
        ),
        ({"input": "a passage"}, "has the input 'a passage', for which the prompt has no place"),
    ],
)
def test_an_item_that_contradicts_itself_is_refused(change, message, files):
    good = official("piqa") | {"answer": "solution2", "output": "the correct answer is solution2"}
    path = files / "dataset/piqa/test.json"
    path.write_text(json.dumps([good, good | change]))
    with pytest.raises(TaskError, match=f"piqa/test.json: .*item 1 {message}"):
        tasks.load("commonsense").split("piqa", str(files))


def test_options_and_splits_are_checked(files):
    with pytest.raises(TaskError, match="task.options.train=1k"):
        tasks.load("commonsense", {"train": "1k"})
    with pytest.raises(TaskError, match="no split 'gsm8k'"):
        tasks.load("commonsense").split("gsm8k", str(files))


COUNTS = {
    "boolq": 3270,
    "piqa": 1838,
    "social_i_qa": 1954,
    "hellaswag": 10042,
    "winogrande": 1267,
    "ARC-Easy": 2376,
    "ARC-Challenge": 1172,
    "openbookqa": 500,
}


def test_official_files(official_data):
    task = tasks.load("commonsense", {"train": "15k"})
    assert {name: len(task.split(name, str(official_data)).rows) for name in task.eval_splits} == COUNTS
    assert set(task.source(str(official_data))) == {"train", *COUNTS}
    assert len(task.split("train", str(official_data)).rows) == 15000


def test_official_training_file(official_data):
    train = tasks.load("commonsense").split("train", str(official_data))
    assert len(train.rows) == 130515 and "without HellaSwag" in train.origin


def test_training_rows_set_apart_are_scored_by_what_their_prompts_offer(official_data):
    """Learning rates are chosen on them."""
    task = tasks.load("commonsense")
    rows = task.split("train", str(official_data)).rows.select(range(0, 130515, 999))
    right = [task.judge(row, "the correct answer is " + row["references"][0]) for row in rows]
    wrong = [task.judge(row, "no idea") for row in rows]
    assert task.score({"train": right})["average"] == 1 and task.score({"train": wrong})["average"] == 0


def test_official_items_are_what_the_hub_converters_write(official_data):
    """Each official item, taken apart into the hub's columns, comes back the same."""
    for name, take_apart in {"boolq": boolq_columns, "winogrande": winogrande_columns}.items():
        rows = task_rows = tasks.load("commonsense").split(name, str(official_data)).rows
        items = [SPECS[name].convert(take_apart(row)) for row in rows]
        assert tasks.load("commonsense").build_rows(name, items, name).to_list() == task_rows.to_list()


def instruction(row) -> str:
    return row["prompt"].split("### Instruction:\n" + " " * 16)[1].split("\n\n" + " " * 16 + "### Response:")[0]


def boolq_columns(row) -> dict:
    question = instruction(row).split("question: ", 1)[1].split("?\n\nAnswer format")[0]
    return {"question": question, "answer": row["references"] == ["true"]}


def winogrande_columns(row) -> dict:
    sentence, options = instruction(row).split("sentence: ", 1)[1].split("\n\nOption1: ")
    first, second = options.removesuffix(" Answer format: option1/option2").split(" Option2: ")
    return {"sentence": sentence, "option1": first, "option2": second, "answer": row["references"][0][-1]}


@pytest.fixture
def training_file(tmp_path, monkeypatch):
    """A folder with a training file of six items for each set, of which two a set are held out."""
    monkeypatch.setattr(commonsense, "HELD_OUT_ROWS", 2)
    place = tmp_path / "ft-training_set/commonsense_170k.json"
    place.parent.mkdir()
    items = [
        {**official(name), "input": "", "instruction": official(name)["instruction"].replace(" ", f" {number} ", 1)}
        for name in HUB_ROWS
        if name != "ARC-Challenge"  # three answers, as SIQA has
        for number in range(6 if not name.startswith(("ARC", "open")) else 9)
    ]
    place.write_text(json.dumps(items))
    return tmp_path, items


def test_rows_held_out_are_asked_as_in_evaluation_and_trained_on_by_nobody(training_file):
    folder, items = training_file
    task = tasks.load("commonsense", {"scored": "held_out"})
    train = task.split("train", str(folder)).rows
    parts = {name: task.split(name, str(folder)).rows for name in task.eval_splits}
    assert task.eval_splits == tuple(SPECS) and all(len(rows) == 2 for rows in parts.values())
    numbers = [int(row["id"].partition("-")[2]) for rows in (train, *parts.values()) for row in rows]
    assert sorted(numbers) == list(range(len(items)))
    for name, rows in parts.items():
        for row in rows:
            item = items[int(row["id"].partition("-")[2])]
            assert row["prompt"] == commonsense.EVALUATION_PROMPT.format(item["instruction"])
            assert set(commonsense.list_offered_answers(row["prompt"])) <= set(SPECS[name].words)
            verdict = task.judge(row, row["target"])
            assert verdict["score"] == verdict["lenient_score"] == 1.0
    assert train[0]["prompt"].startswith(commonsense.TRAINING_PROMPT[:110])
    assert {path.name for path in folder.glob("**/*.json")} == {"commonsense_170k.json"}  # no test file is needed
    assert list(task.source(str(folder))) == ["train"]
    again = tasks.load("commonsense", {"scored": "held_out"}).split("boolq", str(folder)).rows
    assert list(again["id"]) == list(parts["boolq"]["id"])


def test_copies_of_rows_held_out_are_not_trained_on(training_file):
    """The rows held out are drawn by number, as before; a copy may be among them. By default all train."""
    folder, items = training_file
    place = folder / "ft-training_set/commonsense_170k.json"
    items = [item for item in items for _ in range(3)] + [dict(items[0])]
    items[-1]["answer"] = "false" if items[0]["answer"] == "true" else "true"  # of the same question
    items[-1]["output"] = commonsense.TARGET.format(items[-1]["answer"])
    place.write_text(json.dumps(items))
    task = tasks.load("commonsense", {"scored": "held_out"})
    drawn = commonsense.draw_held_out(items, place)
    held = {name: [items[n] for n in numbers] for name, numbers in drawn.items()}
    train = task.split("train", str(folder)).rows
    apart = {(item["instruction"], item["answer"]) for found in held.values() for item in found}
    trained = [items[int(row["id"].partition("-")[2])] for row in train]
    assert not apart & {(item["instruction"], item["answer"]) for item in trained}
    assert len(trained) == sum((item["instruction"], item["answer"]) not in apart for item in items)
    assert [row["id"] for row in task.split("piqa", str(folder)).rows] == [f"train-{n}" for n in drawn["piqa"]]
    whole = tasks.load("commonsense")
    assert len(whole.split("train", str(folder)).rows) == len(items)
    assert "held out" in task.source(str(folder))["train"]  # the runs from before are others


def test_a_training_file_without_a_set_cannot_hold_it_out(training_file):
    folder, items = training_file
    rest = [item for item in items if not item["answer"].startswith("ending")]
    (folder / "ft-training_set/commonsense_170k.json").write_text(json.dumps(rest))
    with pytest.raises(
        TaskError, match=r"^task.options.scored=held_out: .* has 0 rows left .* for hellaswag, more than 2"
    ):
        tasks.load("commonsense", {"scored": "held_out"}).split("train", str(folder))
    with pytest.raises(TaskError, match=r"^task.options.scored=dev: must be test or held_out$"):
        tasks.load("commonsense", {"scored": "dev"})


@pytest.mark.parametrize(("name", "asked"), [("train", 0), ("boolq", 1), ("openbookqa", 1)])
def test_the_cache_is_used_for_each_set_of_a_hub_that_is_out_of_reach(name, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(splits, "use_cache_if_unreachable", lambda **given: calls.append(given))
    monkeypatch.setattr(commonsense.Commonsense, "split", lambda self, name, data_dir=None: name)
    settings = load_settings(["model=tiny-llama", "task=commonsense"])
    assert splits.read_split(tasks.load("commonsense"), name, settings) == name and calls == [{"data": True}] * asked
