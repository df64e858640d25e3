"""What a finished run trained, loaded from its record, and its evaluation again."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, set_seed

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, require, translate_memory_errors, translate_read_errors
from dual_lora.lab.evaluate.evaluate import evaluate_splits
from dual_lora.lab.evaluate.predict import PROBE_ROWS, check_batches
from dual_lora.lab.inputs.splits import load_scored_splits
from dual_lora.lab.model.load import (
    cast_trained_to_float32,
    is_sharded,
    load_dequantized_model,
    load_model,
    load_tuned_model,
    move_to_device,
)
from dual_lora.lab.model.merge import merge_adapter
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.record import RERUN_REMEDY, Record
from dual_lora.lab.record.summary import format_comparison
from dual_lora.lab.system.distributed import join_processes, print_warning, share_from_first
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.system.memory import suggest_fewer_rows
from tasks import Split, Task


def load_recorded_splits(settings: Settings, record: Record, stored: dict[str, Any], task: Task) -> dict[str, Split]:
    """Return the splits that a finished run was scored on. stored: its result.

    Raises:
        UserError: they are not the rows that the run was scored on, or the task has changed since.
    """
    require(
        stored.get("task_version") in (task.version, None),
        f"run={record.format_path()}: done with version {stored.get('task_version')} of {task.name}, which is now "
        f"version {task.version}; its scores cannot be reproduced",
    )
    splits = load_scored_splits(task, settings)
    for name, split in splits.items():
        is_same = split.describe()["sha256"] == stored["data"].get(name, {}).get("sha256")
        require(
            is_same, f"{split.origin}: not the {name} rows this run was evaluated on; give their folder as data_dir=DIR"
        )
    return splits


def load_trained_model(
    settings: Settings, record: Record, task: Task, plain: bool = False
) -> tuple[torch.nn.Module, object]:
    """Return the model as it was when the run ended, and its tokenizer. plain: see `load_dequantized_model`.

    Seeds are set as for training, because what no file holds is recomputed: a head that did not train, and the initial
    decomposition of a method that changes the base weights (PiSSA).

    Raises:
        UserError: the base model or what was trained cannot be loaded, or is changed since the run.
    """
    record.verify_files("config.yaml", "environment.json")  # the latter says with which model files
    record.verify_model_files(settings)
    tuned = settings.method.peft is None
    load = load_dequantized_model if plain else load_model
    set_seed(settings.seed)
    base, tokenizer = (None, load_tokenizer(settings)) if tuned else load(settings, task)
    file = record.get_weights_file(settings)
    folder = file.parent
    # Large weights are in parts, with an index.
    has_weights = file.is_file() or (folder / f"{file.name}.index.json").is_file()
    require(has_weights, f"{folder}: cannot be loaded (no {file.name}, the only format that is read); {RERUN_REMEDY}")
    with translate_read_errors(f"{folder}: cannot be loaded", RERUN_REMEDY):
        set_seed(settings.seed)
        model = load_tuned_model(folder, settings, task, tokenizer) if tuned else load_trained_adapter(base, folder)
    record.verify_files(folder.name)
    return model, tokenizer


def load_trained_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Return a base model with the adapter that training saved in a folder, all of it frozen, in the dtypes it trained
    in."""
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)  # else PEFT does not say what trained
    cast_trained_to_float32(model)
    if model.mixes_dtypes:  # what was loaded was rounded to 16 bits
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    return model.requires_grad_(False).eval()


def reevaluate_run(settings: Settings, record: Record) -> int:
    """Evaluate a run again and print the scores next to the recorded ones, also into evaluation.json. Return 0 if every
    digit is equal, else 1. Print a warning where the scores depend on the rows of a batch: training refuses such a
    model today, but did not always.

    Raises:
        UserError: the run is not finished, cannot be loaded, or the rows are not those it was evaluated on.
    """
    stored = record.require_result(f"run={record.format_path()}")
    silence_libraries()
    join_processes()
    task = load_task(settings)
    splits = load_recorded_splits(settings, record, stored, task)
    model, tokenizer = load_trained_model(settings, record, task)
    move_to_device(model)
    if stored.get("merged"):
        merge_adapter(model)
    model.requires_grad_(False)  # of a run, only its evaluation is done again
    try:
        check_batches(model, tokenizer, task, list(islice(next(iter(splits.values())).rows, PROBE_ROWS)), settings)
    except UserError as error:
        print_warning(str(error))
    with translate_memory_errors(suggest_fewer_rows(settings, is_sharded(model))):
        metrics, _ = evaluate_splits(model, tokenizer, task, splits, settings)
    print(format_comparison(task, stored, metrics, record))
    kept = {"metrics": metrics, "equal": metrics == stored["metrics"]}
    share_from_first(lambda: record.try_write_file("evaluation.json", kept))
    return 0 if metrics == stored["metrics"] else 1
