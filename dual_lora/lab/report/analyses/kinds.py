"""The kinds of analyses an experiment may ask for: which file each writes into a run's folder, and what it reports.

Rows that are floors train no weight update and are not analysed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.present.document import Block
from dual_lora.lab.record.record import (
    ANALYSIS_FILE,
    CURVATURE_FILE,
    FIT_FILE,
    SIMILARITY_FILE,
    TRUNCATION_FILE,
    Record,
)
from dual_lora.lab.report.analyses.curvature import iterate_curvature_blocks
from dual_lora.lab.report.analyses.entries import iterate_entry_blocks
from dual_lora.lab.report.analyses.fit import iterate_fit_blocks
from dual_lora.lab.report.analyses.ranks import iterate_rank_blocks
from dual_lora.lab.report.analyses.similarity import iterate_similarity_blocks
from dual_lora.lab.report.analyses.truncation import iterate_truncation_blocks
from dual_lora.lab.report.comparison.floors import Floor, get_model_task
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome
from dual_lora.lab.system.libraries import import_heavy_libraries

SAME_SEED, OTHER_SEED = "same seed", "another seed"  # runs of the reference row


@dataclass(frozen=True)
class Kind:
    """file: the analysis in a run's folder. keys: what it must hold. function: what makes it, as MODULE:FUNCTION of
    `lab.weights`. iterate_blocks: what a report says of all runs."""

    file: str
    keys: tuple[str, ...]
    function: str
    iterate_blocks: Callable[[list[Outcome], Path, list[Floor]], Iterator[Block]]


KINDS = {
    "ranks": Kind(ANALYSIS_FILE, ("rows", "labels"), "analyse:analyse_run", iterate_rank_blocks),
    "entries": Kind(ANALYSIS_FILE, ("rows", "labels"), "analyse:analyse_run", iterate_entry_blocks),
    "truncation": Kind(
        TRUNCATION_FILE, ("ranks", "scores", "kept"), "truncate:truncate_run", iterate_truncation_blocks
    ),
    "curvature": Kind(CURVATURE_FILE, ("eigenvalue", "rows"), "curvature:measure_curvature", iterate_curvature_blocks),
    "similarity": Kind(
        SIMILARITY_FILE, ("rows", "references"), "similarity:measure_similarity", iterate_similarity_blocks
    ),
    "fit": Kind(FIT_FILE, ("rows", "labels"), "fit_updates:fit_updates", iterate_fit_blocks),
}


def is_analysed(experiment: Experiment, outcome: Outcome) -> bool:
    """Return whether a run is one that the experiment analyses, once it is finished."""
    return bool(experiment.analyse) and outcome.result is not None and outcome.label not in experiment.floors


def analyse_missing(experiment: Experiment, outcome: Outcome, outcomes: list[Outcome]) -> None:
    """Analyse a finished run that has no analysis yet. outcomes: all of the experiment's.

    Raises:
        UserError: the run cannot be loaded or taken apart.
    """
    if not is_analysed(experiment, outcome):
        return
    exists = (outcome.record.folder / KINDS[experiment.analyse].file).is_file()
    if not (exists and is_up_to_date(experiment, outcome, outcomes)):
        print(f"analysing {outcome.record.name}", flush=True)
        single = replace(outcome.settings.hardware, devices=1, sharding="none")  # whatever trained it
        load_analysis(experiment, outcome, outcomes)(replace(outcome.settings, hardware=single), outcome.record)


def is_up_to_date(experiment: Experiment, outcome: Outcome, outcomes: list[Outcome]) -> bool:
    """Return whether the stored analysis is the one this experiment makes. It is stale if it compares with other seeds
    or with runs redone since. A damaged one counts as current; the report names it.

    Raises:
        UserError: as `find_references`.
    """
    kind, compares = KINDS[experiment.analyse], experiment.analyse == "similarity"
    found = find_references(experiment, outcome, outcomes) if compares else {}
    wanted = {name: other and other[1].name for name, other in found.items()}
    try:
        content = outcome.record.read_sealed(kind.file, *kind.keys)
        return content.get("references", {}) == wanted and not list_redone_runs(outcome.record, content)
    except UserError:
        return True


def list_redone_runs(record: Record, content: dict) -> list[str]:
    """Return the runs that an analysis compares its own with and that were done again since. Analyses of earlier
    versions do not hold the digests by which that is known.

    Raises:
        UserError: the result of one is damaged.
    """
    known = content.get("digests", {})
    now = {name: Record(record.folder.with_name(name)).read_digest() for name in known}
    return [name for name, digest in known.items() if now[name] and now[name] != digest]


def load_analysis(
    experiment: Experiment, outcome: Outcome, outcomes: list[Outcome]
) -> Callable[[Settings, Record], object]:
    """Return the function that analyses a run. It imports torch, which a report does not need.

    Raises:
        UserError: the runs that this one is compared with are not finished.
    """
    module, name = KINDS[experiment.analyse].function.split(":")
    with import_heavy_libraries():
        function = getattr(import_module(f"dual_lora.lab.weights.{module}"), name)
    if experiment.analyse == "similarity":
        return partial(function, references=find_references(experiment, outcome, outcomes))
    if experiment.analyse == "fit":
        return partial(function, size="smoke" if experiment.scale == "smoke" else "full")
    return function


def find_references(
    experiment: Experiment, outcome: Outcome, outcomes: list[Outcome]
) -> dict[str, tuple[Settings, Record] | None]:
    """Return the runs of the reference row on a run's model and task: that of its own seed, unless it is that run, and
    that of the next seed; None where the experiment has none.

    Raises:
        UserError: one of them is not finished.
    """
    seed, key = outcome.settings.seed, (experiment.reference, get_model_task(outcome))
    runs = {other.settings.seed: other for other in outcomes if (other.label, get_model_task(other)) == key}
    others = sorted((other for other in runs if other != seed), key=lambda other: (other < seed, other))
    chosen = {
        SAME_SEED: runs.get(seed) if outcome.label != experiment.reference else None,
        OTHER_SEED: runs[others[0]] if others else None,
    }
    for other in filter(None, chosen.values()):
        named = f"{experiment.reference}, seed {other.settings.seed}"
        require(other.result is not None, f"{named}: not finished, so not compared with it")
    return {name: other and (other.settings, other.record) for name, other in chosen.items()}


def check_analysis(experiment: Experiment, outcome: Outcome) -> None:
    """Refuse an analysis that is missing, damaged, or older than a run that it compares with.

    Raises:
        UserError: with the run and the file.
    """
    if is_analysed(experiment, outcome):
        kind = KINDS[experiment.analyse]
        path = outcome.record.folder / kind.file
        require(path.exists(), f"{path}: missing; sweep.py without run=false analyses the run")
        redone = list_redone_runs(outcome.record, outcome.record.read_sealed(kind.file, *kind.keys))
        remedy = "sweep.py without run=false analyses the run again"
        require(not redone, f"{path}: compares with {', '.join(redone)}, done again since; {remedy}")


def iterate_analysis_blocks(
    experiment: Experiment, outcomes: list[Outcome], floors: list[Floor], folder: Path
) -> Iterator[Block]:
    """Yield what the report says of the analyses, as far as there are any."""
    kind = KINDS[experiment.analyse]
    found = [
        outcome
        for outcome in outcomes
        if is_analysed(experiment, outcome) and (outcome.record.folder / kind.file).is_file()
    ]
    if found:
        yield from kind.iterate_blocks(found, folder, floors)
