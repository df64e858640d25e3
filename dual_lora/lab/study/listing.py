"""Several runs, or several plans, of one command as a table, one row each."""

from typing import Any

from tabulate import tabulate

from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.present.units import GB
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.summary import format_score, name_score

DASH = "-"  # on the screen, where there is no value


def format_results(runs: list[Run]) -> str:
    """Return the table of a command's runs: the main score of each task (in percent, but as it is where the task says
    so), before and after training, trained weights and seconds of training. A dash means that there is no result.
    Runs that differ only in their seed are followed by their mean and standard deviation."""
    results = [run.record.read_result() or {} for run in runs]
    metrics = list(dict.fromkeys(result["metric"] for result in results if result))
    unscaled = {name for run in runs for name in load_task(run.settings).unscaled}
    rows = []
    for run, result in zip(runs, results, strict=True):
        scores = [result.get("metrics", {}).get(name) if result.get("metric") == name else None for name in metrics]
        before = (result.get("metrics_before") or {}).get(result.get("metric"))
        trained = f"{result['trainable_parameters']:,}" if result else DASH
        seconds = f"{result['train_seconds']:.1f}" if result else DASH
        shown = [format_score(score, name in unscaled) for score, name in zip(scores, metrics, strict=True)]
        rows.append([run.label, format_score(before, result.get("metric") in unscaled), *shown, trained, seconds])
    rows += summarize_seeds(runs, results, metrics, unscaled)
    heads = [name_score(name, name in unscaled) for name in metrics]
    return format_rows(rows, ["run", "before", *heads, "trained", "seconds"])


def summarize_seeds(
    runs: list[Run], results: list[dict[str, Any]], metrics: list[str], unscaled: set[str]
) -> list[list[str]]:
    """Return a row of `format_results` for each group of finished runs that differ only in their seed: mean ± SD."""
    import numpy as np  # here, since a command of one run need not wait for it

    groups: dict[str, list[dict[str, Any]]] = {}
    for run, result in zip(runs, results, strict=True):
        if result:
            groups.setdefault(run.format_label("seed"), []).append(result)
    rows = []
    for label, group in groups.items():
        if len(group) > 1:
            metric = group[0]["metric"]
            scores = [result["metrics"][metric] for result in group]
            summary = [format_score(value, metric in unscaled) for value in (np.mean(scores), np.std(scores, ddof=1))]
            shown = [" ± ".join(summary) if name == metric else DASH for name in metrics]
            rows.append([f"{label}, mean ± SD of {len(group)} seeds", DASH, *shown, DASH, DASH])
    return rows


def format_plans(runs: list[Run], plans: list[dict[str, Any] | None], refusals: list[str | None]) -> str:
    """Return the table of a command's plans: trained weights, peak memory of a device, steps, hours, and whether the
    run fits. A dash means that the plan could not be made."""
    rows = []
    for run, plan, refusal in zip(runs, plans, refusals, strict=True):
        cells = [DASH] * 4
        if plan:
            memory, hours = (format_amount(amount) for amount in (plan["memory"]["peak"] / GB, plan["hours"]))
            cells = [f"{plan['trainable_parameters']:,}", memory, f"{plan['steps']:,}", hours]
        rows.append([run.label, *cells, "no" if refusal else "yes"])
    return format_rows(rows, ["plan", "trained", "GB a device", "steps", "hours", "fits"])


def format_amount(amount: float) -> str:
    """Return a number with two decimals, one that is not 0 never as 0.00."""
    return f"{amount:.2f}" if amount >= 0.01 or not amount else "< 0.01"


def format_rows(rows: list[list[str]], headers: list[str]) -> str:
    """Return rows as a table, the first column flush left."""
    aligned = ("left", *("right" for _ in headers[1:]))
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=aligned)
