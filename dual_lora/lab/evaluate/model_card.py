"""The model card of an exported run: what it was made from, how it scored, and how to load it."""

from pathlib import Path
from typing import Any

from dual_lora.functional import MAP_NAMES
from dual_lora.lab.config.paths import format_yaml
from dual_lora.lab.config.schema import Settings, is_hub_id
from dual_lora.lab.model.encode import TEMPLATE_DATE
from dual_lora.lab.model.load import get_head_class
from dual_lora.lab.present.document import escape_markdown_cell
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.summary import format_score, name_score
from dual_lora.papers_map import PAPERS_MAP
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
| data | {data} |{prompts}
| steps, learning rate, seed | {steps}, {rates}, {seed} |{start}
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
ADAPTER_CARD = """---
{header}---

# Adapter: {model} trained on {task} with {method}

| | |
|---|---|
| base model | {base} |
| method | {method}{rank}; {trained:,} of {parameters:,} parameters trained |
| settings | {settings} |
| data | {data} |{prompts}
| steps, learning rate, seed | {steps}, {rates}, {seed} |{start}
| made with | PEFT {peft} |
| run | {run} |
{about}
## Scores

{scores}

On the rows and by the protocol of the run.

## Loading

The adapter belongs onto the original base model; BASE is its folder or its name on the hub.

```python
from peft import PeftModel{register}
from transformers import {head}

base = {head}.from_pretrained("BASE"{labels})
model = PeftModel.from_pretrained(base, "DIR")
```
"""

# What this package's own method computes.
ABOUT = """
Dual LoRA ([arXiv 2512.03402](https://arxiv.org/abs/2512.03402)) adds
dW = f * alpha / sqrt(r1 r2) * {size}(B A) ⊙ {sign}(D C) to a weight, with A, B of rank r1, C, D of rank r2, and a
factor f that training ramps from 0 to 1.
"""
# PEFT finds types of its own; those of this package are known once it is imported.
REGISTER = """
# Not on PyPI: `pip install .` in a clone of dual-lora. Registers the adapter's type, else KeyError: 'DUAL_LORA'.
import dual_lora"""


def format_model_card(settings: Settings, record: Record, task: Task, dtype: str, adapter: bool) -> str:
    """Return the card of the merged model as Markdown with the hub's YAML header. adapter: whether the adapter is
    next to the weights."""
    facts = collect_facts(settings, record, task)
    header = format_header(settings, task, "transformers", ["peft"] if adapter else [])
    about = SPLIT.format(roles=",".join(settings.model.split)) if settings.splits_layers else ""
    return CARD.format(header=header, dtype=dtype, adapter=ADAPTER.format(**facts) if adapter else about, **facts)


def format_adapter_card(settings: Settings, record: Record, task: Task) -> str:
    """Return the card of the adapter; PEFT's own card has only placeholders."""
    facts, classes = collect_facts(settings, record, task), {"classification": len(task.labels), "regression": 1}
    values = {key: value for key, value in settings.method.peft.items() if value not in (None, {}, [])}
    return ADAPTER_CARD.format(
        header=format_header(settings, task, "peft", ["peft", *(["dual-lora"] if facts["register"] else [])]),
        settings=escape_markdown_cell(", ".join(f"{key}={value}" for key, value in values.items())),
        peft=record.read_environment().get("packages", {}).get("peft", "?"),
        about=format_about(settings) if facts["register"] else "",
        labels=f", num_labels={classes[task.form]}" if task.form in classes else "",
        **facts,
    )


def format_about(settings: Settings) -> str:
    """Return what this package's own method computes, by the maps of the run."""
    found = PAPERS_MAP | settings.method.peft
    size, sign = (MAP_NAMES.get(found[group], found[group]) for group in ("magnitude", "direction"))
    return ABOUT.format(size=size, sign=sign)


def describe_base(settings: Settings) -> str:
    """Return a run's base model: its name, and its commit unless its files were given; in how many bits it was held."""
    model, name = settings.model, settings.model.hub or settings.model.name
    source = f" ({model.revision})" if model.revision and not model.path else ""
    source += ", from files that were not compared with the hub's" if model.path and model.hub else ""
    return name + source + (f", in 4 bits ({settings.hardware.base})" if settings.hardware.base else "")


def format_header(settings: Settings, task: Task, library: str, tags: list[str]) -> str:
    """Return the YAML header that the hub reads from a card. A base model that is not on the hub is left out: the hub
    refuses the card otherwise."""
    header = {"library_name": library, "pipeline_tag": PIPELINES[task.form]}
    header |= {"tags": list(dict.fromkeys([settings.method.name, *tags]))}
    header |= {"base_model": settings.model.hub} if settings.model.hub else {}
    return format_yaml(header)


def collect_facts(settings: Settings, record: Record, task: Task) -> dict[str, Any]:
    """Return what both cards say of a run."""
    result, method = record.read_result(), settings.method
    chat = f"\n| prompts | in the tokenizer's chat template; its date, if it prints one, is {TEMPLATE_DATE:%d %B %Y} |"
    return {
        "model": settings.model.name,
        "task": task.name,
        "method": method.name,
        "base": describe_base(settings),
        "rank": f", rank {method.rank}" if method.rank else "",
        "trained": result["trainable_parameters"],
        "parameters": result["parameters"],
        "data": "; ".join(f"{name}: {facts['rows']} rows" for name, facts in result["data"].items()),
        "prompts": chat if settings.model.chat else "",
        "steps": result["steps"],
        "rates": format_rates(result["learning_rates"]) if "learning_rates" in result else "?",
        "seed": settings.seed,
        "start": format_start(settings),
        "run": record.name,
        "scores": format_scores(result, task),
        "head": get_head_class(task).__name__,
        "register": REGISTER if result.get("kernels") else "",
    }


def format_rates(rates: dict[str, float]) -> str:
    """Return the learning rates of the groups of trained weights: one number where they are equal."""
    if len(set(rates.values())) > 1:
        return " and ".join(f"{rate:g} ({group})" for group, rate in rates.items())
    return next((f"{rate:g}" for rate in rates.values()), "none")


def format_start(settings: Settings) -> str:
    """Return the row of a card for what the run started from; nothing where that is the base model alone."""
    start = settings.init_from
    if start is None:
        return ""
    name = start if is_hub_id(start) else Path(start).name  # where it lies says nothing about the run
    return f"\n| started from the weights of | {escape_markdown_cell(name)} |"


def format_scores(result: dict, task: Task) -> str:
    """Return the scores as a Markdown table, in percent but where the task says otherwise."""
    scores = [(name, value, name in task.unscaled) for name, value in result["metrics"].items()]
    rows = [
        f"| {escape_markdown_cell(name_score(name, unscaled))} | {format_score(value, unscaled)} |"
        for name, value, unscaled in scores
    ]
    return "\n".join(["| score | |", "|---|---:|", *rows])
