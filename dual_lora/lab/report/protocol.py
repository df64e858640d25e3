"""How the runs of a report were done: every hyper-parameter by method, and what a reader needs to repeat them."""

from collections.abc import Iterator

import pandas as pd

from dual_lora.lab.config.schema import iterate_leaves
from dual_lora.lab.present.document import MISSING, Block, Table, Text
from dual_lora.lab.record.provenance import get_machine, is_committed
from dual_lora.lab.report.values import format_value
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, is_current

GROUPS = ("method", "train", "task", "eval")
# What does not change a number, stands elsewhere in the report, or is PEFT's name of what `method` says.
NOT_LISTED = {
    "method.peft.peft_type",
    "method.peft.r",
    "method.peft.lora_alpha",
    "method.peft.lora_dropout",
    "method.peft.magnitude_ratio",
    "method.name",
    "method.lr",
    "task.name",
    "task.train_rows",
    "train.save_steps",
    "train.save_minutes",
    "train.log_steps",
    "eval.before",
}
MAX_VALUES = 5  # of one setting that are listed one by one


def iterate_protocol_blocks(experiment: Experiment, done: list[Outcome]) -> Iterator[Block]:
    """Yield the hyper-parameters by method and the checklist."""
    yield Text("Hyper-parameters", heading=True)
    yield from iterate_hyperparameter_tables(done)
    yield Text("Reproducibility", heading=True)
    yield Text(items=tuple(iterate_checklist(experiment, done)))


def iterate_hyperparameter_tables(done: list[Outcome]) -> Iterator[Block]:
    """Yield what differs between methods, a column for each, and what is the same for all."""
    labels = list(dict.fromkeys(cell.cell.label for cell in done))
    known: dict[str, dict[str, dict[object, None]]] = {}
    for cell in done:
        for name, value in list_hyperparameters(cell).items():
            known.setdefault(name, {}).setdefault(cell.cell.label, {})[value] = None
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


def list_hyperparameters(cell: Outcome) -> dict[str, object]:
    """Return the settings of a run that can change a number, by their full names; what is not set is left out."""
    named = {
        name: value
        for group in GROUPS
        for name, value in iterate_leaves(getattr(cell.settings, group), group)
        if name not in NOT_LISTED
    }
    named["train.lr"] = cell.rate
    return {name: format_value(value) for name, value in named.items() if value not in (None, [], {}, "")}


def summarize_values(values: list[object]) -> str:
    """Return the values of one setting in a few words."""
    texts = [str(value) for value in values]
    if len(texts) > MAX_VALUES:
        return f"{texts[0]} to {texts[-1]} ({len(texts)} values)"
    return ", ".join(texts) or MISSING


def iterate_checklist(experiment: Experiment, done: list[Outcome]) -> Iterator[str]:
    """Yield what a reader needs to judge and repeat the runs, and what is missing, from the records."""
    finished = [cell for cell in done if cell.result]
    places = [cell.record.read_environment() for cell in finished]
    seeds = sorted({cell.settings.seed for cell in done})
    yield f"runs: {len(finished)} of {len(done)} finished; seeds {', '.join(map(str, seeds))}"
    hours = sum(cell.result["train_seconds"] for cell in finished) / 3600
    trials = len({trial for cell in done for trial in map(repr, cell.cell.tuning)})
    scored = len({repr(trial) for cell in done for trial in cell.cell.tuning if trial.train.lr in cell.scored_rates})
    so_far = f", {scored} of which count so far" if scored < trials else ""
    yield f"compute: {hours:.1f} hours of training for the runs above; {trials} more runs choose learning rates{so_far}"
    per_label = {len(rates) for rates in experiment.tune.grid.values()} if experiment.tune else set()
    if per_label:
        untuned = [label for label in experiment.cells if label not in experiment.tune.grid]
        budget = f"{per_label.pop()} learning rates a point for every tuned row"
        yield f"tuning: {budget}, chosen on {experiment.tune.describe_rows()}" + (
            f"; not tuned: {', '.join(untuned)}" if untuned else ""
        )
    else:
        yield "tuning: none; one given rate for each row"
    asked, kinds = sum(cell.settings.deterministic for cell in finished), {get_machine(place) for place in places}
    yield (
        f"determinism: deterministic=true in {asked} of {len(finished)} runs. The seed sets data order, initial "
        "adapter and dropout. Where runs are deterministic, the same settings on the same machine give the same bits: "
        "what varies between the runs of a row is the seed "
        + ("alone" if len(kinds) < 2 else f"and, on {len(kinds)} kinds of machine, the rounding")
    )
    clean = sum(map(is_committed, places))
    yield f"code: {clean} of {len(finished)} runs are of committed code; records hold commands and package versions"
    current = sum(is_current(cell.result, cell.settings) for cell in finished)
    yield f"task version: {current} of {len(finished)} runs are of the tasks as they are now"
    hashed = sum(bool(cell.result.get("sha256")) for cell in finished)
    yield f"integrity: {hashed} of {len(finished)} runs sealed their files by SHA-256; data and weights are hashed, too"
    if not finished:
        return
    splits = sorted({name for cell in finished for name in cell.result["data"] if name != "train"})
    yield f"scores: on {', '.join(splits)}, after the {describe_checkpoint_rule(done)}"


def describe_checkpoint_rule(done: list[Outcome]) -> str:
    """Return at which point of training runs are scored."""
    words = {"last": "last epoch", "best": "best epoch", "best_loss": "step of the lowest loss on rows set apart"}
    return " or ".join(words[rule] for rule in sorted({cell.settings.task.checkpoint for cell in done}))
