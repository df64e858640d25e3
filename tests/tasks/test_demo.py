"""The demo tasks: the same rows everywhere and always, fair splits, and scores that follow from the outputs."""

import pytest

import tasks
from tasks import TaskError, demo

NAMES = [f"demo/{subset}" for subset in demo.SUBSETS]
GOLDEN = {
    ("demo/sentiment", "train"): "7d3ddeb727b7f251",
    ("demo/sentiment", "validation"): "fe770182c6e00c79",
    ("demo/restaurants", "train"): "e40ca59b5f83bfd6",
    ("demo/restaurants", "validation"): "7b25c0269113cabc",
    ("demo/choice", "train"): "0a645a6fa4e18dcc",
    ("demo/choice", "validation"): "62c5b0c155704778",
}


def rows(name: str, split: str) -> list[dict]:
    return list(tasks.load(name).split(split).rows)


def shown(row: dict) -> str:
    return row.get("prompt") or row["text"]


def scores(name: str, outputs: list, of: list[dict]) -> dict[str, float]:
    task = tasks.load(name)
    return task.score({"validation": [task.judge(row, output) for row, output in zip(of, outputs, strict=True)]})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_the_same_on_every_machine(name, split):
    assert tasks.load(name).split(split).describe()["sha256"][:16] == GOLDEN[name, split]


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_used_twice(name):
    every = [shown(row) for split in ("train", "validation") for row in rows(name, split)]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", ["demo/sentiment", "demo/choice"])
def test_labels_are_balanced(name):
    for split in ("train", "validation"):
        drawn = rows(name, split)
        ones = sum(row.get("label") == 1 or row.get("target", "").endswith("1") for row in drawn)
        assert abs(ones / len(drawn) - 0.5) < 0.05


@pytest.mark.parametrize("name", ["demo/restaurants", "demo/choice"])
def test_the_target_is_an_accepted_text(name):
    for split in ("train", "validation"):
        assert all(row["target"] in row["references"] for row in rows(name, split))


def test_validation_restaurants_are_new_and_every_word_of_them_is_not():
    names = {}
    for split in ("train", "validation"):
        names[split] = {row["prompt"].split(" | ")[0] for row in rows("demo/restaurants", split)}
    assert not names["train"] & names["validation"]
    words = {split: {word for name in names[split] for word in name.split()} for split in names}
    assert words["validation"] <= words["train"]


def test_validation_asks_about_other_facts_than_training():
    assert not set(map(str, demo.FACTS_OF["train"])) & set(map(str, demo.FACTS_OF["validation"]))
    assert len(demo.FACTS) == len(demo.FACTS_OF["train"]) + len(demo.FACTS_OF["validation"])


def test_no_single_word_of_a_review_tells_its_label():
    labels = {}
    for row in rows("demo/sentiment", "train"):
        for word in set(row["text"].replace(",", "").split()):
            labels.setdefault(word, []).append(row["label"])
    assert all(0.15 < sum(found) / len(found) < 0.85 for found in labels.values())


def test_sentiment_score():
    drawn = rows("demo/sentiment", "validation")
    assert scores("demo/sentiment", [row["label"] for row in drawn], drawn) == {"accuracy": 1.0}
    assert scores("demo/sentiment", [1] * len(drawn), drawn) == {"accuracy": 0.5}


def test_restaurants_score():
    drawn = rows("demo/restaurants", "validation")[:10]
    every_form = [row["references"][i % len(row["references"])] for i, row in enumerate(drawn)]
    assert scores("demo/restaurants", every_form, drawn) == {"bleu": 1.0, "slot_accuracy": 1.0}
    assert scores("demo/restaurants", [""] * 10, drawn) == {"bleu": 0.0, "slot_accuracy": 0.0}
    wrong_food = scores("demo/restaurants", [row["target"].replace(" food", " meals") for row in drawn], drawn)
    assert 0.5 < wrong_food["bleu"] < 1 and wrong_food["slot_accuracy"] == 1.0
    one_name_missing = [drawn[0]["target"].replace("The ", "A "), *every_form[1:]]
    assert scores("demo/restaurants", one_name_missing, drawn)["slot_accuracy"] == 0.9


def test_choice_score():
    drawn = rows("demo/choice", "validation")[:4]  # solutions 1, 2, 1, 2
    outputs = ["the correct answer is solution1", "solution2 or solution1", "solution2", "I do not know"]
    assert scores("demo/choice", outputs, drawn) == {"accuracy": 0.5, "unanswered": 0.25}


def test_errors_name_what_there_is():
    with pytest.raises(TaskError, match="sentiment, restaurants, choice"):
        tasks.load("demo/poems")
    with pytest.raises(TaskError, match="no split 'test', only train and validation"):
        tasks.load("demo/choice").split("test")


def test_corpus_keeps_validation_back():
    kinds = dict.fromkeys(demo.WRITERS, 1)
    texts = list(demo.iterate_corpus(kinds, size=5000))
    assert len(set(texts)) == 5000
    assert texts == list(demo.iterate_corpus(kinds, size=5000))
    together = "\n".join(texts)
    assert not any(row["text"] in together for row in rows("demo/sentiment", "validation"))
    assert not any(name in together for name in demo.NAMES_OF["validation"])
    settled = [text for text in texts if "the answer is" in text]
    for relation, group, member in demo.FACTS_OF["validation"]:
        asked = (relation.ask_group.format(member=member), f": {group} ")
        assert not any(all(part in text for part in asked) for text in settled)
