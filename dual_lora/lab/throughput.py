"""How much faster evaluation is than a loop over single prompts, which is how LLM-Adapters evaluates, at equal outputs.

    python -m dual_lora.lab.throughput run=runs/STUDY/ID split=NAME [eval.batch_size=N eval.max_examples=N]

Both decode alike, with the adapter of a finished run of a generation task; the loop calls `generate` once a prompt on
the adapter as it was saved, unmerged, as LLM-Adapters does (commonsense_evaluate.py, 4 beams). data_dir and model.path
tell where the files are now, if they moved.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("DUAL_LORA_LAZY", "1")  # settings are checked before torch is imported

from dual_lora.lab import cli
from dual_lora.lab.runs import Record, task_of
from dual_lora.lab.settings import Settings, require


def main(argv: list[str]) -> int:
    run, values = cli.read_again(argv, **{"eval.max_examples": int, "split": str})
    name = values.pop("split", None)
    settings = cli.changed(cli.recorded(run), values)
    task = task_of(settings)
    require(task.form == "generation", f"run={run}: {task.name} generates nothing")
    require(name in task.eval_splits, f"split={name}: {task.name} has {', '.join(task.eval_splits)}")
    print(json.dumps(measure(settings, Record(run.resolve()), name), indent=1))
    return 0


def measure(settings: Settings, record: Record, name: str) -> dict[str, Any]:
    """Return both times in seconds, their ratio and how many of the outputs are equal."""
    import torch

    from dual_lora.lab import data, evaluation, methods, models, reevaluation, training

    training.quiet()
    task, protocol = task_of(settings), settings.task
    rows = list(evaluation.load_split(task, name, settings).rows)
    model, tokenizer = reevaluation.load_trained(settings, record, task)
    models.to_device(model)
    model.eval()
    alone, started = [], time.perf_counter()
    for row in rows:
        ids = torch.tensor([data.prompt_ids(tokenizer, row, settings)], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **evaluation.decoding(tokenizer, settings, ids.shape[1]),
            )
        alone.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    one_by_one, started = time.perf_counter() - started, time.perf_counter()
    methods.merge(model)
    together = evaluation.outputs(model, tokenizer, task, rows, settings, name)
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
        "equal_outputs": sum(a == b for a, b in zip(alone, together, strict=True)),
    }


if __name__ == "__main__":
    cli.guard(main, sys.argv[1:])
