"""Eight commonsense sets with one training file, as LLM-Adapters made them and DoRA reports them.

Sources: AGI-Edgerunners/LLM-Adapters (arXiv 2304.01933) at the commit below; DoRA's copy is alike. An item has an
`instruction` (question, options and the line "Answer format: ..."), the `output` to learn ("the correct answer is X")
and the `answer` X. The prompts of training and of evaluation differ in white space, byte for byte as there: their
sixteen blanks come from an indented string.

Answers are read from the text after the prompt, up to a second "### Response:". The strict form is the published one:
the first option word in the text, case-sensitive, with no regard to word ends ("untrue" holds "true"). The lenient form
also takes capitals and a blank ("Solution 2"), whole words only, and what follows "answer is" first. Accuracy is
right / all, an output without an answer is wrong, and the average is the unweighted mean of the eight accuracies.

Data: below `data_dir`, ft-training_set/commonsense_{170k,15k}.json and dataset/NAME/test.json, below a folder
`commonsense` or not; a training file that is not the full one ("commonsense_130k.no-hellaswag.json") is taken and the
record says what is missing. Without `data_dir` the training file comes from LLM-Adapters' repository and the eight sets
are written out of the hub's columns, which gives the same text; by size its "test" is the public validation set except
for ARC and OpenBookQA.

With `scored=held_out`, HELD_OUT_ROWS training rows for each set are kept from training and scored instead, with the
prompt of evaluation, so that a learning rate can be chosen by the average over eight sets without a look at their test
rows. The training file does not name sets. Their answer formats do, except for ARC and OpenBookQA, which share one: the
three get different rows of it. Rows equal to one held out, of which WinoGrande's have many, are not trained on either.

LLM-Adapters' and DoRA's checkpoint of the lowest loss on 120 training rows is `task.checkpoint=best_loss`.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import base
from tasks.base import Output, Row, Split, Task, TaskError, load_dataset

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.measures import Score

VERSION = 2
REPOSITORY, COMMIT = "AGI-Edgerunners/LLM-Adapters", "816657208af4db747803f87ba40a4c71383fed7a"
TRAINING = {"170k": "commonsense_130k*.json", "15k": "commonsense_15k.*.json"}  # what may stand in for each file
RESPONSE = "### Response:"
ROWS_15K = 15_000  # of commonsense_15k.json
HELD_OUT_ROWS, HELD_OUT_SEED, SIQA_OPTIONS = 125, 2512, 3
INDENT = " " * 16
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
EVALUATION_PROMPT = f"{PREAMBLE}\n\n{INDENT}### Instruction:\n{INDENT}{{}}\n\n{INDENT}{RESPONSE}\n{INDENT}"
TRAINING_PROMPT = f"{PREAMBLE} \n\n{INDENT}### Instruction:\n{INDENT}{{}}\n{INDENT}\n{INDENT}{RESPONSE}\n{INDENT}"
TARGET = "the correct answer is {}"
QUESTION = "Please choose the correct answer to the question: "

Item = dict[str, str]  # instruction, output, answer


@dataclass(frozen=True)
class Spec:
    """One set: its option words as the published rule searches them, and where it is on the hub."""

    words: tuple[str, ...]
    hub: str
    revision: str
    config: str | None
    split: str
    convert: Callable[[Row], Item]


def build_choice_item(
    question: str, word: str, options: list[str], right: int, between: str = " ", end: str = "\n\n"
) -> Item:
    """Return the item of a question with numbered options, the right one counted from 0."""
    listed = between.join(f"{word.capitalize()}{i}: {option}" for i, option in enumerate(options, start=1))
    names = [f"{word}{i}" for i in range(1, len(options) + 1)]
    return build_item(f"{question}\n\n{listed}{end}Answer format: {'/'.join(names)}", names[right])


def build_item(instruction: str, answer: str) -> Item:
    """Return the item of an instruction with its answer."""
    return {"instruction": instruction, "output": TARGET.format(answer), "answer": answer}


def list_offered_answers(prompt: str) -> list[str]:
    """Return the answers a prompt offers, which are in its line of the answer format."""
    return prompt.rpartition("Answer format: ")[2].partition("\n")[0].strip().split("/")


def check_item(item: Item, row: Row, words: tuple[str, ...] | None) -> None:
    """Refuse an item whose answer is not among the set's `words` or not offered, that contradicts itself, or that has
    a part its prompt would leave out.

    Raises:
        ValueError: with the answer.
    """
    answer, number = item["answer"], row["id"].rpartition("-")[2]
    if words and answer not in words:
        raise ValueError(f"item {number} has the answer {answer!r}, not one of {', '.join(words)},")
    if answer not in list_offered_answers(row["prompt"]):
        raise ValueError(f"item {number} has the answer {answer!r}, which its instruction does not offer,")
    if item["output"] != TARGET.format(answer):
        raise ValueError(f"item {number} has the answer {answer!r} and the output {item['output']!r}")
    if item.get("input"):
        raise ValueError(f"item {number} has the input {item['input']!r}, for which the prompt has no place,")


def convert_boolq(row: Row) -> Item:
    """Return a row of the hub's BoolQ as LLM-Adapters writes it."""
    asked = f"Please answer the following question with true or false, question: {row['question']}?"
    return build_item(f"{asked}\n\nAnswer format: true/false", str(row["answer"]).lower())


def convert_piqa(row: Row) -> Item:
    """Return a row of the hub's PIQA as LLM-Adapters writes it."""
    question = f"Please choose the correct solution to the question: {row['goal']}"
    return build_choice_item(question, "solution", [row["sol1"], row["sol2"]], int(row["label"]), between="\n\n")


def convert_social_i_qa(row: Row) -> Item:
    """Return a row of the hub's SIQA as LLM-Adapters writes it."""
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return build_choice_item(f"{QUESTION}{row['context']} {row['question']}", "answer", options, int(row["label"]) - 1)


def convert_hellaswag(row: Row) -> Item:
    """Return a row of the hub's HellaSwag as LLM-Adapters writes it."""
    sentence = f"{row['activity_label']}: {row['ctx']}"
    question = f"Please choose the correct ending to complete the given sentence: {sentence}"
    return build_choice_item(question, "ending", row["endings"], int(row["label"]))


def convert_winogrande(row: Row) -> Item:
    """Return a row of the hub's WinoGrande as LLM-Adapters writes it."""
    asked = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    options = [row["option1"], row["option2"]]
    return build_choice_item(asked + row["sentence"], "option", options, int(row["answer"]) - 1, end=" ")


def convert_arc(row: Row) -> Item:
    """Return a row of the hub's ARC as LLM-Adapters writes it."""
    right = row["choices"]["label"].index(row["answerKey"])
    return build_choice_item(QUESTION + row["question"], "answer", row["choices"]["text"], right)


def convert_openbookqa(row: Row) -> Item:
    """Return a row of the hub's OpenBookQA as LLM-Adapters writes it."""
    return convert_arc(row | {"question": row["question_stem"]})


def number_words(word: str, count: int) -> tuple[str, ...]:
    """Return option words: solution1, solution2, and so on."""
    return tuple(f"{word}{i}" for i in range(1, count + 1))


ANSWERS, ARC = number_words("answer", 5), ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
SPECS = {
    "boolq": Spec(
        ("true", "false"), "google/boolq", "35b264d03638db9f4ce671b711558bf7ff0f80d5", None, "validation", convert_boolq
    ),
    "piqa": Spec(
        number_words("solution", 2),
        "baber/piqa",
        "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
        None,
        "validation",
        convert_piqa,
    ),
    "social_i_qa": Spec(
        ANSWERS, "lighteval/siqa", "54c6a1f8cb6daf4f5abf24a601852612fb35eb25", None, "validation", convert_social_i_qa
    ),
    "hellaswag": Spec(
        number_words("ending", 4),
        "Rowan/hellaswag",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        None,
        "validation",
        convert_hellaswag,
    ),
    "winogrande": Spec(
        number_words("option", 2),
        "allenai/winogrande",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        "winogrande_xl",
        "validation",
        convert_winogrande,
    ),
    "ARC-Easy": Spec(ANSWERS, *ARC, "ARC-Easy", "test", convert_arc),
    "ARC-Challenge": Spec(ANSWERS, *ARC, "ARC-Challenge", "test", convert_arc),
    "openbookqa": Spec(
        ANSWERS, "allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "main", "test", convert_openbookqa
    ),
}


def extract_answer(dataset: str, text: str) -> str | None:
    """Return the first option word of `text` as LLM-Adapters finds it; "" where there is none, None for another set."""
    if dataset not in SPECS:
        return None
    found = re.search("|".join(SPECS[dataset].words), text.strip())
    return found[0] if found else ""


def extract_answer_leniently(dataset: str, text: str) -> str | None:
    """Return the option a benevolent reader sees in `text`; "" where there is none, None for another set."""
    if dataset not in SPECS:
        return None
    words = SPECS[dataset].words
    kind, numbers = words[0].rstrip("1"), "".join(word[-1] for word in words)
    option = r"\b(true|false)\b" if kind == "true" else rf"\b{kind}[\s#:]*([{numbers}])\b"
    number = r"(?!)" if kind == "true" else rf"([{numbers}])\b"
    found = re.search(rf"\banswer is:?\s*(?:{option}|{number})", text, re.I) or re.search(option, text, re.I)
    value = next((group for group in found.groups() if group), "") if found else ""
    return value.lower() if kind == "true" or not value else kind + value


def cut_response(output: str) -> str:
    """Return the part of a continuation that counts: all before a second response marker (DoRA: all after it)."""
    return output.split(RESPONSE)[0].strip()


def name_format(item: Item) -> str:
    """Return what an item's answer format tells of its set: the word of its options, and whether three answers (as in
    SIQA) or more (as in ARC and OpenBookQA) are offered."""
    options = list_offered_answers(item["instruction"])
    word = options[0].rstrip("1")
    return word if word != "answer" else f"{word} of {'3' if len(options) == SIQA_OPTIONS else 'more'}"


def task(subset: str, train: str = "170k", likelihood: bool = True, scored: str = "test") -> "Commonsense":
    """Return the task; `train` chooses the training file, "170k" or "15k"; `likelihood` scores the options, too;
    `scored` is "test", the eight sets, or "held_out", training rows in their place.

    Raises:
        TaskError: an option is wrong.
    """
    if subset:
        raise TaskError(f"commonsense/{subset}: no such task, only commonsense")
    if train not in TRAINING:
        raise TaskError(f"task.options.train={train}: must be {' or '.join(TRAINING)}")
    if not isinstance(likelihood, bool):
        raise TaskError(f"task.options.likelihood={likelihood}: must be true or false")
    if scored not in ("test", "held_out"):
        raise TaskError(f"task.options.scored={scored}: must be test or held_out")
    return Commonsense(train, likelihood, scored)


class Commonsense(Task):
    """Training on one file, evaluation on eight sets."""

    name, version, form, metric = "commonsense", VERSION, "generation", "average"
    eval_splits, held_out_option = tuple(SPECS), "+task.options.scored=held_out"  # which its file in conf/ leaves out
    lower_is_better = tuple(f"{prefix}unanswered_{name}" for prefix in ("", "lenient_") for name in SPECS)

    def __init__(self, train: str, likelihood: bool, scored: str = "test") -> None:
        self.train, self.likelihood, self.holds_out = train, likelihood, scored == "held_out"

    def count_official_rows(self, default: int) -> tuple[int, str]:
        rows = default if self.train == "170k" else min(default, ROWS_15K)
        if not self.holds_out:
            return rows, ""
        return max(0, rows - HELD_OUT_ROWS * len(SPECS)), "copies of the rows held out are left out as well"

    def find_file(self, split: str, data_dir: str | None) -> Path:
        """Return the official file of a split, below `data_dir` or downloaded."""
        self.check_split(split)
        folder, names = f"dataset/{split}", ("test.json",)
        if split == "train":
            folder, names = "ft-training_set", (f"commonsense_{self.train}.json", TRAINING[self.train])
        if data_dir is None:
            return base.fetch_file(REPOSITORY, COMMIT, f"{folder}/{names[0]}")
        return base.find_data_file(data_dir, (f"commonsense/{folder}", folder), names)

    def check_split(self, split: str) -> None:
        """Refuse a split that the task does not have.

        Raises:
            TaskError: with those it has.
        """
        if split != "train" and split not in SPECS:
            raise TaskError(f"commonsense has no split {split!r}, only train, {', '.join(SPECS)}")

    def source(self, data_dir: str | None = None) -> dict[str, str]:
        scored = () if self.holds_out else self.eval_splits
        if data_dir is None:
            training = f"github.com/{REPOSITORY}@{COMMIT}/ft-training_set/commonsense_{self.train}.json"
            found = {"train": training} | {name: f"{SPECS[name].hub}@{SPECS[name].revision}" for name in scored}
        else:
            found = {split: base.file_sha256(self.find_file(split, data_dir)) for split in ("train", *scored)}
        if self.holds_out:  # runs from before that have another identity
            found["train"] += " without copies of the rows held out"
        return found

    def split(self, name: str, data_dir: str | None = None) -> Split:
        self.check_split(name)
        if self.holds_out:
            return self.split_training_file(name, data_dir)
        if data_dir is None and name != "train":
            spec = SPECS[name]
            rows = load_dataset(spec.hub, spec.config, revision=spec.revision, split=spec.split)
            return Split(self.build_rows(name, map(spec.convert, rows), spec.hub), f"{spec.hub}@{spec.revision[:8]}")
        path = self.find_file(name, data_dir)
        items = base.read_json(path)
        missing = self.describe_missing(path, items, data_dir) if name == "train" else ""
        return Split(self.build_rows(name, items, path), self.describe_origin(path, data_dir) + missing)

    def split_training_file(self, name: str, data_dir: str | None) -> Split:
        """Return the training rows that equal none held out, or those held out for a set, with evaluation's prompt."""
        path = self.find_file("train", data_dir)
        items = base.read_json(path)
        with base.translate_shape_errors("a list of LLM-Adapters' items", path):
            held_out = draw_held_out(items, path)
            apart = {get_content(items[number]) for numbers in held_out.values() for number in numbers}
            rest = [number for number, item in enumerate(items) if get_content(item) not in apart]
        numbers = held_out[name] if name in SPECS else rest
        prompt = TRAINING_PROMPT if name == "train" else EVALUATION_PROMPT
        note = self.describe_missing(path, items, data_dir) if name == "train" else " (held out)"
        rows = self.build_chosen_rows("train", items, numbers, prompt, path)
        return Split(rows, self.describe_origin(path, data_dir) + note)

    def describe_origin(self, path: Path, data_dir: str | None) -> str:
        """Return which file rows are of. A downloaded one, which only training has, is named by a hash in the cache."""
        if data_dir is None:
            return f"{REPOSITORY}@{COMMIT[:8]}/ft-training_set/commonsense_{self.train}.json"
        return f"{path.parent.name}/{path.name}"

    def describe_missing(self, path: Path, items: list[Item], data_dir: str | None) -> str:
        """Return what is said of a training file that stands in for the official one."""
        if data_dir is None or path.name.removesuffix(".gz") == f"commonsense_{self.train}.json":
            return ""
        swag = any(item["answer"].startswith("ending") for item in items)
        return f" ({len(items)} rows, not the official file{'' if swag else '; without HellaSwag'})"

    def build_rows(self, split: str, items: Iterable[Item], source: Any) -> "Dataset":
        """Return the items as rows.

        Raises:
            TaskError: they are not items of LLM-Adapters, or there are none.
        """
        items = list(items)
        prompt = TRAINING_PROMPT if split == "train" else EVALUATION_PROMPT
        return self.build_chosen_rows(split, items, range(len(items)), prompt, source)

    def build_chosen_rows(
        self, split: str, items: list[Item], numbers: Iterable[int], prompt: str, source: Any
    ) -> "Dataset":
        """Return the items of these numbers as rows.

        Raises:
            TaskError: as `build_rows`.
        """
        head, _, tail = prompt.partition("{}")
        items = [(number, items[number]) for number in numbers]
        with base.translate_shape_errors("a list of LLM-Adapters' items", source):
            rows = [
                {
                    "id": f"{split}-{number}",
                    "prompt": head + item["instruction"] + tail,
                    "target": item["output"],
                    "references": [item["answer"]],
                }
                for number, item in items
            ]
        found = self.dataset(rows, source)
        with base.translate_shape_errors("one of LLM-Adapters' items", source):
            for row, (_, item) in zip(rows, items, strict=True):
                check_item(item, row, SPECS[split].words if split in SPECS else None)
        return found

    def choices(self, row: Row) -> list[str]:
        """Return the target for every answer the prompt offers."""
        return [TARGET.format(word) for word in list_offered_answers(row["prompt"])] if self.likelihood else []

    def judge_choice(self, row: Row, likelihoods: list[float], tokens: list[int]) -> Row:
        """Return the likeliest answer. The targets differ only in the answer's name, so lengths need no correction."""
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        answer = list_offered_answers(row["prompt"])[best]
        right = answer == row["references"][0]
        return {"log_likelihoods": likelihoods, "likelihood_answer": answer, "likelihood_score": float(right)}

    def judge(self, row: Row, output: Output) -> Row:
        """Return the strict and the lenient answer by the words of the row's set, which its id tells, or, of a training
        row set apart, the answers that its prompt offers."""
        name, gold = row["id"].rpartition("-")[0], row["references"][0]
        if name not in SPECS:
            options = set(list_offered_answers(row["prompt"]))
            name = next((other for other, spec in SPECS.items() if options <= set(spec.words)), name)
        text = cut_response(output)
        answer, lenient = extract_answer(name, text), extract_answer_leniently(name, text)
        return {
            "prompt_sha256": base.text_sha256(row["prompt"]),
            "answer": answer,
            "lenient_answer": lenient,
            "gold": gold,
            "score": float(answer == gold),
            "lenient_score": float(lenient == gold),
        }

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return accuracies, strict, lenient and by likelihood, with their unweighted averages, and the shares without
        an answer of the former two."""
        scores: dict[str, float] = {}
        ranked = all("likelihood_score" in row for rows in results.values() for row in rows)
        for prefix in ("", "lenient_", "likelihood_")[: 3 if ranked else 2]:
            found = {name: compute_mean(row[f"{prefix}score"] for row in rows) for name, rows in results.items()}
            scores |= {f"{prefix}average": compute_mean(found.values())} | {
                f"{prefix}{n}": value for n, value in found.items()
            }
            if prefix == "likelihood_":
                continue
            empty = {name: compute_mean(not row[f"{prefix}answer"] for row in rows) for name, rows in results.items()}
            scores |= {f"{prefix}unanswered_{name}": share for name, share in empty.items()}
        return scores

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        """Return accuracies and shares without an answer of every set, and the averages, whose strata the sets are."""
        from tasks import measures

        def share(columns: Callable[[Row], tuple[float]], split: str | None) -> "Score":
            return measures.Score(columns, measures.mean, partial(find_stratum, split))

        found = {}
        for prefix in ("", "lenient_", "likelihood_"):
            if f"{prefix}score" not in example:
                continue
            score, answer = measures.select_column(f"{prefix}score"), f"{prefix}answer"
            found |= {f"{prefix}{name}": share(score, name) for name in self.eval_splits}
            found[f"{prefix}average"] = share(score, None)
            if prefix != "likelihood_":
                empty = partial(is_empty, answer)
                found |= {f"{prefix}unanswered_{name}": share(empty, name) for name in self.eval_splits}
        return found


def draw_held_out(items: list[Item], source: Any) -> dict[str, list[int]]:
    """Return the numbers of the training items that are held out for each set, the same for every run.

    Raises:
        TaskError: the file has too few items of a set's answer format.
    """
    by_format: dict[str, list[int]] = {}
    for number in random.Random(HELD_OUT_SEED).sample(range(len(items)), len(items)):
        by_format.setdefault(name_format(items[number]), []).append(number)
    found = {}
    for name, spec in SPECS.items():
        kind = spec.words[0].rstrip("1")
        kind += (" of 3" if name == "social_i_qa" else " of more") if kind == "answer" else ""
        rest = by_format.get(kind, [])
        if len(rest) <= HELD_OUT_ROWS:
            more = f"{len(rest)} rows left that can be held out for {name}, more than {HELD_OUT_ROWS} are needed"
            raise TaskError(f"task.options.scored=held_out: {source} has {more}; drop it")
        found[name], by_format[kind] = sorted(rest[:HELD_OUT_ROWS]), rest[HELD_OUT_ROWS:]
    return found


def get_content(item: Item) -> tuple[str, str]:
    """Return what makes two items the same: what is asked and what is to be answered."""
    return item["instruction"], item["output"]


def find_stratum(split: str | None, row: Row) -> str | None:
    """Return a row's set, if that is the one asked for or none is."""
    return row["split"] if split in (None, row["split"]) else None


def is_empty(answer: str, row: Row) -> tuple[float]:
    """Return 1 where a row has no such answer."""
    return (not row[answer],)


def compute_mean(values: Iterable[float]) -> float:
    """Return the unweighted mean."""
    values = list(values)
    return sum(values) / len(values)
