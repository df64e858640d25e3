"""Outputs of a model on a task's evaluation splits, judged and scored by the task.

The outputs depend on the batch size only by rounding: padding is masked, and rows are put back into their own order,
but how much padding there is changes the order of sums. In float32 that hardly ever changes an output; in 16 bits it
may where two tokens or classes are nearly tied. A model of which more depends on the batch is refused before training
(`check_batches`).
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, describe_with_place, is_out_of_memory, require, suggest_name
from dual_lora.lab.evaluate.predict import PROBE_ROWS, classify_rows, cut_at_stop, generate_texts, score_choices
from dual_lora.lab.model.load import autocast_products, is_sharded, switch_mode
from dual_lora.lab.record.summary import format_seconds
from dual_lora.lab.system.distributed import (
    count_processes,
    gather_items,
    get_process_index,
    is_first_process,
    print_warning,
)
from dual_lora.lab.system.environment import hides_bars
from dual_lora.lab.system.memory import keep_freed_memory
from tasks import Split, Task
from tasks.base import Output, Row
from tasks.metrics import MissingScoreWarning

LINE_SECONDS = 60.0  # between two lines of progress in a log file
MIN_FOR_CONSTANT = 100  # with fewer rows, equal outputs may be an accident
PLACE = ("split", "id", "output")  # a prediction's own columns; runs are paired by the first two
NO_ANSWER = (None, "", [])  # 0 and False are answers


def evaluate_splits(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    splits: dict[str, Split],
    settings: Settings,
    title: str = "evaluate",
) -> tuple[dict[str, float], list[Row]]:
    """Return the task's scores (fractions) and one row per example: split, id, output, and how it was judged.

    Raises:
        UserError: a score is missing or not finite, or as `judge_rows`.
    """
    judged: dict[str, list[Row]] = {}
    predictions: list[Row] = []
    for name, split in splits.items():
        rows = list(split.rows)
        outputs = compute_outputs(model, tokenizer, task, rows, settings, title)
        likelihoods = None
        if task.choices(rows[0]):
            likelihoods = compute_outputs(
                model, tokenizer, task, rows, settings, f"{title}, likelihoods", score_choices
            )
        answers = [cut_at_stop(text, settings) for text in outputs] if task.form == "generation" else outputs
        judged[name] = judge_rows(task, rows, answers, likelihoods)
        for row, output, verdict in zip(rows, outputs, judged[name], strict=True):
            predictions.append({"split": name, "id": row["id"], "output": output, **verdict})
    scores = collect_scores(task, judged)
    for name, score in scores.items():
        if not math.isfinite(score):
            raise UserError(f"{title}: {name} is {score}; the outputs cannot be scored", undefined=True)
    return scores, predictions


def judge_rows(
    task: Task, rows: list[Row], outputs: list[Output], likelihoods: list[list[tuple[float, int]]] | None
) -> list[Row]:
    """Return the task's columns for each output, as JSON has them: numbers of NumPy become Python's. likelihoods: as
    `score_choices` returns them; None if the task ranks nothing.

    Raises:
        UserError: a column has the name of one of a prediction's own, or a value that JSON cannot represent.
    """
    judged = []
    for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        verdict, where = task.judge(row, output), f"task={task.name}: the judged row of {row['id']}"
        kind = type(verdict).__name__
        require(isinstance(verdict, dict), f"{where} is a {kind}; return a dictionary of columns from judge()")
        if likelihoods:
            verdict |= task.judge_choice(row, *map(list, zip(*likelihoods[number], strict=True)))
        taken = next((name for name in PLACE if name in verdict), None)
        require(taken is None, f"{where} has a column {taken!r}, which every prediction has; give it another name")
        judged.append(convert_to_json(verdict, where))
    return judged


def convert_to_json(value: Any, where: str) -> Any:
    """Return a value as JSON represents it, with Python's numbers in place of NumPy's. where: says whose value it is.

    Raises:
        UserError: JSON cannot represent it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}, which no record can hold; return None in its place", undefined=True)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [convert_to_json(part, where) for part in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: convert_to_json(part, f"{where}, column {name!r},") for name, part in value.items()}
    remedy = "return texts, numbers, and lists of them or dictionaries of them by name"
    raise UserError(f"{where} is a {type(value).__name__}, which no record can hold; {remedy}")


def collect_scores(task: Task, judged: dict[str, list[Row]]) -> dict[str, float]:
    """Return the task's scores of judged rows, by split, as Python's numbers; they may be NaN or infinite.

    Raises:
        UserError: a score is not a number or its name is not text, or the main one is not among them.
    """
    where, scores = f"task={task.name}: score() returns", task.score(judged)
    require(isinstance(scores, dict), f"{where} a {type(scores).__name__}; return a dictionary of numbers by name")
    found = {}
    for name, score in scores.items():
        require(isinstance(name, str), f"{where} a score named {name!r}, a {type(name).__name__}; name it by a text")
        try:
            found[name] = float(None if isinstance(score, str | bytes) else score)
        except (OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{where} a {type(score).__name__} for {name}; return a number") from error
    if task.metric not in found:
        known, close = ", ".join(found) or "nothing", suggest_name(task.metric, found)
        remedy = "set metric to one of them, or return it"
        raise UserError(f"{where} no {task.metric!r}, the task's metric, but {known}; {remedy}.{close}")
    return found


def check_scoring(task: Task, splits: dict[str, Split]) -> None:
    """Refuse a task whose scores or judged rows a record cannot hold. Targets stand in for outputs; a few rows suffice
    unless a score is undefined on them. Print any other error that the task raises on all rows: it may be one that only
    right answers cause, such as a division by the number of wrong ones.

    Raises:
        UserError: as `evaluate_splits`, but a score may be no number here: that of so few rows may be undefined.
    """
    for count in (PROBE_ROWS, None):
        try:
            with warnings.catch_warnings(action="ignore"):  # such as scikit-learn's of undefined scores
                judged = {name: judge_targets(task, split, count) for name, split in splits.items()}
                collect_scores(task, judged)
            return
        except UserError:
            if count is None:
                raise
        except Exception as error:  # of any kind: a task may fail on a few rows, or only on right answers
            if count is None:
                what = f"task={task.name}: scoring the targets as outputs fails ({describe_with_place(error)})"
                print_warning(f"{what}; unless only right answers do that, stop here and fix it")


def judge_targets(task: Task, split: Split, count: int | None) -> list[Row]:
    """Return how the first rows of a split are judged (None: all) if their targets are the outputs.

    Raises:
        UserError: as `judge_rows`.
    """
    rows = split.rows.select(range(min(count or len(split.rows), len(split.rows)))).to_list()
    outputs = [row["target" if task.form == "generation" else "label"] for row in rows]
    likelihoods = [[(-1.0, 1) for _ in task.choices(row)] for row in rows] if task.choices(rows[0]) else None
    return judge_rows(task, rows, outputs, likelihoods)


@contextmanager
def collect_missing_scores() -> Iterator[list[str]]:
    """Yield a list that holds afterwards which scores were not computed, and why. Warnings are still displayed."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MissingScoreWarning)
        yield found
    for warning in caught:
        found += [str(warning.message)] if issubclass(warning.category, MissingScoreWarning) else []
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def find_warnings(task: Task, predictions: list[Row]) -> list[str]:
    """Return a warning for each split in which all outputs are the same, or most texts are empty or hold no answer."""
    found = []
    for name in dict.fromkeys(row["split"] for row in predictions):
        rows = [row for row in predictions if row["split"] == name]
        if task.form != "generation":
            same = len(rows) >= MIN_FOR_CONSTANT and len({row["output"] for row in rows}) == 1
            found += [f"{name}: all {len(rows)} outputs are {rows[0]['output']}"] if same else []
            continue
        empty = sum(not row["output"].strip() for row in rows)
        unanswered = sum(row.get("answer", row["output"]) in NO_ANSWER for row in rows)
        if empty > len(rows) / 2:
            found.append(f"{name}: {empty} of {len(rows)} outputs are empty")
        elif unanswered > len(rows) / 2:
            found.append(f"{name}: {unanswered} of {len(rows)} outputs have no answer in them")
    return found


def compute_outputs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[Row],
    settings: Settings,
    title: str,
    predict: Callable | None = None,
) -> list[Output]:
    """Return the model's output for every row: a class index, a number or a text; or what `predict` returns."""
    keep_freed_memory()
    predict = predict or (generate_texts if task.form == "generation" else classify_rows)

    def predict_batch(rows: list[Row]) -> list[Output]:
        return predict(model, tokenizer, task, rows, settings)

    texts = [row["prompt"] if "prompt" in row else row["text"] + row["text_pair"] for row in rows]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    size = settings.eval.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    independent = not is_sharded(model)  # a sharded model needs all processes for every batch
    mine = batches[get_process_index() :: count_processes()] if independent else batches
    found: list[tuple[int, Output]] = []
    no_gradients = torch.inference_mode() if independent else torch.no_grad()  # training reuses the gathered weights
    with (
        switch_mode(model, training=False),
        no_gradients,
        autocast_products(model, settings, task.form),
        closing(show_progress(mine, title)) as shown,
    ):
        for batch in shown:
            found += zip(
                batch, split_until_fits(predict_batch, [rows[i] for i in batch], halve=independent), strict=True
            )
    output = dict(gather_items(found) if independent else found)
    return [output[i] for i in range(len(rows))]


def show_progress(batches: list[list[int]], title: str) -> Iterator[list[int]]:
    """Yield batches under a progress bar. If stderr is not a terminal (such as a log file), a line a minute is printed
    instead: a bar would become one endless line."""
    prints = not sys.stderr.isatty() and not hides_bars()  # as where several runs share the screen
    silent = not is_first_process() or not sys.stderr.isatty()
    began = printed = time.monotonic()
    with tqdm(batches, desc=title, unit="batch", leave=False, disable=silent) as bar:
        for number, batch in enumerate(bar):
            now = time.monotonic()
            if number and prints and is_first_process() and now - printed >= LINE_SECONDS:
                left = format_seconds((now - began) / number * (len(batches) - number))
                print(f"{title}: batch {number}/{len(batches)}, {left} left", file=sys.stderr, flush=True)
                printed = now
            yield batch


def split_until_fits(predict: Callable[[list[Row]], list[Output]], rows: list[Row], halve: bool) -> list[Output]:
    """Return what `predict` returns for the rows. If memory runs out and `halve` is set, the batch is split in two and
    retried: changing `eval.batch_size` would make it a different run and lose the training. Outputs may then differ by
    rounding, as with another batch size."""
    try:
        return predict(rows)
    except Exception as error:
        if not halve or len(rows) == 1 or not is_out_of_memory(error):
            raise
    middle = len(rows) // 2  # after the handler, where the error no longer keeps tensors alive
    return [made for part in (rows[:middle], rows[middle:]) for made in split_until_fits(predict, part, halve)]
