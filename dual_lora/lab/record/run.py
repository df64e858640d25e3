"""A run: its settings, its identity and its record, built once and handed on."""

from dataclasses import dataclass

from dual_lora.lab.config import paths
from dual_lora.lab.config.paths import check_writable
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.record.identity import compute_identity
from dual_lora.lab.record.record import Record


@dataclass(frozen=True)
class Run:
    """One run. Computing its identity hashes data and weights, so callers that need the record are given the run."""

    settings: Settings
    record: Record

    @classmethod
    def prepare(cls, settings: Settings) -> "Run":
        """Find the record of a run and check that it may be written.

        Raises:
            UserError: the run cannot be named, what is missing of it cannot be written, or what is there was made with
                other files of the model.
        """
        record = Record(paths.RUNS / settings.study / compute_identity(settings))
        if settings.force or not (record.folder / "result.json").is_file():
            check_writable(record.folder)
        if not settings.force and not settings.plan:
            record.verify_model_files(settings)
        return cls(settings, record)

    @property
    def identity(self) -> str:
        """The name of the run's folder."""
        return self.record.name

    @property
    def is_missing(self) -> bool:
        """Whether the run is still to be done: it has no result, or force=true asks for it again."""
        return self.settings.force or self.record.read_result() is None


def prepare_runs(jobs: list[Settings]) -> list[Run]:
    """Prepare each different run once, in the order in which they are first asked for.

    Raises:
        UserError: see `Run.prepare`.
    """
    distinct = {repr(job): job for job in jobs}.values()
    runs = {run.record.folder: run for run in reversed([Run.prepare(job) for job in distinct])}
    return list(runs.values())[::-1]
