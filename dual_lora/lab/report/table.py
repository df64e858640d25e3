"""The table of an experiment, and the notes a reader needs with it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count, product
from math import isnan
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pandas as pd

from dual_lora.lab.errors import UserError
from dual_lora.lab.present.document import MISSING, Table
from dual_lora.lab.record.provenance import get_machine, list_attempts
from dual_lora.lab.record.record import ENVIRONMENT_FIELDS, Record
from dual_lora.lab.report.analyses.kinds import check_analysis
from dual_lora.lab.report.command_lines import build_command, build_sweep_command
from dual_lora.lab.report.comparison.floors import get_model_task
from dual_lora.lab.report.comparison.matches import group_by_inputs, read_predictions
from dual_lora.lab.report.learning_rates import describe_learning_rates
from dual_lora.lab.report.protocol import BY_REPORTED_ROWS, LAST_STEP, describe_checkpoint
from dual_lora.lab.report.published import find_published_lines
from dual_lora.lab.report.values import (
    FIELDS,
    MARKS,
    SCORE_FORMATS,
    UNLEARNED,
    UNSETTLED,
    Column,
    ModelTask,
    format_value,
    get_heading,
    get_score,
    get_unit,
    list_columns,
    list_outcomes,
    list_scores,
)
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, find_damaged_records, load_task_of
from tasks import Task

MIN_FOR_MEDIAN = 3  # runs; of two it is their mean
DROPOUT = "dropout of the model"
NOT_OFFICIAL = "not the official file"  # what a task says of a file that stands in for it
# How many runs with other records the notes name.
MAX_NAMED_RUNS = 5


def find_unreadable(experiment: Experiment, outcomes: list[Outcome]) -> list[str]:
    """Return what the report needs and is missing in finished runs, and which records of the study are damaged."""
    found = [
        error for study in {outcome.settings.study for outcome in outcomes} for error in find_damaged_records(study)
    ]
    for outcome in outcomes:
        for check in iterate_checks(experiment) if outcome.result else ():
            try:
                check(outcome)
            except UserError as error:
                found.append(str(error))
    return list(dict.fromkeys(found))


def iterate_checks(experiment: Experiment) -> Iterator[Callable[[Outcome], object]]:
    """Yield functions that read the files of a run which the report needs."""
    yield lambda outcome: outcome.record.read_json("environment.json", *ENVIRONMENT_FIELDS)
    yield lambda outcome: outcome.record.verify_files("metrics.jsonl", "predictions.jsonl")
    if experiment.baselines:
        yield read_predictions
    if experiment.analyse:
        yield partial(check_analysis, experiment)


def letter_reasons(values: pd.DataFrame) -> dict[str, str]:
    """Return a letter for every reason why a value is missing: a to z, then aa, ab and so on."""
    reasons = dict.fromkeys(values.loc[values["value"].isna(), "reason"].dropna())
    return dict(zip(reasons, iterate_letters(), strict=False))


def iterate_letters() -> Iterator[str]:
    """Yield a to z, then aa, ab and so on."""
    for size in count(1):
        yield from map("".join, product(ascii_lowercase, repeat=size))


def build_main_table(
    experiment: Experiment, outcomes: list[Outcome], values: pd.DataFrame, reasons: dict[str, str]
) -> Table:
    """Return the experiment's table: a row for each label, best values bold, published rows of the same model, method
    and rank below ours."""
    columns, lines, best, aside, commands = list_columns(experiment, outcomes), [], [], [], []
    groups = list(values.groupby(experiment.rows, sort=False)) if experiment.rows else [((), values)]
    parts = {(name, label): part for name, group in groups for label, part in group.groupby("label", sort=False)}
    runs = {place: list_outcomes(part, outcomes) for place, part in parts.items()}
    tops, quotes = (
        {
            name: find_best(group, columns, experiment, list_outcomes(group, outcomes) or outcomes)
            for name, group in groups
        },
        find_published_lines(experiment, outcomes, runs),
    )
    for (name, label), part in parts.items():
        heads = dict(zip(map(get_heading, experiment.rows), map(str, name), strict=True))
        cells = {
            format_value(c.heading): format_cell(
                part[part["column"] == c.heading],
                choose_format(experiment, c, columns, runs[name, label] or outcomes),
                reasons,
                experiment.median,
            )
            for c in columns
        }
        lines.append({**heads, "method": label, **cells, **describe_cost(runs[name, label], columns)})
        best.append({key: (label, key) in tops[name] for key in lines[-1]})
        commands.append(
            {
                format_value(c.heading): find_command(part[part["column"] == c.heading], outcomes, experiment)
                for c in columns
            }
        )
        for table, cells in quotes.get((name, label), {}).items():
            aside.append(len(lines))
            cells = {format_value(c.heading): cells[c.heading] for c in columns if c.heading in cells}
            lines.append({**heads, "method": f"{label} [{table}]", **cells})
            best.append({})
            commands.append({})
    cells = pd.DataFrame(lines).fillna("")
    bold = pd.DataFrame(best).reindex(columns=cells.columns).fillna(False).astype(bool)
    copied = pd.DataFrame(commands).reindex(columns=cells.columns).fillna("")
    return Table(cells, describe_table(experiment, outcomes), bold, frozenset(aside), copied)


def find_command(part: pd.DataFrame, outcomes: list[Outcome], experiment: Experiment) -> str:
    """Return the command that makes the runs of a cell; that of the complete table for a mean over several."""
    runs = [outcome.settings for outcome in list_outcomes(part, outcomes)]
    if runs:
        return build_command(runs)
    return "" if part.empty else build_sweep_command(experiment.name, experiment.scale)


def tabulate_adapters(outcomes: list[Outcome]) -> Table:
    """Return what each row ran with: the classes of its adapted modules, what trained, and the rate of every group."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for outcome in (outcome for outcome in outcomes if outcome.result):
        kind = (outcome.settings.method.peft or {}).get("peft_type", "every weight")
        rates = [f"{name} {format_value(rate)}" for name, rate in outcome.result.get("learning_rates", {}).items()]
        own = outcome.result.get("adapter_parameters")
        line = {
            "model": outcome.settings.model.name,
            "method": outcome.label,
            "adapter": f"{kind}: {outcome.result['adapter']}" if "adapter" in outcome.result else kind,
            "trained": f"{outcome.result['trainable_parameters']:,}",
            "of them the adapter's": MISSING if own is None else f"{own:,}",
            "learning rates": ", ".join(rates) or MISSING,  # missing in older records
            DROPOUT: describe_dropouts(outcome.result),
        }
        lines[tuple(line.values())] = line
    cells = pd.DataFrame(lines.values())
    known = (cells[DROPOUT] != MISSING).any()
    return Table(
        cells if known else cells.drop(columns=DROPOUT),
        "The adapter of every row, its trained weights, and the rate of every group of them"
        + (", and the dropout of the model that carries it." if known else "."),
    )


def describe_dropouts(result: dict) -> str:
    """Return the model's dropouts of a run, each value once where all its fields have it; a dash for older records."""
    known = result.get("dropouts")
    if known is None:
        return MISSING
    values = {f"{value:g}" for value in known.values()} or {"0"}
    return values.pop() if len(values) == 1 else ", ".join(f"{name} {value:g}" for name, value in known.items())


def describe_table(experiment: Experiment, outcomes: list[Outcome]) -> str:
    """Return what the numbers are."""
    seeds = ", ".join(map(str, sorted({outcome.settings.seed for outcome in outcomes})))
    kind = f"Main score {describe_metrics(outcomes)}, by {experiment.columns}"
    if experiment.columns == "published":
        kind = "Scores as the published table has them"
    elif isinstance(experiment.columns, dict):
        kind = "Values of the runs"
    measured = isinstance(experiment.columns, dict) and FIELDS.keys() >= set(experiment.columns.values())
    best = "" if measured else "; best mean bold"
    return f"{kind}: mean ± sample standard deviation (number of runs); seeds {seeds}{best}."


def describe_metrics(outcomes: list[Outcome]) -> str:
    """Return which score is the main one, of which tasks where they differ, and which are in percent."""
    found = {(task.name, task.metric): task for task in map(load_task_of, outcomes)}
    units = {get_unit(task, task.metric) for task in found.values()}
    names: dict[str, list[str]] = {}
    for task in found.values():
        percent = len(units) > 1 and get_unit(task, task.metric) == 100
        names.setdefault(f"{task.metric} in %" if percent else task.metric, []).append(task.name)
    listed = next(iter(names)) if len(names) == 1 else "; ".join(f"{m} of {', '.join(t)}" for m, t in names.items())
    return f"({listed}){', %' if units == {100} else ''}"


def choose_format(experiment: Experiment, column: Column, columns: list[Column], outcomes: list[Outcome]) -> str:
    """Return how the values that runs have in a column are printed."""
    if column.field in FIELDS:
        return FIELDS[column.field][1]
    units = {get_unit(task, metric) for task, metric in list_scores(experiment, column, columns, outcomes)}
    return SCORE_FORMATS[max(units, default=100)]


def format_cell(part: pd.DataFrame, style: str, reasons: dict[str, str], with_median: bool = False) -> str:
    """Return a cell: mean ± standard deviation (n), perhaps the median, and marks, or a dash with its reason's letter;
    empty where no run was asked for. style: how a value is printed."""
    if part.empty:
        return ""
    scores = part["value"].dropna()
    missing = set(part.loc[part["value"].isna(), "reason"].dropna())
    why = f" [{', '.join(letter for reason, letter in reasons.items() if reason in missing)}]" if missing else ""
    if scores.empty:
        return MISSING + why
    spread = f" ± {style.format(scores.std(ddof=1))}" if len(scores) > 1 else ""
    middle = f", median {style.format(scores.median())}" if with_median and len(scores) >= MIN_FOR_MEDIAN else ""
    marks = "".join(sorted(set("".join(part["marks"]))))
    return f"{style.format(scores.mean())}{spread} ({len(scores)}){middle}{marks}{why}"


def find_best(
    group: pd.DataFrame, columns: list[Column], experiment: Experiment, outcomes: list[Outcome]
) -> set[tuple[str, str]]:
    """Return the cells with the best mean: per column, or over the table if its columns are values of a setting.

    Each is (label, heading). The task does not count as such a setting. A mean that nothing can be compared with is not
    the best. outcomes: those of the group.
    """
    apart = experiment.columns == "task.name"
    means = group.groupby(["label", "column"], sort=False)["value"].mean().dropna()
    named = [column for column in columns if column.field not in FIELDS]
    single = apart or isinstance(experiment.columns, dict)
    families = [[c] for c in named if single or c.task or c.parts] or [named]
    top = set()
    for family in families:
        part = means[means.index.get_level_values("column").isin([c.heading for c in family])]
        scores = [score for column in family for score in list_scores(experiment, column, columns, outcomes)]
        lower = {task.is_lower_better(metric) for task, metric in scores}
        # A mean of scores of which some should be low and others high is not better for being higher or lower.
        if len(part) > 1 and len(lower) == 1 and not np.isclose(part.min(), part.max(), rtol=0, atol=1e-9):
            best = part.min() if True in lower else part.max()
            names = {c.heading: format_value(c.heading) for c in family}
            top |= {(label, names[head]) for label, head in part.index[np.isclose(part, best, rtol=0, atol=1e-9)]}
    return top


def describe_cost(runs: list[Outcome], columns: list[Column]) -> dict[str, str]:
    """Return trained parameters and seconds a step of a row's runs, unless these are the table's columns."""
    if any(column.field in FIELDS for column in columns):
        return {}
    results = [outcome.result for outcome in runs if outcome.result]
    trained = sorted({result["trainable_parameters"] for result in results})
    seconds = sorted(FIELDS["seconds_per_step"][0](result) for result in results)
    return {"trained": format_range(trained, "{:,.0f}"), "s/step": format_range(seconds, "{:.2f}")}


def format_range(numbers: list[float], style: str) -> str:
    """Return the smallest and the largest of sorted numbers; one where both print alike."""
    ends = list(dict.fromkeys(style.format(numbers[i]) for i in ((0, -1) if numbers else ())))
    return " to ".join(ends) or MISSING


def iterate_notes(
    experiment: Experiment,
    outcomes: list[Outcome],
    values: pd.DataFrame,
    reasons: dict[str, str],
    unranked: Mapping[ModelTask, str],
    unreadable: list[str],
) -> Iterator[str]:
    """Yield what a reader must know of the table: reasons, marks, learning rates, data, machines and code. unreadable:
    of `find_unreadable`."""
    for reason, letter in reasons.items():
        yield f"{MISSING} [{letter}]: {reason}"
    for mark in sorted(set("".join(values["marks"].dropna()))):
        yield f"{mark}: {MARKS[mark]}"
    for why, done in ((UNLEARNED, "left out of"), (UNSETTLED, "missing in")):
        if some := [f"{task} ({model})" for (model, task), reason in sorted(unranked.items()) if reason == why]:
            yield f"{why}, and {done} means: {', '.join(some)}; see the table of floors"
    yield from iterate_direction_notes(outcomes)
    yield from describe_learning_rates(experiment, outcomes)
    yield from iterate_start_notes(experiment, outcomes)
    yield from iterate_clipped_notes(outcomes)
    yield from iterate_checkpoint_notes(outcomes)
    yield from iterate_further_scores(outcomes)
    files = {
        f"{name} {facts['origin']}, {facts['rows']:,} rows"
        for outcome in outcomes
        for name, facts in (outcome.result["data"].items() if outcome.result else ())
    }
    if files:
        yield f"data: {'; '.join(sorted(files))}"
    yield from dict.fromkeys(note for outcome in outcomes if (note := describe_missing_rows(outcome)))
    yield from iterate_origin_notes(outcomes)
    yield from (f"not read: {trouble}" for trouble in unreadable)


def iterate_direction_notes(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield a note if lower is better on only some tasks: their means rank nothing."""
    lower = {task.name: task.is_lower_better() for task in map(load_task_of, outcomes)}
    if len(set(lower.values())) > 1:
        named = ", ".join(name for name, is_lower in lower.items() if is_lower)
        yield f"means over tasks have no best row and no verdict: lower is better on {named}, higher on the others"


def iterate_start_notes(experiment: Experiment, outcomes: list[Outcome]) -> Iterator[str]:
    """Yield which run each row of a task starts from."""
    for task, source in experiment.starts.items():
        started = [outcome for outcome in outcomes if outcome.settings.task.name == task]
        runs = {
            f"{outcome.label} {Path(start).name}": None for outcome in started if (start := outcome.settings.init_from)
        }
        if started:
            named = f" ({', '.join(runs)})" if runs else ""
            yield f"start: {task} from the row's own best run of {source}, without its head{named}"


def describe_missing_rows(outcome: Outcome) -> str | None:
    """Return a note if a run had fewer training rows than its protocol, with its task's options, unless its data say so
    already."""
    settings, train = outcome.settings, (outcome.result or {}).get("data", {}).get("train")
    default = settings.task.train_rows
    if not train or not default or settings.train.max_examples or NOT_OFFICIAL in train["origin"]:
        return None
    official, fewer = load_task_of(outcome).count_official_rows(default)
    if fewer:  # how many it should have is not known
        return None
    rows = train["rows"] + settings.eval.reserved_rows + settings.task.validation_size
    return (
        f"training data: {settings.task.name} has {rows:,} of the protocol's {official:,} rows"
        if rows < official
        else None
    )


def iterate_checkpoint_notes(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield by which rule weights were chosen that are not the last ones, of which tasks. Where a loss chose them, also
    the main scores after the last step."""
    rules: dict[str, set[str]] = {}
    for outcome in outcomes:
        rules.setdefault(describe_checkpoint(outcome.settings), set()).add(outcome.settings.task.name)
    rules.pop(LAST_STEP, None)
    for rule, names in rules.items():
        caveat = ", as LoRA reports it; scores, intervals and p do not account for that choice"
        yield f"checkpoint: of {', '.join(sorted(names))} the {rule}{caveat if rule == BY_REPORTED_ROWS else ''}"
    chosen = [outcome for outcome in outcomes if outcome.result and outcome.settings.task.checkpoint == "best_loss"]
    for model_task, group in group_by_task(chosen):
        if listed := list_mean_scores(group, load_task_of(group[0]).metric, "metrics_last_epoch"):
            yield f"after the last step instead, {label_task(model_task, chosen)}: {listed}"


def iterate_further_scores(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield the mean scores on a task's further sets by row, a line for each model and task."""
    finished = [outcome for outcome in outcomes if outcome.result]
    for model_task, group in group_by_task(finished):
        for metric in load_task_of(group[0]).further_metrics:
            if listed := list_mean_scores(group, metric, "metrics"):
                yield f"{metric}, {label_task(model_task, finished)}: {listed}"


def group_by_task(finished: list[Outcome]) -> Iterator[tuple[ModelTask, list[Outcome]]]:
    """Yield the runs of every model and task."""
    groups: dict[ModelTask, list[Outcome]] = {}
    for outcome in finished:
        groups.setdefault(get_model_task(outcome), []).append(outcome)
    yield from groups.items()


def label_task(model_task: ModelTask, finished: list[Outcome]) -> str:
    """Return a task's name, with that of the model where there are several."""
    model, name = model_task
    return name + f" ({model})" * (len({outcome.settings.model.name for outcome in finished}) > 1)


def list_mean_scores(group: list[Outcome], metric: str, of: str) -> str:
    """Return the means of a score by row, with the number of runs; empty where none was measured. group: runs of one
    task. of: as in `get_score`."""
    task, known = load_task_of(group[0]), {}
    for outcome in group:
        if not isnan(score := get_score(task, outcome.result, metric, of)):
            known.setdefault(outcome.label, []).append(score)
    style = SCORE_FORMATS[get_unit(task, metric)]
    return ", ".join(f"{label} {style.format(np.mean(some))} ({len(some)})" for label, some in known.items())


def iterate_clipped_notes(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield how much of Sign's gradient was clipped, the largest share of a row's runs."""
    shares: dict[str, float] = {}
    for outcome in outcomes:
        if (share := (outcome.result or {}).get("clipped_share")) is not None:
            shares[outcome.label] = max(share, shares.get(outcome.label, 0.0))
    if shares:
        listed = ", ".join(f"{label} {share:.2g}" for label, share in shares.items())
        none = "; where it is 0, nothing was clipped at the logged steps" if 0 in shares.values() else ""
        yield f"share of Sign's gradient that was clipped, the largest at a logged step: {listed}{none}"


def iterate_origin_notes(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield machines and code of the runs, runs with other files of a model, and other records of the same settings."""
    environments = [outcome.record.read_environment() for outcome in outcomes if outcome.result]
    known = [environment for environment in environments if environment]
    if known:
        attempts = [attempt for environment in known for attempt in list_attempts(environment)]
        machines = {f"{get_machine(a)}, {a['threads']} thread{'s' * (a['threads'] != 1)}" for a in attempts}
        yield f"machines: {'; '.join(sorted(machines))}"
    if environments:
        commits = {c or "unknown" for e in environments for c in (e.get("commit"), *e.get("earlier_commits", []))}
        yield f"code: {', '.join(sorted(commit[:10] for commit in commits))}"
    for name, what, groups in group_by_inputs(outcomes):
        listed = "; ".join(", ".join(g[:MAX_NAMED_RUNS]) + " and more" * (len(g) > MAX_NAMED_RUNS) for g in groups)
        yield f"runs of {name} with {what}, which do not compare: {listed}"
    named = dict.fromkeys(
        describe_duplicates(load_task_of(outcome), group) for outcome in outcomes for group in outcome.duplicates
    )
    if duplicates := list(named):
        more = f" and {len(duplicates) - MAX_NAMED_RUNS} more" if len(duplicates) > MAX_NAMED_RUNS else ""
        yield (
            "several finished records of the same settings (other data, weights, task version or code); the one of the "
            "data and weights that the command names counts, or else the newest of the task as it is now and committed "
            "code: " + "; ".join(duplicates[:MAX_NAMED_RUNS]) + more
        )


def describe_duplicates(task: Task, records: tuple[Record, ...]) -> str:
    """Return the run that counts and those that do not, with their main scores."""
    style = SCORE_FORMATS[get_unit(task, task.metric)]
    scores = [get_score(task, record.read_result()) for record in records]
    texts = [f"{task.metric} not measured" if isnan(score) else style.format(score) for score in scores]
    named = [f"{record.name} ({text})" for record, text in zip(records, texts, strict=True)]
    return f"{named[0]}, not {', '.join(named[1:])}"
