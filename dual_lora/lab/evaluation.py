"""Outputs of a model on a task's evaluation splits, judged and scored by the task.

The outputs do not depend on the batch size: rows are padded on the side the model expects with the attention mask set,
and put back into their own order.
"""

import math
from collections.abc import Callable

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dual_lora.lab import beam_search, cache, data, hub, models, processes
from dual_lora.lab.faults import out_of_memory
from dual_lora.lab.memory import keep_freed
from dual_lora.lab.runs import told
from dual_lora.lab.settings import Settings, UserError, require
from tasks import Split, Task
from tasks.base import Output, Row

# Which training rows `eval.holdout` sets apart.
HOLDOUT_SEED = 2512


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    splits: dict[str, Split],
    settings: Settings,
    title: str = "evaluate",
) -> tuple[dict[str, float], list[Row]]:
    """Return the task's scores (fractions) and one row an example: split, id, output, and how it was judged."""
    judged: dict[str, list[Row]] = {}
    predictions: list[Row] = []
    for name, split in splits.items():
        rows = split.rows
        given = outputs(model, tokenizer, task, list(rows), settings, title)
        judged[name] = [task.judge(row, output) for row, output in zip(rows, given, strict=True)]
        if task.choices(rows[0]):
            ranked = outputs(model, tokenizer, task, list(rows), settings, f"{title}, likelihoods", likelihoods)
            for verdict, row, found in zip(judged[name], rows, ranked, strict=True):
                verdict |= task.judge_choice(row, *map(list, zip(*found, strict=True)))
        for row, output, verdict in zip(rows, given, judged[name], strict=True):
            predictions.append({"split": name, "id": row["id"], "output": output, **verdict})
    scores = task.score(judged)
    for name, score in scores.items():
        require(math.isfinite(score), f"{title}: {name} is {score}; the outputs cannot be scored")
    return scores, predictions


def warnings(task: Task, predictions: list[Row]) -> list[str]:
    """Return what is wrong with most of a split's texts: they are empty, or hold no answer."""
    found = []
    for name in dict.fromkeys(row["split"] for row in predictions) if task.form == "generation" else ():
        rows = [row for row in predictions if row["split"] == name]
        empty = sum(not row["output"].strip() for row in rows)
        mute = sum(not row.get("answer", row["output"]) for row in rows)
        if empty > len(rows) / 2:
            found.append(f"{name}: {empty} of {len(rows)} outputs are empty")
        elif mute > len(rows) / 2:
            found.append(f"{name}: {mute} of {len(rows)} outputs have no answer in them")
    return found


def outputs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[Row],
    settings: Settings,
    title: str,
    ask: Callable | None = None,
) -> list[Output]:
    """Return the model's output for every row: a class index, a number or a text; or what `ask` asks for."""
    keep_freed()
    training = model.training
    model.eval()
    ask = ask or (generate if task.form == "generation" else classify)

    def asked(rows: list[Row]) -> list[Output]:
        return ask(model, tokenizer, task, rows, settings)

    texts = [row.get("prompt") or row["text"] + row["text_pair"] for row in rows]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    size = settings.eval.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    alone = not models.sharded(model)  # else the processes need each other's weights and do every batch together
    mine = batches[processes.rank() :: processes.number()] if alone else batches
    found: list[tuple[int, Output]] = []
    bar = tqdm(mine, desc=title, unit="batch", leave=False, disable=not processes.first())
    no_gradients = torch.inference_mode() if alone else torch.no_grad()  # gathered weights serve training later
    with bar, no_gradients, models.autocast(model, settings, task):
        for batch in bar:
            found += zip(batch, within_memory(asked, [rows[i] for i in batch], halve=alone), strict=True)
    for module in () if alone else model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # training must gather again, with gradients
    model.train(training)
    output = dict(processes.collect(found) if alone else found)
    return [output[i] for i in range(len(rows))]


def within_memory(ask: Callable[[list[Row]], list[Output]], rows: list[Row], halve: bool) -> list[Output]:
    """Return what `ask` makes of the rows, of half of them at a time where memory does not suffice for all (`halve`): a
    smaller `eval.batch_size` would be another run, and its training lost."""
    try:
        return ask(rows)
    except Exception as error:
        if not halve or len(rows) == 1 or not out_of_memory(error):
            raise
    middle = len(rows) // 2  # behind the handler, where the error no longer holds what was computed
    return [made for part in (rows[:middle], rows[middle:]) for made in within_memory(ask, part, halve)]


def classify(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], settings: Settings
) -> list[int] | list[float]:
    columns = data.sentences(tokenizer, settings)
    features = [{k: v for k, v in columns(row).items() if k != "labels"} for row in rows]
    batch = tokenizer.pad(features, return_tensors="pt").to(model.device)
    logits = model(**batch).logits.float()
    check(logits)
    return logits.squeeze(-1).tolist() if task.form == "regression" else logits.argmax(-1).tolist()


def check(scores: torch.Tensor) -> None:
    """Refuse a model's scores, ... x choices, whose best is no number; some of them may be forbidden (-inf)."""
    if not scores.amax(-1).isfinite().all():
        said = "the model's outputs are no numbers; take model.dtype=float32, a lower train.lr or other weights"
        raise UserError(said, diverged=True)


class Numbers(LogitsProcessor):
    """Refuses scores of a next token that are no numbers."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check(scores)
        return scores


def generate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], settings: Settings
) -> list[str]:
    """Return the text after each prompt, which is never cut, decoded as the task's protocol says (without sampling)."""
    prompts = [data.prompt_ids(tokenizer, row, settings) for row in rows]
    protocol = settings.task
    data.check_room(model, max(map(len, prompts)) + protocol.max_new_tokens, settings)
    base = plain(model)
    inputs = cache.read(base, prompts, tokenizer.pad_token_id)
    if protocol.num_beams > 1:
        inputs["custom_generate"] = beam_search.search
    else:
        cache.expand(inputs["past_key_values"], 1, protocol.max_new_tokens + 1)
    start = inputs["input_ids"].shape[1]
    made = base.generate(**inputs, **decoding(tokenizer, settings, start))
    return tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)


class NoRepeat(LogitsProcessor):
    """Bans a token that would repeat an n-gram of the output, as LoRA's gpt2_beam.py does. transformers' own rule bans
    those of the prompt, too, padding included, so that no name of n tokens could be copied from it."""

    def __init__(self, size: int, start: int) -> None:
        self.rule, self.start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.rule(input_ids[:, self.start :], scores)


def decoding(tokenizer: PreTrainedTokenizerBase, settings: Settings, start: int) -> dict:
    """Return the protocol's way of decoding, as `generate` takes it. start: the prompts' length with padding."""
    protocol = settings.task
    ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in protocol.stop]
    repeats = [NoRepeat(protocol.no_repeat_ngram, start)] if protocol.no_repeat_ngram else []
    return {
        "max_new_tokens": protocol.max_new_tokens,
        "num_beams": protocol.num_beams,
        "do_sample": False,
        "use_cache": True,
        "synced_gpus": False,
        "eos_token_id": [tokenizer.eos_token_id, *(ids[0] for ids in ends if len(ids) == 1)],
        "pad_token_id": tokenizer.pad_token_id,
        "logits_processor": [Numbers(), *repeats],
        **({"length_penalty": protocol.length_penalty} if protocol.num_beams > 1 else {}),
    }


def likelihoods(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], settings: Settings
) -> list[list[tuple[float, int]]]:
    """Return the log-likelihood of each of `task.choices` after a row's prompt, summed over its tokens, and how many
    these are."""
    prompts = [data.prompt_ids(tokenizer, row, settings) for row in rows]
    choices = [tokenizer(task.choices(row), add_special_tokens=False)["input_ids"] for row in rows]
    many, longest = max(map(len, choices)), max(len(ids) for options in choices for ids in options)
    data.check_room(model, max(map(len, prompts)) + longest, settings)
    base = plain(model)
    inputs = cache.read(base, prompts, tokenizer.pad_token_id)
    cache.expand(inputs["past_key_values"], many, longest + 1)
    texts = [ids for options in choices for ids in (options + options[:1] * many)[:many]]
    ids = torch.tensor([text + [tokenizer.pad_token_id] * (longest - len(text)) for text in texts], device=base.device)
    real = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=base.device)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(many, 0), real], 1)
    last = inputs["input_ids"][:, -1:].repeat_interleave(many, 0)
    logits = base(
        input_ids=torch.cat([last, ids], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1)[:, -longest - 1 :],
        past_key_values=inputs["past_key_values"],
        use_cache=True,
    ).logits[:, :-1]
    found = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0].mul(real).sum(-1).view(-1, many)
    check(found)
    return [
        [(score, len(ids)) for score, ids in zip(scores, options, strict=False)]
        for scores, options in zip(found.tolist(), choices, strict=True)
    ]


def plain(model: torch.nn.Module) -> PreTrainedModel:
    """Return the model without PEFT's wrapper, its adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_split(task: Task, name: str, settings: Settings) -> Split:
    """Return a split. Where a number of rows is set, training takes a sample drawn with the run's seed and evaluation
    the first rows, the same for every run.

    Raises:
        UserError: the data is missing, damaged, cannot be fetched, or too little to set rows of it apart.
    """
    split, train = read_split(task, name, settings), name == "train"
    if train and settings.eval.holdout:
        split = set_apart(split, settings.eval.holdout)[0]
    limit = (settings.train if train else settings.eval).max_examples
    if limit is None or limit >= len(split.rows):
        return split
    rows = split.rows.shuffle(seed=settings.seed) if train else split.rows
    return Split(rows.select(range(limit)), split.origin)


def load_scored(task: Task, settings: Settings) -> dict[str, Split]:
    """Return the rows a run is evaluated on, by split: the task's own, or training rows set apart.

    Raises:
        UserError: as `load_split`.
    """
    if not settings.eval.holdout:
        with told():
            names = task.eval_splits  # of a task on the user's own files, told by what is there
        return {name: load_split(task, name, settings) for name in names}
    apart = set_apart(read_split(task, "train", settings), settings.eval.holdout)[1]
    limit = min(len(apart.rows), settings.eval.max_examples or len(apart.rows))
    return {task.eval_splits[0]: Split(apart.rows.select(range(limit)), apart.origin)}


def set_apart(train: Split, number: int) -> tuple[Split, Split]:
    """Return the training rows without `number` of them, and these, the same for every run."""
    rows = train.rows
    require(number < len(rows), f"eval.holdout={number}: {train.origin} has {len(rows)} rows; set fewer apart")
    mixed = rows.shuffle(seed=HOLDOUT_SEED)
    rest, apart = mixed.select(range(number, len(rows))), mixed.select(range(number))
    return Split(rest, train.origin), Split(apart, f"{train.origin} (set apart)")


def read_split(task: Task, name: str, settings: Settings) -> Split:
    """Return a whole split of the task.

    Raises:
        UserError: the data is missing, damaged or cannot be fetched.
    """
    if settings.data_dir is None and "hub" in task.source():
        hub.settle(data=True)
    with models.readable(f"task={task.name}: cannot load its {name} split", "give data_dir=DIR"), told():
        return task.split(name, settings.data_dir)
