"""The kinds of analyses an experiment may ask for: which file each writes into a run's folder, and what it reports.

Rows that are floors train no weight update and are not analysed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dual_lora.lab.errors import require
from dual_lora.lab.present.document import Block
from dual_lora.lab.record.record import ANALYSIS_FILE, CURVATURE_FILE, TRUNCATION_FILE
from dual_lora.lab.report.analyses.curvature import iterate_curvature_blocks
from dual_lora.lab.report.analyses.ranks import iterate_rank_blocks
from dual_lora.lab.report.analyses.truncation import iterate_truncation_blocks
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome


@dataclass(frozen=True)
class Kind:
    """file: the analysis in a run's folder. keys: what it must hold. iterate_blocks: what a report says of all runs."""

    file: str
    keys: tuple[str, ...]
    iterate_blocks: Callable[[list[Outcome], list[Floor], Path], Iterator[Block]]


KINDS = {
    "ranks": Kind(ANALYSIS_FILE, ("rows", "labels"), iterate_rank_blocks),
    "truncation": Kind(TRUNCATION_FILE, ("ranks", "scores", "kept"), iterate_truncation_blocks),
    "curvature": Kind(CURVATURE_FILE, ("eigenvalue", "rows"), iterate_curvature_blocks),
}


def is_analysed(experiment: Experiment, cell: Outcome) -> bool:
    """Whether a run is one that the experiment analyses, once it is finished."""
    return bool(experiment.analyse) and cell.result is not None and cell.cell.label not in experiment.floors


def analyse_missing(experiment: Experiment, cell: Outcome) -> None:
    """Analyse a finished run that has no analysis yet.

    Raises:
        UserError: the run cannot be loaded or taken apart.
    """
    wanted = is_analysed(experiment, cell)
    if wanted and not (cell.record.folder / KINDS[experiment.analyse].file).is_file():
        print(f"analysing {cell.record.name}", flush=True)
        alone = replace(cell.settings.hardware, devices=1, sharding="none")  # whatever trained it
        load_analysis(experiment.analyse)(replace(cell.settings, hardware=alone), cell.record)


def load_analysis(kind: str) -> Callable:
    """Return the function that analyses a run. It imports torch, which a report does not need."""
    if kind == "truncation":
        from dual_lora.lab.weights.truncate import truncate_run

        return truncate_run
    if kind == "curvature":
        from dual_lora.lab.weights.curvature import measure_curvature

        return measure_curvature
    from dual_lora.lab.weights.analyse import analyse_run

    return analyse_run


def check_analysis(experiment: Experiment, cell: Outcome) -> None:
    """Refuse an analysis that is missing or damaged.

    Raises:
        UserError: with the run and the file.
    """
    if is_analysed(experiment, cell):
        kind = KINDS[experiment.analyse]
        path = cell.record.folder / kind.file
        require(path.exists(), f"{path}: missing; sweep.py without run=false analyses the run")
        cell.record.read_sealed(kind.file, *kind.keys)


def iterate_analysis_blocks(
    experiment: Experiment, done: list[Outcome], floors: list[Floor], folder: Path
) -> Iterator[Block]:
    """Yield what the report says of the analyses, as far as there are any."""
    kind = KINDS[experiment.analyse]
    found = [cell for cell in done if is_analysed(experiment, cell) and (cell.record.folder / kind.file).is_file()]
    if found:
        yield from kind.iterate_blocks(found, floors, folder)
