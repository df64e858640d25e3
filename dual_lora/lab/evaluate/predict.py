"""A model's output for a batch of rows: a class, a number, a text, or the likelihood of given texts."""

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
)

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.evaluate.beam_search import search_beams
from dual_lora.lab.evaluate.kv_cache import expand_cache, probe_prompts, read_prompts
from dual_lora.lab.model.encode import (
    build_sentence_encoder,
    check_choices,
    check_examples,
    check_prompts,
    count_longest,
    encode_choices,
    encode_prompts,
    encode_rows,
    get_position_limit,
)
from dual_lora.lab.model.load import agree_up_to_rounding, autocast_products, switch_mode, unwrap_adapter
from tasks import Task
from tasks.base import Row

if TYPE_CHECKING:
    from datasets import Dataset

STOP_CONTEXT = "x"  # the word before a string of `task.stop`
PROBE_ROWS = 8  # of `probe_padding`; of a few classes, the logits of one row may all be nearly 0


def encode_scored_rows(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    split: str,
    rows: "Dataset",
    settings: Settings,
) -> "Dataset | None":
    """Refuse rows that the model cannot be scored on, before hours of training. Return the inputs that classes or
    numbers are read from, as `encode_rows`; None where text is generated.

    Raises:
        UserError: a row has no tokens or needs more positions than the model has, or its chat template fails on it.
    """
    base = unwrap_adapter(model)
    if task.form != "generation":
        examples = encode_rows(rows, task, tokenizer, settings)
        check_examples(base, split, rows, examples, settings)
        return examples
    found = rows.to_list()
    prompts = encode_prompts(tokenizer, found, settings)
    check_prompts(base, split, found, prompts, settings)
    if task.choices(found[0]):
        check_choices(base, split, found, prompts, encode_choices(tokenizer, task, found), settings)
    return None


def classify_rows(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], settings: Settings
) -> list[int] | list[float]:
    """Return the index of each row's class, or, for regression, its number. Rows are truncated to `task.max_length`."""
    logits = compute_class_logits(model, tokenizer, encode_sentences(tokenizer, rows, settings)).float()
    check_finite(logits)
    return logits.squeeze(-1).tolist() if task.form == "regression" else logits.argmax(-1).tolist()


def encode_sentences(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], settings: Settings
) -> list[dict[str, list[int]]]:
    """Return the rows as model inputs, without labels or padding."""
    columns = build_sentence_encoder(tokenizer, settings)
    return [{k: v for k, v in columns(row).items() if k != "labels"} for row in rows]


def compute_class_logits(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, features: list[dict[str, list[int]]]
) -> torch.Tensor:
    """Return the logits of encoded rows, rows x classes, which are padded to the longest."""
    return model(**tokenizer.pad(features, return_tensors="pt").to(model.device)).logits


@torch.no_grad()
def probe_padding(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, features: list[dict[str, list[int]]]
) -> bool:
    """Return whether rows get the same logits in a padded batch as each by itself. The first tokens of encoded rows are
    tried, of each row two more than of the one before it."""
    texts = [
        {name: values[: 2 * count] for name, values in row.items()}
        for count, row in enumerate(islice(cycle(features), PROBE_ROWS), 1)
    ]
    with switch_mode(model, training=False):
        batched = compute_class_logits(model, tokenizer, texts)
        single = torch.cat([compute_class_logits(model, tokenizer, [text]) for text in texts])
    return agree_up_to_rounding(batched, single, model)


def check_batches(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], settings: Settings
) -> None:
    """Refuse a model whose output for a row depends on the other rows of its batch. A few rows suffice.

    Raises:
        UserError: with the model and its class.
    """
    trains = any(weight.requires_grad for weight in model.parameters())
    base, sizes = unwrap_adapter(model), {"train.batch_size": settings.train.batch_size} if trains else {}
    sizes |= {"eval.batch_size": settings.eval.batch_size}
    where = f"model={settings.model.name}: {type(base).__name__}"
    devices = [model.device] if model.device.type == "cuda" else []  # hashed attention draws random numbers
    with torch.random.fork_rng(devices), autocast_products(model, settings, task.form):
        if task.form == "generation":
            require(
                probe_prompts(base, tokenizer.pad_token_id) is not None,
                f"{where} does not read the prompts of a batch, through a key-value cache, as it reads each alone; "
                "take another model",
            )
        elif max(sizes.values()) > 1:
            require(
                probe_padding(model, tokenizer, encode_sentences(tokenizer, rows, settings)),
                f"{where} lets padding change its outputs, so they depend on the rows of a batch; take another model, "
                f"or {' and '.join(f'{name}=1' for name in sizes)}",
            )


def check_finite(scores: torch.Tensor) -> None:
    """Refuse a model's scores, ... x choices, whose maximum is NaN or infinite. Forbidden choices may be -inf.

    Raises:
        UserError: with a remedy; the run diverged.
    """
    if not scores.amax(-1).isfinite().all():
        message = "the model's outputs are NaN or Inf; take model.dtype=float32, a lower train.lr or other weights"
        raise UserError(message, diverged=True)


class FiniteScores(LogitsProcessor):
    """Refuses scores of a next token that are NaN or infinite."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_finite(scores)
        return scores


def generate_texts(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], settings: Settings
) -> list[str]:
    """Return the text after each prompt, decoded as the task's protocol says, without sampling. Prompts are never
    truncated."""
    prompts, protocol = encode_prompts(tokenizer, rows, settings), settings.task
    base = unwrap_adapter(model)
    inputs = read_prompts(base, prompts, tokenizer.pad_token_id, protocol.max_new_tokens)
    if protocol.num_beams > 1:
        inputs |= {"custom_generate": search_beams, "gpt2_beam": protocol.search == "gpt2_beam"}
    else:
        expand_cache(inputs["past_key_values"], 1, protocol.max_new_tokens + 1)
    start = inputs["input_ids"].shape[1]
    made = base.generate(**inputs, **get_decoding_options(tokenizer, settings, start))
    return tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)


class NoRepeatInOutput(LogitsProcessor):
    """Bans a token that would repeat an n-gram of the output, as LoRA's gpt2_beam.py does. transformers' own rule also
    bans the n-grams of the prompt, padding included, so that no name of n tokens could be copied from it."""

    def __init__(self, size: int, start: int) -> None:
        self.rule, self.start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.rule(input_ids[:, self.start :], scores)


def get_decoding_options(tokenizer: PreTrainedTokenizerBase, settings: Settings, start: int) -> dict[str, Any]:
    """Return the protocol's way of decoding, as `generate` takes it. start: the prompts' length with padding."""
    size = settings.task.no_repeat_ngram
    rules = [FiniteScores(), *([NoRepeatInOutput(size, start)] if size else [])]
    return {
        "generation_config": build_generation_config(tokenizer, settings),
        "logits_processor": LogitsProcessorList(rules),
        "synced_gpus": False,
    }


def build_generation_config(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> GenerationConfig:
    """Return the decoding settings of the task's protocol only; a model folder's generation_config.json is ignored."""
    protocol = settings.task
    stops = [ids[0] for text in protocol.stop for ids in encode_stop(tokenizer, text) if len(ids) == 1]
    return GenerationConfig(
        max_new_tokens=protocol.max_new_tokens,
        num_beams=protocol.num_beams,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(dict.fromkeys([tokenizer.eos_token_id, *stops])),
        pad_token_id=tokenizer.pad_token_id,
        **({"length_penalty": protocol.length_penalty} if protocol.num_beams > 1 else {}),
    )


def encode_stop(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a string at the start of a text, and behind a word, where an output has it. With
    SentencePiece they differ: at the start of a text the first token includes a blank."""
    word, start, behind = tokenizer([STOP_CONTEXT, text, STOP_CONTEXT + text], add_special_tokens=False)["input_ids"]
    return start, behind[len(word) :] if behind[: len(word)] == word else start


def describe_idle_stops(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    """Return a warning for every string of `task.stop` that is no single token of this tokenizer in an output."""
    lengths = {text: len(encode_stop(tokenizer, text)[1]) for text in settings.task.stop}
    cut = "tokens here: outputs are cut there, but only after they are generated in full"
    return [f"task.stop: {text!r} is {count} {cut}" for text, count in lengths.items() if count != 1]


def cut_at_stop(output: str, settings: Settings) -> str:
    """Return the part of an output that is judged: up to the first string of `task.stop` in it."""
    return min((output.partition(text)[0] for text in settings.task.stop if text), key=len, default=output)


def score_choices(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, rows: list[Row], settings: Settings
) -> list[list[tuple[float, int]]]:
    """Return, for each row and each of its `task.choices`, the choice's log-likelihood given the prompt (nats, summed
    over its tokens) and its number of tokens. A batch whose longest prompt and longest choice are of different rows,
    and together longer than the model has positions for, is scored in parts."""
    prompts, choices = encode_prompts(tokenizer, rows, settings), encode_choices(tokenizer, task, rows)
    many, longest = max(map(len, choices)), max(count_longest(choices))
    base = unwrap_adapter(model)
    limit = get_position_limit(base)
    if limit is not None and len(rows) > 1 and max(map(len, prompts)) + longest > limit:
        middle = len(rows) // 2
        parts = (rows[:middle], rows[middle:])
        return [found for part in parts for found in score_choices(model, tokenizer, task, part, settings)]
    inputs = read_prompts(base, prompts, tokenizer.pad_token_id, longest)
    expand_cache(inputs["past_key_values"], many, longest + 1)
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
    check_finite(found)
    return [
        [(score, len(ids)) for score, ids in zip(scores, options, strict=False)]
        for scores, options in zip(found.tolist(), choices, strict=True)
    ]
