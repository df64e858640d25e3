"""A run: its settings, its identity and its record, built once and handed on."""

from dataclasses import dataclass, field
from typing import Any

from dual_lora.lab.config import paths
from dual_lora.lab.config.compatibility import check_model_paths
from dual_lora.lab.config.paths import check_writable
from dual_lora.lab.config.recorded import find_differences
from dual_lora.lab.config.schema import Settings, format_typed_value
from dual_lora.lab.record.identity import compute_identity
from dual_lora.lab.record.record import Record


@dataclass(frozen=True)
class Run:
    """One run. Computing its identity hashes data and weights, so callers that need the record are given the run."""

    settings: Settings
    record: Record
    differences: dict[str, Any] = field(default_factory=dict)  # from the command's other runs, by full setting name

    @classmethod
    def prepare(cls, settings: Settings, differences: dict[str, Any] | None = None) -> "Run":
        """Find the record of a run and check that it may be written.

        Raises:
            UserError: data or weights cannot be read, the folder cannot be written, or what it did so far was
                made with other model files.
        """
        record = Record(paths.RUNS / settings.study / compute_identity(settings))
        if settings.force or not (record.folder / "result.json").is_file():
            check_writable(record.folder)
        if not settings.force and not settings.plan and record.holds_work:
            record.verify_model_files(settings)
        return cls(settings, record, differences or {})

    @property
    def identity(self) -> str:
        """The name of the run's folder."""
        return self.record.name

    @property
    def label(self) -> str:
        """A short name among the command's runs: the method, and the settings that vary."""
        return self.format_label()

    def format_label(self, *left_out: str) -> str:
        """Return `label` without some of the settings."""
        names = [self.differences[key] for key in ("model.name", "task.name") if key in self.differences]
        return " ".join([*names, self.settings.method.name, *self.list_values(*left_out)])

    @property
    def title(self) -> str:
        """What the run is: model, task, method with what varies, seed."""
        method = " ".join([self.settings.method.name, *self.list_values("seed")])
        return f"{self.settings.model.name}  {self.settings.task.name}  {method}  seed {self.settings.seed}"

    def list_values(self, *left_out: str) -> list[str]:
        """Return the settings that vary, without model, task and method, in short form: magnitude_ratio=0.25."""
        shown = {key: value for key, value in self.differences.items() if not key.endswith(".name")}
        return [
            f"{key.rpartition('.')[2]}={format_typed_value(value)}"
            for key, value in shown.items()
            if key not in left_out
        ]

    @property
    def is_pending(self) -> bool:
        """Whether the run is still to be done: it has no result, or force=true asks for it again."""
        return self.settings.force or self.record.read_result() is None


def prepare_runs(all_settings: list[Settings]) -> list[Run]:
    """Prepare each different run once, in the order in which they are first asked for.

    Raises:
        UserError: see `Run.prepare`.
    """
    check_model_paths(all_settings)
    distinct = list({repr(settings): settings for settings in all_settings}.values())
    prepared = [Run.prepare(*pair) for pair in zip(distinct, find_differences(distinct), strict=True)]
    return list({run.record.folder: run for run in reversed(prepared)}.values())[::-1]
