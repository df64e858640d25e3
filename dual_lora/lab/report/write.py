"""The report of an experiment, from run records alone. The same records give the same bytes.

runs/STUDY/report/
    table.md         the table, differences, published figures
    table.tex        its tables for LaTeX, with booktabs
    table.csv        every value of every run
    differences.csv  every comparison with a baseline
    report.html      all of it as one page that needs nothing else
    *.png, *.pdf     figures
    .figures.json    which figures the report wrote, with their SHA-256; other files are left alone
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dual_lora import paper
from dual_lora.lab.errors import UserError
from dual_lora.lab.present.document import Block, Image, Text, render_html, render_latex, render_markdown
from dual_lora.lab.present.drawing import save_figure
from dual_lora.lab.record.mirror import open_mirror
from dual_lora.lab.report.comparison import (
    Pair,
    compare_cells,
    iterate_difference_blocks,
    iterate_sentences,
    tabulate_pairs,
)
from dual_lora.lab.report.figures import describe_spread, draw_results
from dual_lora.lab.report.learning_rates import tabulate_learning_rates
from dual_lora.lab.report.published import iterate_published_blocks, tabulate_published
from dual_lora.lab.report.ranks import iterate_rank_blocks
from dual_lora.lab.report.table import build_main_table, iterate_notes, letter_reasons
from dual_lora.lab.report.values import build_frame
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome
from dual_lora.lab.system.files import read_json_object, write_text
from dual_lora.lab.system.sealed import hash_file

DIFFERENCES_FILE, FIGURES_FILE = "differences.csv", ".figures.json"


def write_report(experiment: Experiment, done: list[Outcome], folder: Path) -> str:
    """Write the report below `folder` and return its table and sentences as Markdown.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    main, further = compare_cells(experiment, done)
    blocks = list(iterate_blocks_of_report(experiment, done, folder, main, further))
    title = f"{experiment.title} ({experiment.name}, scale={experiment.scale})"
    text = render_markdown([Text(title, heading=True), *blocks])
    write_text(folder / "table.md", text)
    write_text(folder / "table.tex", render_latex(blocks, experiment.study))
    write_text(folder / "report.html", render_html(blocks, title))
    write_text(folder / "table.csv", build_frame(experiment, done).drop(columns="cell").to_csv(index=False))
    write_text(folder / DIFFERENCES_FILE, tabulate_pairs([*main, *further]).to_csv(index=False))
    remove_stale_figures(folder, {block.path.stem for block in blocks if isinstance(block, Image)})
    return f"\n{text}\nreport: {folder}"


def remove_stale_figures(folder: Path, figures: set[str]) -> None:
    """Remove figures that an earlier report wrote and this one does not have; remember those of this one.

    figures: the names of this report's, without their endings. Files that no report wrote, or that were changed since,
    stay.

    Raises:
        OSError: a file cannot be read, removed or written.
    """
    file = folder / FIGURES_FILE
    try:
        known = read_json_object(file, "") if file.is_file() else {}
    except UserError:  # then nothing is removed
        known = {}
    for name, digest in known.items():
        path = folder / Path(name).name
        if path.stem not in figures and path.is_file() and hash_file(path) == digest:
            path.unlink()
    written = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".pdf") and path.stem in figures]
    write_text(file, json.dumps({path.name: hash_file(path) for path in written}, indent=1) + "\n")


def iterate_blocks_of_report(
    experiment: Experiment, done: list[Outcome], folder: Path, main: list[Pair], further: list[Pair]
) -> Iterator[Block]:
    """Yield what the report consists of, its figures written. main, further: the comparisons."""
    values = build_frame(experiment, done)
    reasons = letter_reasons(values)
    if experiment.scale == "smoke":
        yield Text("Smoke: a few steps of bundled models show that the harness works; the numbers mean nothing.")
    if experiment.limit:
        yield Text(f"Limit: {experiment.limit}.")
    if experiment.analyse:
        yield from iterate_until_error(iterate_rank_blocks(done, folder), "the analyses")
        yield Text("Runs", heading=True)
    yield build_main_table(experiment, done, values, reasons)
    yield Text(items=tuple(iterate_notes(experiment, done, values, reasons)))
    if experiment.tune:
        yield tabulate_learning_rates(experiment, done)
    if not experiment.analyse and (drawn := draw_results(experiment, values, done)):
        yield Image(
            save_figure(drawn, folder, "figure")[0], f"{experiment.title}; {describe_spread(experiment, values)}"
        )
    yield from iterate_difference_blocks(experiment, done, main, further)
    yield from iterate_published_blocks(experiment, done)
    yield from iterate_sentences(main, further)


def iterate_until_error(blocks: Iterator[Block], what: str) -> Iterator[Block]:
    """Yield blocks up to the first that cannot be told, and then why."""
    try:
        yield from blocks
    except UserError as error:
        yield Text(f"Of {what} no more can be told: {error}")


def mirror_report(experiment: Experiment, done: list[Outcome], folder: Path) -> None:
    """Send a written report to W&B, as a run of its own in the study's group: its tables, all values, every
    figure."""
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
    values = build_frame(experiment, done)
    tables = {"table": build_main_table(experiment, done, values, letter_reasons(values)).cells}
    tables |= {f"published/{name}": tabulate_published(paper.load(name)) for name in experiment.published}
    tables = {name: cells.astype(str) for name, cells in tables.items()}  # W&B takes one type a column
    files = {"values": "table.csv", "differences": DIFFERENCES_FILE}
    tables |= {name: pd.read_csv(folder / file) for name, file in files.items() if (folder / file).stat().st_size > 1}
    mirror.send_report(tables, {path.stem: path for path in sorted(folder.glob("*.png"))})
    mirror.finish()
