"""Base models and tokenizers, from a folder or from the hub; safetensors only, no code from the model's repository."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dual_lora.lab import hub, nf4, runs
from dual_lora.lab.settings import Model, Settings, UserError, first_line, require
from tasks import Task

# What transformers' errors mean here, by a word in them.
REASONS = {
    "trust_remote_code": "it wants code of its own to be run, which is never done",
    "ignore_mismatched_sizes": "its weights have other shapes than its config.json asks for",
}
NO_CODE = {"trust_remote_code": False}  # given outright: transformers would ask the terminal


def place(settings: Settings) -> dict[str, str | bool | None]:
    """Return where `from_pretrained` finds the model: a folder, or a hub id with its revision."""
    folder = runs.model_folder(settings)
    if folder:
        return {"pretrained_model_name_or_path": str(folder), **NO_CODE}
    hub.settle(models=True)
    return {"pretrained_model_name_or_path": settings.model.hub, "revision": settings.model.revision, **NO_CODE}


@contextmanager
def readable(what: str, mend: str) -> Iterator[None]:
    """Turn whatever the libraries raise over files that somebody else wrote into one line."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = next((reason for word, reason in REASONS.items() if word in str(error)), first_line(error))
        raise UserError(f"{what} ({reason[:300]}); {mend}") from error


def told(settings: Settings) -> AbstractContextManager[None]:
    """Turn a failure to find, fetch or read a model into one line."""
    where = place(settings)["pretrained_model_name_or_path"]
    return readable(f"model={settings.model.name}: cannot load {where}", "give model.path=DIR, a whole saved model")


def load(settings: Settings, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model with the head the task's form needs, and its tokenizer.

    Raises:
        UserError: the model is neither at `model.path` nor to be had from the hub.
    """
    settings.hardware.check_installed()
    tokenizer = load_tokenizer(settings)
    how = {"dtype": getattr(torch, settings.model.dtype), **head_options(task), **nf4.options(settings)}
    with told(settings):
        model, found = head_class(task).from_pretrained(
            **place(settings), **how, use_safetensors=True, output_loading_info=True
        )
    nf4.keep_as_loaded(model)
    fresh = {"classifier", "score", *settings.model.head}
    lacking = sorted(name for name in found["missing_keys"] if not fresh & set(name.split(".")))
    require(
        not lacking,
        f"model={settings.model.name}: its weights lack {len(lacking)} that its config.json asks for, first "
        f"{lacking[:1]}; they are another model's",
    )
    known, asked = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    require(
        asked < known, f"model={settings.model.name}: its tokenizer goes to {asked}, the model knows {known} tokens"
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_plain(settings: Settings, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return as `load`, but of a base in 4 bits a plain model with the values these stand for, in float32.

    Raises:
        UserError: as `load`.
    """
    model, tokenizer = load(settings, task)
    if settings.hardware.base is None:
        return model, tokenizer
    plain, _ = load(replace(settings, hardware=replace(settings.hardware, base=None)), task)
    nf4.copy_values(model, plain.float())
    return plain, tokenizer


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; one without a padding token pads with the end of text (masked everywhere)."""
    with told(settings):
        tokenizer = AutoTokenizer.from_pretrained(**place(settings))
    bare = len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids))  # transformers makes one up
    require(not bare, f"model={settings.model.name}: no tokenizer beside the model; save it into the same folder")
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
