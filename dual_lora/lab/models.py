"""Base models and tokenizers, from a folder or from the hub; safetensors only, no code from the model's repository."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dual_lora.lab import runs
from dual_lora.lab.settings import Model, Settings, UserError
from tasks import Task


def place(settings: Settings) -> dict[str, str | None]:
    """Return where `from_pretrained` finds the model: a folder, or a hub id with its revision."""
    folder = runs.model_folder(settings)
    if folder:
        return {"pretrained_model_name_or_path": str(folder)}
    return {"pretrained_model_name_or_path": settings.model.hub, "revision": settings.model.revision}


@contextmanager
def told(settings: Settings) -> Iterator[None]:
    """Turn a failure to find or fetch a model into one line."""
    try:
        yield
    except (OSError, HfHubHTTPError) as error:
        where = place(settings)["pretrained_model_name_or_path"]
        reason = str(error).splitlines()[0]
        raise UserError(f"model={settings.model.name}: cannot load {where} ({reason}); give model.path=DIR") from error


def load(settings: Settings, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model with the head the task's form needs, and its tokenizer.

    Raises:
        UserError: the model is neither at `model.path` nor to be had from the hub.
    """
    tokenizer = load_tokenizer(settings)
    dtype = getattr(torch, settings.model.dtype)
    with told(settings):
        model = head_class(task).from_pretrained(
            **place(settings), **head_options(task), dtype=dtype, use_safetensors=True
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; one without a padding token pads with the end of text (masked everywhere)."""
    with told(settings):
        tokenizer = AutoTokenizer.from_pretrained(**place(settings))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def head_class(task: Task) -> type:
    return AutoModelForCausalLM if task.form == "generation" else AutoModelForSequenceClassification


def head_options(task: Task) -> dict:
    if task.form == "classification":
        return {
            "num_labels": len(task.labels),
            "id2label": dict(enumerate(task.labels)),
            "label2id": {label: i for i, label in enumerate(task.labels)},
        }
    return {"num_labels": 1, "problem_type": "regression"} if task.form == "regression" else {}


def target_pattern(model: Model) -> str:
    """Return the regular expression of the module names that `model.adapt` chooses, for PEFT's `target_modules`."""
    ends = sorted({model.roles[role] for role in model.adapt})
    return rf"(?:.*\.)?(?:{'|'.join(ends)})"
