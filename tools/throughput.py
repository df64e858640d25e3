"""Compares the speed of our evaluation with LLM-Adapters' loop over single prompts, and counts equal outputs.

    python -m tools.throughput run=runs/STUDY/ID split=NAME [eval.batch_size=N eval.max_examples=N]

Both decode alike, with the adapter of a finished run of a generation task; the loop calls `generate` once a prompt on
the adapter as it was saved, unmerged, as LLM-Adapters does (commonsense_evaluate.py, 4 beams). data_dir and model.path
say where the files are now, if they moved.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("DUAL_LORA_LAZY", "1")  # settings are checked before torch is imported

from dual_lora.lab.commands.evaluate import parse_run_words
from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.config.recorded import load_recorded_settings, replace_settings
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import require
from dual_lora.lab.record.record import Record


def measure_command(argv: list[str]) -> int:
    """Print the times of the run that `argv` names, as JSON; return the exit code.

    Raises:
        UserError: the command line is wrong, or the run generates nothing.
    """
    run, values = parse_run_words(argv, **{"eval.max_examples": int, "split": str})
    name = values.pop("split", None)
    settings = replace_settings(load_recorded_settings(run), values)
    task = load_task(settings)
    require(task.form == "generation", f"run={run}: {task.name} generates nothing")
    require(name in task.eval_splits, f"split={name}: {task.name} has {', '.join(task.eval_splits)}")
    print(json.dumps(measure_throughput(settings, Record(run.resolve()), name), indent=1))
    return 0


def generate_one_by_one(model: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: Settings) -> list[str]:
    """Return the text after each row's prompt, with one call of `generate` a prompt."""
    import torch

    from dual_lora.lab.evaluate.predict import get_decoding_options
    from dual_lora.lab.model.encode import encode_prompt

    texts = []
    for row in rows:
        ids = torch.tensor([encode_prompt(tokenizer, row, settings)], device=model.device)
        options = get_decoding_options(tokenizer, settings, ids.shape[1])
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def measure_throughput(settings: Settings, record: Record, name: str) -> dict[str, Any]:
    """Return both times in seconds, their ratio and how many of the outputs are equal.

    Raises:
        UserError: the model has too few positions for a row.
    """
    import torch

    from dual_lora.lab.evaluate.evaluate import compute_outputs
    from dual_lora.lab.evaluate.predict import encode_scored_rows
    from dual_lora.lab.evaluate.trained import load_trained_model
    from dual_lora.lab.inputs.splits import load_split
    from dual_lora.lab.model.load import move_to_device
    from dual_lora.lab.model.merge import merge_adapter
    from dual_lora.lab.system.libraries import silence_libraries

    silence_libraries()
    task, protocol = load_task(settings), settings.task
    split = load_split(task, name, settings)
    rows = list(split.rows)
    model, tokenizer = load_trained_model(settings, record, task)
    encode_scored_rows(model, tokenizer, task, name, split.rows, settings)
    move_to_device(model)
    model.eval()
    started = time.perf_counter()
    single = generate_one_by_one(model, tokenizer, rows, settings)
    one_by_one, started = time.perf_counter() - started, time.perf_counter()
    merge_adapter(model)
    together = compute_outputs(model, tokenizer, task, rows, settings, name)
    batched = time.perf_counter() - started
    return {
        "run": record.name,
        "split": name,
        "prompts": len(rows),
        "beams": protocol.num_beams,
        "batch_size": settings.eval.batch_size,
        "threads": torch.get_num_threads(),
        "one_by_one_seconds": one_by_one,
        "batched_seconds": batched,
        "ratio": one_by_one / batched,
        "equal_outputs": sum(a == b for a, b in zip(single, together, strict=True)),
    }


if __name__ == "__main__":
    run_command(measure_command, sys.argv[1:])
