"""How the runs of a report were done: every hyper-parameter that had an effect, by method, and what a reader needs to
repeat them."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace

import pandas as pd

from dual_lora.lab.config.compatibility import START_SETTINGS, explain_unread_field, explain_unused
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.present.document import MISSING, Block, Table, Text
from dual_lora.lab.record.identity import NOT_IDENTITY
from dual_lora.lab.record.provenance import get_machine, is_committed, list_attempts
from dual_lora.lab.report.learning_rates import list_labels
from dual_lora.lab.report.values import format_value, get_rate
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, is_current

LISTED_GROUPS = ("model", "method", "train", "task", "eval", "hardware")
# What does not change a number, is elsewhere in the report, or is PEFT's name of what `method` says. `task` holds the
# defaults of `train`.
NOT_LISTED = {f"{group}.{key}" for group, keys in NOT_IDENTITY.items() for key in keys} | {
    "model.name",
    "model.hub",
    "model.revision",
    "model.bundled",
    "model.generates",
    "model.roles",
    "method.peft.peft_type",
    "method.peft.r",
    "method.peft.lora_alpha",
    "method.peft.lora_dropout",
    "method.peft.magnitude_ratio",
    "method.name",
    "task.name",
    "task.epochs",
    "task.batch_size",
    "hardware.name",
    "hardware.accelerator",
}
LAST_STEP, BY_REPORTED_ROWS = "last step", "best epoch by the reported rows"  # rules of which weights are scored
MAX_VALUES = 5  # of one setting that are listed one by one


def iterate_protocol_blocks(experiment: Experiment, outcomes: list[Outcome]) -> Iterator[Block]:
    """Yield the hyper-parameters by method and the checklist."""
    yield Text("Hyper-parameters", heading=True)
    yield from iterate_hyperparameter_tables(outcomes)
    yield Text("Reproducibility", heading=True)
    yield Text(items=tuple(iterate_checklist(experiment, outcomes)))


def iterate_hyperparameter_tables(outcomes: list[Outcome]) -> Iterator[Block]:
    """Yield what differs between methods, a column for each, and what is the same for all."""
    labels = list(dict.fromkeys(outcome.label for outcome in outcomes))
    known: dict[str, dict[str, dict[object, None]]] = {}
    for outcome in outcomes:
        for name, value in list_hyperparameters(outcome).items():
            known.setdefault(name, {}).setdefault(outcome.label, {})[value] = None
    texts = {
        name: {label: summarize_values(list(by_label.get(label, {}))) for label in labels}
        for name, by_label in known.items()
    }
    shared = {name: cells[labels[0]] for name, cells in texts.items() if len(set(cells.values())) == 1}
    rows = [{"setting": name, **cells} for name, cells in texts.items() if name not in shared]
    if rows:
        yield Table(pd.DataFrame(rows), "Hyper-parameters in which methods differ, over all their runs.")
    same = [{"setting": name, "value": value} for name, value in shared.items() if value != MISSING]
    yield Table(pd.DataFrame(same), "Hyper-parameters that all methods share, over all runs.")


def list_hyperparameters(outcome: Outcome) -> dict[str, object]:
    """Return the settings of a run that can change a number of it, by their full names; what is not set, or has no
    effect on this run, is left out."""
    settings = replace(outcome.settings, data_dir=None)  # the user's files may be gone
    named = {
        name: value
        for group in LISTED_GROUPS
        for name, value in iterate_listed_settings(group, asdict(getattr(settings, group)))
    }
    named["train.lr"] = get_rate(outcome)
    known = {name: value for name, value in named.items() if value not in (None, [], {}, "")}
    return {name: format_listed_value(value) for name, value in known.items() if has_effect(settings, name, known)}


def iterate_listed_settings(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield full name and value of a setting that is listed, or of all that it holds; a list is one value."""
    if name in NOT_LISTED:
        return
    if isinstance(value, dict):
        for key, part in value.items():
            yield from iterate_listed_settings(f"{name}.{key}", part)
    else:
        yield name, value


def format_listed_value(value: object) -> str:
    """Return a value as it is listed."""
    return " ".join(map(str, value)) if isinstance(value, list) else format_value(value)


def has_effect(settings: Settings, name: str, given: Collection[str]) -> bool:
    """Return whether a setting changes anything in a run. given: the names of all that are set."""
    group, _, own = name.partition(".")
    if name == "train.epochs":
        return settings.train.max_steps is None
    if name == "model.chat":
        return settings.model.chat
    if name == "hardware.sharding":
        return settings.hardware.devices > 1
    if group == "method" and (explain_unread_field(settings, own) or settings.init_from and own in START_SETTINGS):
        return False
    return explain_unused(settings, name, given) is None


def summarize_values(values: list[object]) -> str:
    """Return the values of one setting in a few words."""
    texts = [str(value) for value in values]
    if len(texts) <= MAX_VALUES:
        return ", ".join(texts) or MISSING
    try:
        return f"{min(texts, key=float)} to {max(texts, key=float)} ({len(texts)} values)"
    except ValueError:  # not numbers
        return f"{', '.join(texts[:MAX_VALUES])} and {len(texts) - MAX_VALUES} more"


def iterate_checklist(experiment: Experiment, outcomes: list[Outcome]) -> Iterator[str]:
    """Yield what a reader needs to judge and repeat the runs, and what is missing, from the records."""
    runs = {outcome.run_key: outcome for outcome in outcomes}.values()  # rows may share some
    finished = [outcome for outcome in runs if outcome.result]
    environments = [outcome.record.read_environment() for outcome in finished]
    seeds = sorted({outcome.settings.seed for outcome in outcomes})
    yield f"runs: {len(finished)} of {len(runs)} finished; seeds {', '.join(map(str, seeds))}"
    hours = sum(outcome.result["train_seconds"] for outcome in finished) / 3600
    trials = len({trial for outcome in outcomes for trial in map(repr, outcome.cell.tuning)})
    scored = len(
        {repr(trial) for outcome in outcomes for trial in outcome.cell.tuning if trial.train.lr in outcome.scored_rates}
    )
    so_far = f", {scored} of which count so far" if scored < trials else ""
    yield f"compute: {hours:.1f} hours of training for the runs above; {trials} more runs choose learning rates{so_far}"
    per_label = {len(rates) for rates in experiment.tune.grid.values()} if experiment.tune else set()
    if per_label:
        untuned = [label for label in list_labels(experiment, outcomes) if label not in experiment.tune.grid]
        budget = f"{per_label.pop()} learning rates a point for every tuned row"
        yield f"tuning: {budget}, chosen on {experiment.tune.describe_rows()}" + (
            f"; not tuned: {', '.join(untuned)}" if untuned else ""
        )
    else:
        yield "tuning: none; one given rate for each row"
    asked = sum(outcome.settings.deterministic for outcome in finished)
    kinds = {get_machine(attempt) for environment in environments for attempt in list_attempts(environment)}
    said = [
        f"determinism: deterministic=true in {asked} of {len(finished)} runs",
        "The seed sets data order, dropout and the weights that are drawn anew",
    ]
    if asked:
        said.append(
            "Where runs are deterministic, the same settings on the same machine give the same bits, so that on one "
            "machine the runs of a row differ by the seed alone"
        )
    if len(kinds) > 1:
        said.append(f"Runs are of {len(kinds)} kinds of machine, which round differently")
    yield ". ".join(said)
    clean = sum(map(is_committed, environments))
    yield f"code: {clean} of {len(finished)} runs are of committed code; records hold commands and package versions"
    current = sum(is_current(outcome.result, outcome.settings) for outcome in finished)
    yield f"task version: {current} of {len(finished)} runs used the current task versions"
    hashed = sum(bool(outcome.result.get("sha256")) for outcome in finished)
    yield f"integrity: {hashed} of {len(finished)} runs sealed their files by SHA-256; data and weights are hashed, too"
    if not finished:
        return
    splits = sorted({name for outcome in finished for name in outcome.result["data"] if name != "train"})
    rules = dict.fromkeys(describe_checkpoint(outcome.settings) for outcome in outcomes)
    yield f"scores: on {', '.join(splits)}, after the {' or the '.join(rules)}"


def describe_checkpoint(settings: Settings) -> str:
    """Return at which point of training a run is scored."""
    task, development = settings.task, settings.eval.development_rows
    if task.checkpoint == "best_loss":
        rows, steps = task.validation_size, task.validation_interval
        return f"step of the lowest loss on {rows} training rows set apart, taken every {steps} steps"
    if task.checkpoint == "best" or settings.train.early_stopping:
        return f"best epoch by {development} training rows set apart" if development else BY_REPORTED_ROWS
    return LAST_STEP
