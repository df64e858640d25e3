"""Experiments to report, and finished runs of them that nobody trained."""

import re
from dataclasses import asdict

import yaml

import tasks
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run

GLUE = {
    "title": "GLUE",
    "rows": ["model.name"],
    "columns": "published",
    "published": ["lora_table2_glue"],
    "baselines": ["LoRA"],
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"]},
    "full": {
        "seeds": [0, 1],
        "run": ["model=roberta-base", "method.rank=8", "eval.before=false"],
        "blocks": [["task=glue/sst2"], ["task=glue/rte"]],
    },
}

RATIOS = {
    "title": "Ratios",
    "rows": ["task.name"],
    "columns": "method.magnitude_ratio",
    "published": ["dual_lora_fig2_magnitude_ratio"],
    "baselines": ["LoRA"],
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora", "method.magnitude_ratio=0.25,0.5"]},
    "full": {"seeds": [0, 1, 2], "run": ["model=roberta-base", "task=glue/rte"]},
}


def finish(settings, right: int, of: int = 100, **changes) -> Record:
    """Write the record of a run that had `right` of `of` sentences right: the last ones, so that runs nest."""
    record = Run.prepare(settings).record
    record.folder.mkdir(parents=True)
    record.write_file("config.yaml", yaml.safe_dump(asdict(settings)))
    environment = {"uncommitted_changes": False, "processor": "abacus", "threads": 1, "commit": "c0ffee" * 6}
    record.write_file("environment.json", environment | changes.pop("environment", {}))
    gold = [i % 2 for i in range(of)]
    answers = [label if i >= of - right else 1 - label for i, label in enumerate(gold)]
    pairs = enumerate(zip(answers, gold, strict=True))
    rows = [{"split": "validation", "id": f"v-{i}", "answer": answer, "gold": label} for i, (answer, label) in pairs]
    record.write_lines("predictions.jsonl", rows)
    task = tasks.load(settings.task.name, settings.task.options)
    facts = {"model": settings.model.name, "task": task.name, "method": settings.method.name, "seed": settings.seed}
    facts |= {"metric": task.metric, "task_version": task.version}
    facts["metrics"] = changes.get("metrics") or task.score({"validation": rows})
    facts |= {"trainable_parameters": 887042, "steps": 10, "train_seconds": 5.0, "tokens_per_second": 9.0}
    data = {"validation": {"origin": "dev.tsv", "rows": of, "sha256": "0"}}
    record.write_file("result.json", facts | {"data": data, "identity": record.name} | changes)
    return record


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table's lines."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


PLANNED = GLUE | {"planned": ["Dual LoRA"], "margin": {"task": 1.0, "mean": 0.5}}

PLANNED |= {"full": GLUE["full"] | {"seeds": [0, 1, 2, 3, 4]}}
