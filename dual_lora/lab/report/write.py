"""The report of an experiment, from only the run records. The same records give the same bytes.

runs/STUDY/report/ (or next to it, see `choose_folder`)
    table.md         verdicts, the table, further differences, published figures
    table.tex        its tables for LaTeX, with booktabs
    table.csv        every value of every run, with the command that makes it
    differences.csv  every comparison with a baseline
    report.html      all of it as one page that needs nothing else; a click on a cell copies its command
    *.png, *.pdf     figures
    .figures.json    which figures the report wrote, with their SHA-256; other files are left alone
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dual_lora import paper
from dual_lora.lab.config.paths import read_json_object
from dual_lora.lab.errors import UserError
from dual_lora.lab.present.document import Block, Image, Text, render_html, render_latex, render_markdown
from dual_lora.lab.record.mirror import open_mirror
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.summary import find_upload_commands
from dual_lora.lab.report.analyses.kinds import iterate_analysis_blocks
from dual_lora.lab.report.command_lines import build_command
from dual_lora.lab.report.comparison.blocks import (
    iterate_exploratory_blocks,
    iterate_floor_blocks,
    iterate_power_blocks,
    iterate_verdict_blocks,
    tabulate_comparisons,
)
from dual_lora.lab.report.comparison.comparisons import Comparisons, compare_outcomes
from dual_lora.lab.report.comparison.floors import (
    Floor,
    describe_constant_runs,
    describe_failed_runs,
    describe_unscored_floors,
    find_floors,
    find_unranked,
)
from dual_lora.lab.report.comparison.matches import Predictions
from dual_lora.lab.report.figures.draw import draw_figures
from dual_lora.lab.report.learning_rates import tabulate_learning_rates
from dual_lora.lab.report.protocol import iterate_protocol_blocks
from dual_lora.lab.report.published import iterate_published_blocks, tabulate_published
from dual_lora.lab.report.table import (
    build_main_table,
    find_unreadable,
    iterate_notes,
    letter_reasons,
    tabulate_adapters,
)
from dual_lora.lab.report.values import ModelTask, build_frame
from dual_lora.lab.study.experiment import Cell, Experiment
from dual_lora.lab.study.outcome import Outcome
from dual_lora.lab.study.output_path import choose_path
from dual_lora.lab.system.files import write_text
from dual_lora.lab.system.sealed import hash_file

TABLE_FILE, VALUES_FILE = "table.md", "table.csv"
DIFFERENCES_FILE, FIGURES_FILE = "differences.csv", ".figures.json"
FLOAT_FORMAT = "%.10g"  # of the differences: the last digits of a sum depend on the number of threads
TITLE_END = re.compile(r"\((\S+), scale=(\w+)\)$")  # of a report's first line: whose it is


@dataclass(frozen=True)
class Findings:
    """What a report is made of: every value, the floors, the tasks that rank no methods and why, the comparisons, what
    of the records cannot be read or scored, and which runs learned nothing or predict one value."""

    values: pd.DataFrame
    floors: list[Floor]
    unranked: dict[ModelTask, str]
    comparisons: Comparisons
    unreadable: list[str]
    failed: list[str]

    @classmethod
    def compute(cls, experiment: Experiment, outcomes: list[Outcome]) -> "Findings":
        """Compute them from the records."""
        predictions = Predictions()
        floors = find_floors(experiment, outcomes, predictions)
        unranked = find_unranked(floors)
        comparisons = compare_outcomes(experiment, outcomes, predictions, unranked)
        unreadable = [*find_unreadable(experiment, outcomes), *describe_unscored_floors(floors)]
        failed = [
            *describe_failed_runs(experiment, outcomes, floors),
            *describe_constant_runs(experiment, outcomes, predictions),
        ]
        return cls(build_frame(experiment, outcomes, unranked), floors, unranked, comparisons, unreadable, failed)


def choose_folder(experiment: Experiment, cells: list[Cell], study: Path) -> Path:
    """Return the folder that a report is written to: `report` in a study's folder. Another experiment's report there is
    left alone, and so is one with runs that this one leaves out, because the command line chose some: then it is
    `report_NAME_SCALE`, or `report_selection`."""
    places = list_places(experiment, cells)
    return choose_path(
        lambda ending: study / f"report{ending}",
        experiment,
        find_owner,
        lambda folder: bool(list_shown_places(experiment, folder) - places),
    )


def find_owner(folder: Path) -> tuple[str, str] | None:
    """Return the name and the scale of the experiment that a folder holds the report of; None if it holds none."""
    try:
        first = (folder / TABLE_FILE).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, ValueError):
        return None
    found = TITLE_END.search(first)
    return found and found.groups()


def list_places(experiment: Experiment, cells: list[Cell]) -> set[tuple[str, ...]]:
    """Return the places of cells in a table, as text: what heads their row, label, column and seed."""
    unknown = [Outcome(cell, None, None, None) for cell in cells]
    return read_places(experiment, build_frame(experiment, unknown).to_csv(index=False))


def list_shown_places(experiment: Experiment, folder: Path) -> set[tuple[str, ...]]:
    """Return the places of finished runs in a written report, as `list_places`; none if it cannot be read, or has other
    headings."""
    try:
        return read_places(experiment, (folder / VALUES_FILE).read_text(encoding="utf-8"), finished=True)
    except (OSError, ValueError, KeyError):
        return set()


def read_places(experiment: Experiment, text: str, finished: bool = False) -> set[tuple[str, ...]]:
    """Return the places of the runs in the text of a report's table.csv. finished: of only those that have values.

    Raises:
        ValueError, KeyError: it is another file.
    """
    values = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    values = values[(values["run"] != "") & (values["value"] != "")] if finished else values
    return set(values[[*experiment.rows, "label", "column", "seed"]].itertuples(index=False, name=None))


def write_report(
    experiment: Experiment, outcomes: list[Outcome], folder: Path, findings: Findings | None = None
) -> str:
    """Write the report below `folder` and return its Markdown. findings: what `Findings.compute` gives, where it is
    known.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    findings = findings or Findings.compute(experiment, outcomes)
    blocks = list(iterate_blocks_of_report(experiment, outcomes, folder, findings))
    title = f"{experiment.title} ({experiment.name}, scale={experiment.scale})"
    text = render_markdown([Text(title, heading=True), *blocks])
    write_text(folder / TABLE_FILE, text)
    write_text(folder / "table.tex", render_latex(blocks, experiment.study))
    write_text(folder / "report.html", render_html(blocks, title))
    commands = [build_command([outcomes[i].settings]) if i >= 0 else "" for i in findings.values["outcome"]]
    values = findings.values.drop(columns="outcome").assign(command=commands)
    write_text(folder / VALUES_FILE, values.to_csv(index=False))
    differences = tabulate_comparisons(findings.comparisons.all).to_csv(index=False, float_format=FLOAT_FORMAT)
    write_text(folder / DIFFERENCES_FILE, differences)
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
            path.unlink(missing_ok=True)
    written = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".pdf") and path.stem in figures]
    write_text(file, json.dumps({path.name: hash_file(path) for path in written}, indent=1) + "\n")


def iterate_blocks_of_report(
    experiment: Experiment, outcomes: list[Outcome], folder: Path, findings: Findings
) -> Iterator[Block]:
    """Yield what the report consists of, its figures written."""
    values, comparisons = findings.values, findings.comparisons
    reasons = letter_reasons(values)
    if experiment.scale == "smoke":
        yield Text("Smoke: a few steps of bundled models show that the harness works; the numbers mean nothing.")
    if experiment.limit:
        yield Text(f"Limit: {experiment.limit}.")
    yield from iterate_verdict_blocks(comparisons)
    if experiment.analyse:
        blocks = iterate_analysis_blocks(experiment, outcomes, findings.floors, folder)
        yield from iterate_until_error(blocks, "the analyses")
    yield Text("Runs", heading=True)
    yield build_main_table(experiment, outcomes, values, reasons)
    notes = iterate_notes(experiment, outcomes, values, reasons, findings.unranked, findings.unreadable)
    yield Text(items=tuple(notes))
    yield from iterate_floor_blocks(findings.floors)
    if findings.failed:
        yield Text(items=tuple(findings.failed))
    yield from draw_figures(experiment, outcomes, values, comparisons, findings.floors, folder)
    yield from iterate_exploratory_blocks(comparisons)
    yield from iterate_power_blocks(comparisons)
    if experiment.tune:
        yield tabulate_learning_rates(experiment, outcomes)
    yield from iterate_protocol_blocks(experiment, outcomes)
    yield from iterate_published_blocks(experiment, outcomes)
    if any(outcome.result for outcome in outcomes):
        yield Text("As it ran", heading=True)
        yield tabulate_adapters(outcomes)


def iterate_until_error(blocks: Iterator[Block], what: str) -> Iterator[Block]:
    """Yield blocks up to the first that cannot be made, and then why."""
    try:
        yield from blocks
    except UserError as error:
        yield Text(f"The rest of {what} is missing: {error}")


def mirror_report(experiment: Experiment, outcomes: list[Outcome], folder: Path, values: pd.DataFrame) -> None:
    """Send a written report to W&B, unless it is disabled, as a run of its own in the study's group: its tables, all
    values, every figure. values: those of its findings."""
    wandb = outcomes[0].settings.wandb
    if wandb.mode == "disabled":
        return
    study, report = folder.parent.name, folder.name
    mirror = open_mirror(
        wandb.mode,
        project=wandb.project,
        entity=wandb.entity,
        run_id=f"{study}-{report}",
        name=f"{study} {report}",
        group=study,
        job_type="report",
        tags=[experiment.name, experiment.scale],
        config={"experiment": experiment.name, "scale": experiment.scale},
        folder=folder.parent,
    )
    tables = {"table": build_main_table(experiment, outcomes, values, letter_reasons(values)).cells}
    tables |= {f"published/{name}": tabulate_published(paper.load_table(name)) for name in experiment.published}
    tables = {name: cells.astype(str) for name, cells in tables.items()}  # W&B takes one type a column
    files = {"values": VALUES_FILE, "differences": DIFFERENCES_FILE}
    tables |= {name: pd.read_csv(folder / file) for name, file in files.items() if (folder / file).stat().st_size > 1}
    mirror.send_report(tables, {path.stem: path for path in sorted(folder.glob("*.png"))})
    mirror.finish()
    for command in find_upload_commands(Record(folder.parent)):
        print(f"upload the report: {command}")
