"""The report of an experiment, from run records alone. The same records give the same bytes.

runs/STUDY/report/
    table.md         the table, differences, published figures
    table.tex        its tables for LaTeX, with booktabs
    table.csv        every value of every run
    report.html      all of it as one page that needs nothing else
    *.png, *.pdf     figures
"""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pandas as pd

import tasks
from dual_lora import paper
from dual_lora.lab import comparison, document, figures, ranks_report
from dual_lora.lab.document import Block, Image, Table, Text
from dual_lora.lab.drawing import save
from dual_lora.lab.experiments import Experiment
from dual_lora.lab.grid import Done
from dual_lora.lab.mirror import open_mirror
from dual_lora.lab.results import FIELDS, MARKS, Column, columns, frame, heading

MISSING = "–"
# Scores of which less is better.
LOWER = ("TER",)


def write(experiment: Experiment, done: list[Done], folder: Path) -> str:
    """Write the report below `folder` and return its table and sentences as Markdown.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = list(body(experiment, done, folder))
    title = f"{experiment.title} ({experiment.name}, scale={experiment.scale})"
    text = document.markdown([Text(title, heading=True), *blocks])
    (folder / "table.md").write_text(text)
    (folder / "table.tex").write_text(document.latex(blocks, experiment.study))
    (folder / "report.html").write_text(document.html(blocks, title))
    frame(experiment, done).drop(columns="cell").to_csv(folder / "table.csv", index=False)
    remove_others(folder, {block.path.stem for block in blocks if isinstance(block, Image)})
    return f"\n{text}\nreport: {folder}"


def remove_others(folder: Path, figures: set[str]) -> None:
    """Remove figures of an earlier report that this one does not have."""
    for path in folder.iterdir():
        if path.suffix in (".png", ".pdf") and path.stem not in figures:
            path.unlink()


def body(experiment: Experiment, done: list[Done], folder: Path) -> Iterator[Block]:
    """Yield what the report consists of, its figures written."""
    values = frame(experiment, done)
    reasons = numbered(values)
    if experiment.scale == "smoke":
        yield Text("Smoke: a few steps of bundled models show that the harness works; the numbers mean nothing.")
    yield main_table(experiment, done, values, reasons)
    yield Text(items=tuple(notes(experiment, done, values, reasons)))
    if experiment.analyse:
        yield from ranks_report.blocks(done, folder)
    elif drawn := figures.draw(experiment, values, done):
        yield Image(save(drawn, folder, "figure")[0], f"{experiment.title}; {figures.spread(values)}")
    yield from comparison.blocks(experiment, done, values)
    yield from published(experiment)


def numbered(values: pd.DataFrame) -> dict[str, str]:
    """Return a letter for every reason why a value is missing."""
    reasons = dict.fromkeys(values.loc[values["value"].isna(), "reason"].dropna())
    return dict(zip(reasons, ascii_lowercase, strict=False))


def main_table(experiment: Experiment, done: list[Done], values: pd.DataFrame, reasons: dict[str, str]) -> Table:
    """Return the experiment's table: a row for each label, best values bold, published rows of the same model, method
    and rank below ours."""
    found, lines, best, aside = columns(experiment, done), [], [], []
    for name, group in values.groupby(experiment.rows, sort=False) if experiment.rows else [((), values)]:
        heads, top = dict(zip(map(heading, experiment.rows), map(str, name), strict=True)), leaders(group, found)
        for label, part in group.groupby("label", sort=False):
            cells = {shown_head(c): shown(part[part["column"] == c.head], c, done, reasons) for c in found}
            runs = [done[i] for i in sorted(set(part["cell"]) - {-1})]
            lines.append({**heads, "method": label, **cells, **cost(runs, found)})
            best.append({key: (label, key) in top for key in lines[-1]})
            for row in published_twins(experiment, runs):
                aside.append(len(lines))
                lines.append({**heads, "method": f"{label} [{row.table}]", **quoted(row, found)})
                best.append({})
    cells = pd.DataFrame(lines).fillna("")
    bold = pd.DataFrame(best).reindex(columns=cells.columns).fillna(False).astype(bool)
    return Table(cells, caption(experiment, done), bold, frozenset(aside))


def caption(experiment: Experiment, done: list[Done]) -> str:
    """Return what the numbers are."""
    seeds = ", ".join(map(str, sorted({cell.settings.seed for cell in done})))
    names = ", ".join(sorted({tasks.load(cell.settings.task.name).metric for cell in done}))
    kind = f"Main score ({names}), %, by {experiment.columns}"
    if experiment.columns == "published":
        kind = "Scores as the published table has them"
    elif isinstance(experiment.columns, dict):
        kind = "Values of the runs"
    best = "" if kind == "Values of the runs" else "; best mean bold"
    return f"{kind}: mean ± sample standard deviation (number of runs); seeds {seeds}{best}."


def shown_head(column: Column) -> str:
    return f"{column.head:g}" if isinstance(column.head, float) else str(column.head)


def shown(part: pd.DataFrame, column: Column, done: list[Done], reasons: dict[str, str]) -> str:
    """Return a cell: mean ± standard deviation (n) and marks, or a dash with its reason's letter; empty where no run
    was asked for."""
    if part.empty:
        return ""
    scores = part["value"].dropna()
    letters = "".join(sorted({reasons[r] for r in part.loc[part["value"].isna(), "reason"].dropna()}))
    letters = f" [{letters}]" if letters else ""
    if scores.empty:
        return MISSING + letters
    style = column.format(done[0].settings.task.name)
    spread = f" ± {style.format(scores.std(ddof=1))}" if len(scores) > 1 else ""
    marks = "".join(sorted(set("".join(part["marks"]))))
    return f"{style.format(scores.mean())}{spread} ({len(scores)}){marks}{letters}"


def leaders(group: pd.DataFrame, found: list[Column]) -> set[tuple[str, str]]:
    """Return the (label, heading) of the best mean of every column of scores, or of the whole table where its columns
    are values of a setting; none where nothing stands beside it."""
    means = group.groupby(["label", "column"], sort=False)["value"].mean().dropna()
    metrics = [column for column in found if column.task or column.parts]
    families = [[c] for c in metrics] or [[c for c in found if c.field not in FIELDS]]
    top = set()
    for family in families:
        part = means[means.index.get_level_values("column").isin([c.head for c in family])]
        if len(part) > 1 and not np.isclose(part.min(), part.max(), rtol=0, atol=1e-9):
            best = part.min() if family[0].field in LOWER else part.max()
            names = {c.head: shown_head(c) for c in family}
            top |= {(label, names[head]) for label, head in part.index[np.isclose(part, best, rtol=0, atol=1e-9)]}
    return top


def cost(runs: list[Done], found: list[Column]) -> dict[str, str]:
    """Return the trained weights and the seconds a step of a row's runs, unless these are the table's columns."""
    if any(column.field in FIELDS for column in found):
        return {}
    results = [cell.result for cell in runs if cell.result]
    trained = sorted({result["trainable_parameters"] for result in results})
    seconds = sorted(FIELDS["seconds_per_step"][0](result) for result in results)
    return {"trained": ranged(trained, "{:,.0f}"), "s/step": ranged(seconds, "{:.2f}")}


def ranged(numbers: list[float], style: str) -> str:
    """Return the smallest and the largest of sorted numbers, or the one that all print as."""
    ends = list(dict.fromkeys(style.format(numbers[i]) for i in ((0, -1) if numbers else ())))
    return " to ".join(ends) or MISSING


def published_twins(experiment: Experiment, runs: list[Done]) -> Iterator[paper.Row]:
    """Yield the published rows of a row's own model, method and rank."""
    if not runs:
        return
    settings = runs[0].settings
    own = {"model": settings.model.name, "method": settings.method.name, "rank": settings.method.rank}
    for table in map(paper.load, experiment.published):
        for row in table.rows if table.ours and {"model", "method"} <= set(table.keys) else ():
            if all(row.keys.get(key) in (value, None) for key, value in own.items()):
                yield row


def quoted(row: paper.Row, found: list[Column]) -> dict[str, str]:
    """Return what a published row prints under our headings; other than published values carry their status."""
    table, cells = paper.load(row.table), {}
    for column in found:
        ours = {f"{column.task}:{column.field}"} if column.task else set()
        for head, value in row.values.items():
            if (head == column.head or table.ours.get(head) in ours) and not cells.get(shown_head(column)):
                cells[shown_head(column)] = value.text + ("" if value.status == "published" else f" [{value.status}]")
    return cells or {"method": f"[{row.table}]: " + ", ".join(f"{k} {v.text}" for k, v in row.values.items())}


def notes(experiment: Experiment, done: list[Done], values: pd.DataFrame, reasons: dict[str, str]) -> Iterator[str]:
    """Yield what a reader must know of the table: reasons, marks, learning rates, data, machines and code."""
    for reason, letter in reasons.items():
        yield f"{MISSING} [{letter}]: {reason}"
    for mark in sorted(set("".join(values["marks"].dropna()))):
        yield f"{mark}: {MARKS[mark]}"
    yield from rates(experiment, done)
    files = {
        f"{name} {facts['origin']}, {facts['rows']:,} rows"
        for cell in done
        for name, facts in (cell.result["data"].items() if cell.result else ())
    }
    if files:
        yield f"data: {'; '.join(sorted(files))}"
    places = [cell.record.read("environment.json") for cell in done if cell.result]
    if places:
        machines = sorted({f"{p.get('accelerator') or p.get('processor')}, {p['threads']} threads" for p in places})
        yield f"machines: {'; '.join(machines)}"
        yield f"code: {', '.join(sorted({(p['commit'] or 'unknown')[:10] for p in places}))}"


def rates(experiment: Experiment, done: list[Done]) -> Iterator[str]:
    """Yield how each row came by its learning rate."""
    tune = experiment.tune
    for label in experiment.cells:
        cells = [cell for cell in done if cell.cell.label == label and (cell.result or not cell.cell.tuning)]
        used = sorted({cell.settings.train.lr for cell in cells})
        text = ", ".join(f"{rate:g}" for rate in used) or "not chosen yet"
        if tune and label in tune.grid:
            grid = ", ".join(f"{float(rate):g}" for rate in tune.grid[label])
            yield (
                f"learning rate, {label}: {text}; chosen from {grid} ({len(tune.grid[label])} runs a task) by the main "
                f"score on {tune.where()}, seed {tune.seed}"
            )
        else:
            yield f"learning rate, {label}: {text}; given, not tuned here"


def published(experiment: Experiment) -> Iterator[Block]:
    """Yield the published tables an experiment is set beside, whatever our models are."""
    for table in map(paper.load, experiment.published):
        lines = []
        for row in table.rows:
            values = {head: value.text + status(value.status, table) for head, value in row.values.items()}
            lines.append({**{k: MISSING if v is None else v for k, v in row.keys.items()}, **values})
        cells = pd.DataFrame(lines).fillna(MISSING)
        about = "; ".join(f"{key}: {value}" for key, value in table.protocol.items())
        yield Text(f"Published: {table.title}", heading=True)
        note = "as published" if experiment.scale == "full" else "other models, data and lengths of training than above"
        text = f"{table.title}: {note} ({table.status}; {table.source[0]}; {about})."
        yield Table(cells, text, aside=frozenset(range(len(cells))))


def status(value: str, table: paper.Table) -> str:
    return "" if value == table.status else f" [{value}]"


def mirrored(experiment: Experiment, done: list[Done], folder: Path) -> None:
    """Send a written report to W&B, as a run of its own in the study's group: all values as a table, every figure."""
    wandb = done[0].settings.wandb
    study = folder.parent.name
    mirror = open_mirror(
        wandb.mode,
        project=wandb.project,
        entity=wandb.entity,
        run_id=f"{study}-report",
        name=f"{study} report",
        group=study,
        job_type="report",
        tags=[experiment.name, experiment.scale],
        config={"experiment": experiment.name, "scale": experiment.scale},
        folder=folder.parent,
    )
    figures = {path.stem: path for path in sorted(folder.glob("*.png"))}
    mirror.show({"values": pd.read_csv(folder / "table.csv")}, figures)
    mirror.finish()
