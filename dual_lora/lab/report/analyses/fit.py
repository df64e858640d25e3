"""How well the form of each method fits the updates of a row's runs, such as full tuning: one weight of every role."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dual_lora.lab.present.document import Block, Table, Text
from dual_lora.lab.record.record import FIT_FILE
from dual_lora.lab.report.analyses.groups import format_mean, group_runs, name_model_task
from dual_lora.lab.report.comparison.floors import Floor, ModelTask, get_model_task
from dual_lora.lab.study.outcome import Outcome


@dataclass(frozen=True)
class FittedRun:
    """The fits of one run: for each weight and form the least share of ||dW||^2 left unexplained, of all rates, and the
    optimum of LoRA's form by SVD, where that is the form."""

    model_task: ModelTask
    label: str
    shares: dict[tuple[str, str], float]
    optima: dict[tuple[str, str], float]

    @classmethod
    def read(cls, outcome: Outcome, content: dict) -> "FittedRun":
        """Return the fits of an analysed run. content: of its file."""
        shares: dict[tuple[str, str], float] = {}
        optima = {}
        for row in content["rows"]:
            key = row["cell"]["target"], row["cell"]["method"]
            found = row["result"]["unexplained"]
            shares[key] = min(shares.get(key, np.inf), found)
            if row["result"]["svd"] is not None:
                optima[key] = row["result"]["svd"]
        return cls(get_model_task(outcome), outcome.label, shares, optima)


def iterate_fit_blocks(outcomes: list[Outcome], folder: Path, floors: list[Floor]) -> Iterator[Block]:
    """Yield what each form leaves unexplained, and Dual LoRA's minus the others'. folder, floors:
    not used."""
    contents = [
        outcome.record.read_sealed(FIT_FILE, "rows", "labels", "compared_with", "modules") for outcome in outcomes
    ]
    runs = [FittedRun.read(outcome, content) for outcome, content in zip(outcomes, contents, strict=True)]
    labels, compared, one = contents[0]["labels"], contents[0]["compared_with"], contents[0]["rows"][0]["cell"]
    rates = sorted({row["cell"]["rate"] for row in contents[0]["rows"]})
    yield Text("Fitting the updates", heading=True)
    yield Text(
        f"The update of the middle layer's weight of every role is fitted by each form, with a budget of LoRA at rank "
        f"{one['r']}, by gradient descent on the update itself (`dual_lora/analysis/fit.py`), one start, the best of "
        f"the rates {', '.join(f'{rate:g}' for rate in rates)} (the annealed form has one rate). No data, no score: "
        "what a form can express and descent finds."
    )
    yield Table(
        tabulate_unexplained(runs, labels),
        "Share of ||dW||² left unexplained: mean over runs ± half the 95 % t-interval (three runs or more).",
    )
    yield Table(
        tabulate_differences(runs, labels, compared),
        "Dual LoRA minus the others at the same budget, paired by run (above 0: Dual LoRA fits less).",
    )


def group_fits(runs: list[FittedRun]) -> Iterator[tuple[dict[str, str], str, list[FittedRun]]]:
    """Yield the first cells of each line, the weight and the runs: for every task, row and weight."""
    for (model_task, label), some in group_runs(runs).items():
        for target in dict.fromkeys(target for target, _ in some[0].shares):
            yield name_model_task(model_task, runs) | {"updates of": label, "weight": target}, target, some


def tabulate_unexplained(runs: list[FittedRun], labels: dict[str, str]) -> pd.DataFrame:
    """Return a row for each task and weight, a column for each form, with LoRA's optimum by SVD next to it."""
    lines = []
    for line, target, some in group_fits(runs):
        for method, label in labels.items():
            line[label] = format_mean([run.shares[target, method] for run in some], ".3f")
            if (target, method) in some[0].optima:
                line[f"{label} (SVD)"] = f"{np.mean([run.optima[target, method] for run in some]):.3f}"
        lines.append(line)
    return pd.DataFrame(lines)


def tabulate_differences(runs: list[FittedRun], labels: dict[str, str], compared: dict[str, str]) -> pd.DataFrame:
    """Return Dual LoRA's unexplained share minus each other form's."""
    lines = []
    for line, target, some in group_fits(runs):
        for method, label in labels.items():
            ours = compared[method]
            if method != ours:
                differences = [run.shares[target, ours] - run.shares[target, method] for run in some]
                line[label] = format_mean(differences, "+.3f")
        lines.append(line)
    return pd.DataFrame(lines)
