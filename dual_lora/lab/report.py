"""The report of an experiment, from run records alone: a table (Markdown, CSV) and a figure."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from dual_lora.lab.experiments import Experiment
from dual_lora.lab.grid import setting
from dual_lora.lab.settings import Settings

MISSING = "–"


def frame(experiment: Experiment, cells: list[tuple[Settings, dict | None]]) -> pd.DataFrame:
    """Return one row a run: its place in the table, its main score in percent (none while missing), its size."""
    rows = []
    for settings, result in cells:
        row = {"row": setting(settings, experiment.rows), "column": setting(settings, experiment.columns)}
        if result:
            row |= {
                "score": 100 * result["metrics"][result["metric"]],
                "trained": result["trainable_parameters"],
            }
        rows.append({**row, "seed": settings.seed})
    return pd.DataFrame(rows, columns=["row", "column", "seed", "score", "trained"])


def cell(scores: pd.Series) -> str:
    """Return mean ± sample standard deviation (number of seeds), or a dash where no run is finished."""
    n = scores.count()
    if n == 0:
        return MISSING
    spread = f" ± {scores.std(ddof=1):.1f}" if n > 1 else ""
    return f"{scores.mean():.1f}{spread} ({n})"


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `cell`s, rows and columns in the experiment's order, with the number of trained weights."""
    cells = runs.groupby(["row", "column"], sort=False)["score"].agg(cell).unstack(sort=False).fillna("")
    columns = (
        sorted(cells.columns, key=lambda c: (isinstance(c, str), c))
        if pd.api.types.is_numeric_dtype(runs["column"])
        else cells.columns
    )
    trained = runs.groupby("row", sort=False)["trained"].max()
    cells = cells[columns].rename(columns=lambda c: f"{c:g}" if isinstance(c, float) else str(c))
    cells["trained"] = trained.map(lambda n: MISSING if pd.isna(n) else f"{n:,.0f}")
    return cells


def figure(runs: pd.DataFrame, experiment: Experiment, path: Path) -> None:
    """Draw the mean score over the columns, a line for each row, its standard deviation over seeds as a bar."""
    fig, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, group in runs.dropna(subset="score").groupby("row", sort=False):
        scores = group.groupby("column", sort=pd.api.types.is_numeric_dtype(runs["column"]))["score"]
        mean, std = scores.mean(), scores.std(ddof=1).fillna(0)
        axes.errorbar(mean.index, mean, yerr=std, marker="o", capsize=3, label=name)
    if pd.api.types.is_numeric_dtype(runs["column"]) and runs["column"].gt(0).all():
        values = sorted(set(runs["column"]))
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(values, [f"{value:g}" for value in values], rotation=45)
    axes.set(xlabel=experiment.columns, ylabel="score, %", title=experiment.name)
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(fig)


def sources(cells: list[tuple[Settings, dict | None]]) -> str:
    """Return a footnote with the files the finished runs read, as they name themselves, and how many rows of them."""
    found = {
        f"{name} {facts['origin']}, {facts['rows']:,} rows"
        for _, result in cells
        for name, facts in (result["data"].items() if result else ())
    }
    return f"\n\nData: {'; '.join(sorted(found))}." if found else ""


def write(experiment: Experiment, cells: list[tuple[Settings, dict | None]], folder: Path) -> str:
    """Write table.md, table.csv and figure.png below `folder`; return the table as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = frame(experiment, cells)
    seeds = ", ".join(map(str, sorted(set(runs["seed"]))))
    metrics = ", ".join(sorted({result["metric"] for _, result in cells if result})) or "none yet"
    note = f"Main score ({metrics}) in percent: mean ± sample standard deviation (runs); seeds {seeds}; "
    note += f"{MISSING}: not finished."
    text = f"{table(runs).rename_axis(None).rename_axis(None, axis=1).to_markdown()}\n\n{note}{sources(cells)}\n"
    (folder / "table.md").write_text(text)
    runs.to_csv(folder / "table.csv", index=False)
    if runs["score"].notna().any():
        figure(runs, experiment, folder / "figure.png")
    return f"\n{text}\nreport: {folder}"
