"""The model card of an exported run: what it was made from, how it scored, and how to load it."""

import yaml

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.model.load import get_head_class
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.summary import format_score
from tasks import Task

CARD_NAME = "README.md"
# The hub's names for the forms of tasks.
PIPELINES = {
    "generation": "text-generation",
    "classification": "text-classification",
    "regression": "text-classification",
}

CARD = """---
{header}---

# {model} trained on {task} with {method}

| | |
|---|---|
| base model | {base} |
| method | {method}{rank}; {trained:,} of {parameters:,} parameters trained |
| data | {data} |
| steps, learning rate, seed | {steps}, {lr:g}, {seed} |
| weights | {dtype}, merged: plain transformers loads them |
| run | {run} |

## Scores

{scores}

On the rows and by the protocol of the run, before the weights were merged and rounded to {dtype}.

## Loading

```python
from transformers import {head}, AutoTokenizer

model = {head}.from_pretrained("DIR", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```
{adapter}"""

ADAPTER = """
`adapter/` holds the adapter alone. Load it onto the original base model, not onto these merged weights:

```python
from peft import PeftModel{register}

model = PeftModel.from_pretrained(base_model, "DIR/adapter")
```
"""
SPLIT = """
The adapter itself is not here: it changes blocks of fused layers (`model.split=[{roles}]`), which the original model
does not have as modules of their own.
"""
# PEFT finds types of its own; those of this package are known once it is imported.
REGISTER = """
import dual_lora  # pip install dual-lora: registers the adapter's type with PEFT"""


def format_model_card(settings: Settings, record: Record, task: Task, dtype: str, adapter: bool) -> str:
    """Return the card as Markdown with the hub's YAML header. adapter: whether the adapter is beside the weights."""
    result = record.read_result()
    base, method = settings.model.hub or settings.model.name, settings.method
    header = {"library_name": "transformers", "pipeline_tag": PIPELINES[task.form]}
    header |= {"tags": [method.name, *(["peft"] if adapter else [])]}
    header |= {"base_model": settings.model.hub} if settings.model.hub else {}
    own = bool(result.get("kernels"))
    about_adapter = SPLIT.format(roles=",".join(settings.model.split)) if settings.splits_layers else ""
    if adapter:
        about_adapter = ADAPTER.format(register=REGISTER if own else "")
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        model=settings.model.name,
        task=task.name,
        method=method.name,
        base=base + (f" ({settings.model.revision})" if settings.model.revision else ""),
        rank=f", rank {method.rank}" if method.rank else "",
        trained=result["trainable_parameters"],
        parameters=result["parameters"],
        data="; ".join(f"{name}: {facts['rows']} rows" for name, facts in result["data"].items()),
        steps=result["steps"],
        lr=settings.train.lr,
        seed=settings.seed,
        dtype=dtype,
        run=record.name,
        scores=format_scores(result, task),
        head=get_head_class(task).__name__,
        adapter=about_adapter,
    )


def format_scores(result: dict, task: Task) -> str:
    """Return the scores as a Markdown table, in percent but where the task says otherwise."""
    rows = [f"| {name} | {format_score(value, name in task.unscaled)} |" for name, value in result["metrics"].items()]
    return "\n".join(["| score | % |", "|---|---:|", *rows])
