"""From a task's rows to tensors: tokenized examples and the collators that pad a batch."""

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require, translate_read_errors
from dual_lora.lab.system.distributed import print_warning
from tasks import Task
from tasks.base import Row

if TYPE_CHECKING:  # a plan needs no rows
    from datasets import Dataset

IGNORED_LABEL = -100  # label of a token without loss
# The present, as chat templates see it: outputs must not depend on the day. LLaMA 3's names this date without a clock.
TEMPLATE_DATE = datetime(2024, 7, 26)


def encode_rows(rows: "Dataset", task: Task, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> "Dataset":
    """Return the rows as model inputs with labels, truncated to `task.max_length` tokens.

    Raises:
        UserError: a row has no tokens, or nothing that is trained on is left of its target, or of that of any row.
    """
    from datasets import Dataset

    columns = (
        build_generation_encoder(tokenizer, settings)
        if task.form == "generation"
        else build_sentence_encoder(tokenizer, settings)
    )
    listed = rows.to_list()
    examples = [columns(row) for row in listed]
    if task.form == "generation" and settings.task.loss_on_prompt:
        check_targets(listed, examples, tokenizer, settings)
    return Dataset.from_list(examples)


def check_targets(
    rows: list[Row], examples: list[dict], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> None:
    """Print a warning if prompts fill `task.max_length`, so that nothing of their targets is trained on. examples: the
    rows as `encode_rows` returns them.

    Raises:
        UserError: all prompts do.
    """
    limit = settings.task.max_length
    full = [row for row, example in zip(rows, examples, strict=True) if len(example["input_ids"]) == limit]
    lost = sum(len(encode_prompt(tokenizer, row, settings)) >= limit for row in full)
    filled = f"task.max_length={limit}: {lost:,} of {len(rows):,} prompts fill it"
    said = f"{filled}, so nothing of their targets is trained on; raise it"
    require(lost < len(rows), said)
    if lost:
        print_warning(said)


def check_examples(
    model: PreTrainedModel, split: str, rows: "Dataset", examples: "Dataset", settings: Settings
) -> None:
    """Refuse rows, which `encode_rows` made `examples`, that are longer than the model has positions for. split: how
    the message calls them.

    Raises:
        UserError: with the longest row and the model's limit.
    """
    lengths, limit = [len(ids) for ids in examples["input_ids"]], get_position_limit(model)
    longest = max(lengths)
    if limit is not None and longest > limit:
        raise UserError(
            f"task.max_length={settings.task.max_length}: {describe_position_limit(model, settings)}, and "
            f"{rows[lengths.index(longest)]['id']} of {split} has {longest}; take task.max_length={limit} or less, or "
            "another model"
        )


def check_prompts(
    model: PreTrainedModel, split: str, rows: list[Row], prompts: list[list[int]], settings: Settings
) -> None:
    """Refuse prompts without any token, and those after which the model has no positions for `task.max_new_tokens`.

    Raises:
        UserError: with the first empty row, or with that of the longest prompt and the model's limit.
    """
    for row, ids in zip(rows, prompts, strict=True):
        where = f"task={settings.task.name}: the prompt of {row['id']} of {split} is empty"
        require(bool(ids), f"{where}, and {settings.model.name} adds no special tokens; remove the row")
    limit, new = get_position_limit(model), settings.task.max_new_tokens
    tokens, row = max(((len(ids), row) for ids, row in zip(prompts, rows, strict=True)), key=lambda pair: pair[0])
    if limit is not None and tokens + new > limit:
        takes = describe_position_limit(model, settings)
        what = f"task.max_new_tokens={new}: {takes}, and the prompt of {row['id']} of {split}"
        many = sum(len(ids) + new > limit for ids in prompts)
        fewer = f"take task.max_new_tokens={limit - tokens} or less, " if tokens < limit else ""
        raise UserError(f"{what} alone has {tokens}; {fewer}remove {count_such_rows(many)}, or take another model")


def check_choices(
    model: PreTrainedModel,
    split: str,
    rows: list[Row],
    prompts: list[list[int]],
    choices: list[list[list[int]]],
    settings: Settings,
) -> None:
    """Refuse rows whose prompt and longest choice together are longer than the model has positions for.

    Raises:
        UserError: with the longest of these rows, and the model's limit.
    """
    limit, lengths = get_position_limit(model), count_longest(choices)
    totals = [len(ids) + length for ids, length in zip(prompts, lengths, strict=True)]
    longest = max(totals)
    if limit is not None and longest > limit:
        place = totals.index(longest)
        what = f"{describe_position_limit(model, settings)}, and {rows[place]['id']} of {split} has {longest}"
        parts = f"{len(prompts[place])} of the prompt and {lengths[place]} of a text whose likelihood is scored"
        many = sum(total > limit for total in totals)
        without = "take task.options.loss=false, " if settings.task.options.get("loss") else ""
        remedy = f"{without}remove {count_such_rows(many)}, or take another model"
        raise UserError(f"task={settings.task.name}: {what}, {parts}; {remedy}")


def count_such_rows(many: int) -> str:
    """Return how a message names the rows that are too long, of which it has named one."""
    return "the row" if many == 1 else f"the {many:,} such rows"


def count_longest(choices: list[list[list[int]]]) -> list[int]:
    """Return the number of tokens of each row's longest choice."""
    return [max(map(len, options)) for options in choices]


def get_position_limit(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has positions for; None if there is no such limit, which XLNet calls -1. In
    RoBERTa, positions start after the padding index. Under longrope it is how many a row may have in a batch."""
    config = model.config.get_text_config()
    limit, long = getattr(config, "max_position_embeddings", None), find_longrope_limit(model)
    if limit is None or limit < 1:
        return long
    places = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(places, "padding_idx", None)
    limit -= 0 if padding is None else padding + 1
    return limit if long is None else min(limit, long)


def find_longrope_limit(model: PreTrainedModel) -> int | None:
    """Return how many tokens a row may have if the model's rotary positions are of the kind longrope; None for other
    kinds. With a longer row in a batch, transformers changes the positions of all its rows."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    parts = [found, *found.values()]  # one for all layers, or one for each type of layer
    long = [part for part in parts if isinstance(part, dict) and part.get("rope_type") == "longrope"]
    return min((part["original_max_position_embeddings"] for part in long), default=None)


def describe_position_limit(model: PreTrainedModel, settings: Settings) -> str:
    """Return how many tokens a model takes, as messages say it, with the reason if it has positions for more."""
    limit = get_position_limit(model)
    why = (
        " (longrope: a longer row would change the others of its batch)" if limit == find_longrope_limit(model) else ""
    )
    return f"{settings.model.name} takes {limit} tokens{why}"


def build_sentence_encoder(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Callable[[Row], dict]:
    """Return the encoder of a sentence or a pair of them, with its label.

    The encoder raises UserError for a row without any token.
    """

    def encode_row(row: Row) -> dict:
        found = tokenizer(*list_texts(row), truncation=True, max_length=settings.task.max_length)
        where = f"task={settings.task.name}: {row['id']} is empty"
        require(found["input_ids"], f"{where}, and {settings.model.name} adds no special tokens; remove the row")
        return {**found, "labels": row["label"]}

    return encode_row


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row, settings: Settings) -> list[int]:
    """Return a row's prompt as token ids, see `encode_prompts`.

    Raises:
        UserError: the template fails on the row.
    """
    return encode_prompts(tokenizer, [row], settings)[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, rows: list[Row], settings: Settings) -> list[list[int]]:
    """Return the rows' prompts as token ids, with the special tokens that the model expects in front but without an
    added end of text. With model.chat, a row's messages (or the prompt as a user turn) go through the tokenizer's chat
    template, which adds the special tokens itself.

    Raises:
        UserError: the template fails on a row.
    """
    if settings.model.chat:
        texts = [format_chat(tokenizer, row, settings) for row in rows]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts, end = [row["prompt"] for row in rows], tokenizer.eos_token_id
    return [
        ids[:-1] if ids and ids[-1] == end and not prompt.endswith(tokenizer.eos_token) else ids
        for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True)
    ]


def encode_choices(tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row]) -> list[list[list[int]]]:
    """Return the token ids of each row's `task.choices`. A text that rows share is encoded once."""
    choices = [task.choices(row) for row in rows]
    texts = list(dict.fromkeys(text for options in choices for text in options))
    known = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    return [[known[text] for text in options] for options in choices]


def format_chat(tokenizer: PreTrainedTokenizerBase, row: Row, settings: Settings) -> str:
    """Return what a model reads before it answers a row's messages, or its prompt as a user turn.

    Raises:
        UserError: the template fails on them; many take no system turn, or no two turns of one role in a row.
    """
    fails = f"model.chat=true: {settings.model.name}'s chat template fails on {row['id']} of {settings.task.name}"
    with translate_read_errors(fails, "change the row, or take model.chat=false"):
        return apply_chat_template(tokenizer, row.get("messages") or [{"role": "user", "content": row["prompt"]}])


def check_chats(tokenizer: PreTrainedTokenizerBase, rows: "Dataset", settings: Settings) -> None:
    """Refuse rows that the chat template fails on. It is tried on the first row of every order of roles, which is what
    templates refuse; what else they fail on is found when a row is encoded.

    Raises:
        UserError: with the first such row.
    """
    orders: dict[tuple[str, ...], Row] = {}
    for row in rows.to_list():
        orders.setdefault(tuple(message["role"] for message in row.get("messages") or ()), row)
    for row in orders.values():
        format_chat(tokenizer, row, settings)


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Return what a model reads before it answers `messages`, each a role and a content; on any day the same.

    Whatever a template raises passes, also that it draws at random.
    """
    fix_template_functions(tokenizer.get_chat_template())
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def fix_template_functions(template: str) -> None:
    """Stop the clock that transformers gives a chat template, and take from it what draws at random. Arguments of
    `apply_chat_template` cannot do it: transformers makes text of functions among them."""
    environment = _compile_jinja_template(template).environment  # cached: transformers renders with the same
    environment.globals.update(strftime_now=TEMPLATE_DATE.strftime, lipsum=refuse_chance)
    environment.filters["random"] = refuse_chance


def refuse_chance(*values: Any, **options: Any) -> NoReturn:
    """Stand in for a function of templates that draws at random.

    Raises:
        ValueError: always.
    """
    raise ValueError("it draws at random")


def build_generation_encoder(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Callable[[Row], dict]:
    """Return the encoder of prompt, target and end of text; the prompt carries loss only if the task says so.

    The encoder raises UserError for a row without any loss, since it is too long, or on which the chat template fails.
    """

    def encode_row(row: Row) -> dict:
        prompt = encode_prompt(tokenizer, row, settings)
        target = tokenizer(row["target"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (prompt + target)[: settings.task.max_length]
        labels = (prompt if settings.task.loss_on_prompt else [IGNORED_LABEL] * len(prompt)) + target
        require(
            any(label != IGNORED_LABEL for label in labels[: len(ids)]),
            f"task.max_length={settings.task.max_length}: the prompt of {row['id']} is {len(prompt)} tokens, so "
            "nothing of its target is trained on; raise it",
        )
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels[: len(ids)]}

    return encode_row


def count_cut_rows(
    rows: "Dataset", examples: "Dataset", task: Task, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> int:
    """Return how many of the rows, which `encode_rows` made `examples`, are cut at `task.max_length`."""
    if task.form == "generation":
        return sum(ids[-1] != tokenizer.eos_token_id for ids in examples["input_ids"])
    limit = settings.task.max_length
    full = [rows[i] for i, ids in enumerate(examples["input_ids"]) if len(ids) >= limit]
    return sum(len(tokenizer(*list_texts(row), verbose=False)["input_ids"]) > limit for row in full)


def list_texts(row: Row) -> tuple[str, ...]:
    """Return a row's text, and the second one of a pair."""
    return (row["text"], row["text_pair"]) if row["text_pair"] else (row["text"],)


def build_collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """Return the function that pads a batch to its longest example."""
    if task.form == "generation":
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)
    return DataCollatorWithPadding(tokenizer)
