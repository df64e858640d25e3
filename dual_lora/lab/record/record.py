"""Run records: one folder a run, named by what the run is; `result.json`, written last and whole, means finished.

    runs/<study>/<identity>/
        config.yaml          every setting, resolved
        environment.json     versions, machine, code commit
        metrics.jsonl        one line a log step
        predictions.jsonl    one line an example: id, raw output, answer, gold
        adapter/ or model/   what was trained
        result.json          metrics, parameters, time, memory, identity

While a run is unfinished there are also `checkpoints/`, `.lock` (who does it), `trained.json` once training is done,
and `failure.json` if a try failed. A run with `force=true` is done in `.again/`, whose files take the old ones' places
when they are whole, so that no result is lost on the way.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import Elsewhere, UserError, require
from dual_lora.lab.inputs.model_files import find_changed_files, hash_model_files
from dual_lora.lab.record.provenance import describe_environment, merge_environments
from dual_lora.lab.system.files import flush_to_disk, read_json_object, remove_path, translate_write_errors
from dual_lora.lab.system.lock import LOCK_NAME, hold_lock
from dual_lora.lab.system.sealed import find_newest_checkpoint, hash_content, hash_file, list_files, read_seal

# What its environment must tell.
ENVIRONMENT_FIELDS = ("commit", "uncommitted_changes", "threads")
# What a run's result must tell, whatever version wrote it.
RESULT_FIELDS = {"identity", "model", "task", "method", "seed", "metric", "metrics", "data"}
# What a finished run leaves, sealed by the SHA-256 in its result.
SEALED_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "predictions.jsonl", "adapter", "model")
RERUN_FOLDER, TRAINED_FILE = ".again", "trained.json"
# What of a finished run does not hold for the same run done again.
OUTDATED_FILES = ("checkpoints", TRAINED_FILE, "failure.json", "evaluation.json")
ANALYSIS_FIGURES = ("ranks", "stable_ranks", "histograms")  # of an analysis
OUTDATED_FILES += (
    "analysis.json",
    "analysis.csv",
    *(f"{name}.{kind}" for name in ANALYSIS_FIGURES for kind in ("png", "pdf")),
)


@dataclass(frozen=True)
class Record:
    """One run's folder."""

    folder: Path

    @property
    def name(self) -> str:
        return (self.folder.parent if self.folder.name == RERUN_FOLDER else self.folder).name

    def get_attempt(self, settings: Settings) -> "Record":
        """Return the record a run with these settings is done in: this one, or the one below it until that is whole."""
        return Record(self.folder / RERUN_FOLDER) if settings.force else self

    def install_rerun(self) -> None:
        """Put the files of a whole run below `.again` in place of the old ones, result.json last.

        A kill in the middle leaves the rest to the next call.
        """
        again = Record(self.folder / RERUN_FOLDER)
        if not (again.folder / "result.json").is_file():
            return
        again.remove_leftovers()
        for name in OUTDATED_FILES:
            remove_path(self.folder / name)
        for path in sorted(again.folder.iterdir(), key=lambda path: path.name == "result.json"):
            if path.is_dir():
                remove_path(self.folder / path.name)
            path.replace(self.folder / path.name)
        again.folder.rmdir()

    def finish_cleanup(self) -> None:
        """Do what a kill right after the result left undone, unless another process is at it."""
        whole = [path for path in (self.folder, self.folder / RERUN_FOLDER) if (path / "result.json").is_file()]
        left = (RERUN_FOLDER, TRAINED_FILE, "checkpoints", LOCK_NAME)
        if whole and any((self.folder / name).exists() for name in left):
            with suppress(Elsewhere), hold_lock(self.folder), translate_write_errors(self.folder):
                self.install_rerun()
                self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what a finished run needs no more."""
        for path in (self.folder / "checkpoints", self.folder / TRAINED_FILE, *self.folder.glob(".*.partial")):
            remove_path(path)

    def format_path(self) -> str:
        """Return the folder as a user would type it."""
        return os.path.relpath(self.folder) if self.folder.is_relative_to(Path.cwd()) else str(self.folder)

    def read_result(self) -> dict[str, Any] | None:
        """Return the finished run's result, or None while there is none."""
        if not (self.folder / "result.json").is_file():
            return None
        found = self.read_json("result.json", *sorted(RESULT_FIELDS))
        rest = {name: value for name, value in found.items() if name != "digest"}
        whole = found.get("digest") in (None, hash_content(rest))  # earlier versions wrote none
        require(whole, f"{self.folder / 'result.json'}: not as the run left it; run its command again with force=true")
        return found

    def write_result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result, with SHA-256 of what the run leaves and of the result itself, and return it."""
        left = [path for name in SEALED_FILES for path in (self.folder / name, *list_files(self.folder / name))]
        found = {str(p.relative_to(self.folder)): hash_file(p) for p in left if p.is_file()}
        result = {**result, "sha256": {name: value for name, value in found.items() if not name.endswith(".md")}}
        result["digest"] = hash_content(result)
        self.write_file("result.json", result)
        return result

    def verify_files(self, *names: str) -> None:
        """Hold files of a finished run (also all of a folder, or simply all) against the SHA-256 in its result; earlier
        versions wrote none.

        Raises:
            UserError: one is gone or not as the run left it.
        """
        kept = (self.read_result() or {}).get("sha256", {})
        for name in (name for name in kept if name.startswith(names or "")):
            path = self.folder / name
            same = path.is_file() and hash_file(path) == kept[name]
            require(same, f"{path}: not as the run left it; run its command again with force=true")

    def verify_model_files(self, settings: Settings) -> None:
        """Hold the model's files against those the run began with; earlier versions did not write them down.

        Raises:
            UserError: one is another.
        """
        known = self.read_environment().get("model_files")
        known = known if isinstance(known, dict) else {}
        other = find_changed_files(known, settings) if known else []
        require(
            not other,
            f"{self.folder}: begun with another {', '.join(other)} of model={settings.model.name}; give the folder as "
            "it was as model.path=DIR, or name another study=NAME",
        )

    def read_failure(self) -> dict[str, Any] | None:
        """Return why the newest try failed: `error` (its type) and `message`; None if it did not."""
        return self.read_json("failure.json", "error", "message") if (self.folder / "failure.json").is_file() else None

    def write_failure(self, error: BaseException) -> None:
        details = getattr(error, "details", {})
        self.write_file(
            "failure.json", {"error": type(error).__name__, "message": redact_secrets(str(error)), **details}
        )

    def read_json(self, name: str, *keys: str) -> dict[str, Any]:
        """Return a JSON file of the record, which must hold these keys.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.folder / name
        require(path.is_file(), f"{path}: not there; is {self.folder} the folder of a finished run?")
        return read_json_object(path, "remove it and run the same command again", *keys)

    def prepare_folder(self, settings: Settings) -> None:
        """Make the folder ready for a run: config and environment, and of an earlier try that was cut short its newest
        checkpoint, or what it trained, with the metrics logged up to there."""
        with translate_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in ("failure.json", "predictions.jsonl", *(p.name for p in self.folder.glob(".*.partial"))):
                (self.folder / stale).unlink(missing_ok=True)
            checkpoint, trained = self.find_checkpoint(), self.read_training()
        if trained:
            rows = trained["logged"]
        elif checkpoint:
            rows = Record(checkpoint).read_log()
        else:
            rows = [row for row in self.read_log() if row["step"] == 0]
        goes_on = bool(trained or checkpoint or rows)
        if goes_on:
            self.verify_model_files(settings)
        self.write_lines("metrics.jsonl", rows)
        self.write_file("config.yaml", yaml.safe_dump(asdict(settings), sort_keys=False))
        now = describe_environment() | {"model_files": hash_model_files(settings)}
        self.write_file("environment.json", merge_environments(self.read_environment(), now) if goes_on else now)

    def read_environment(self) -> dict[str, Any]:
        """Return the machine and code of the run; nothing where that file is missing or damaged."""
        try:
            return self.read_json("environment.json", *ENVIRONMENT_FIELDS)
        except UserError:
            return {}

    def find_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint of an unfinished try."""
        return find_newest_checkpoint(self.folder / "checkpoints")

    def get_weights_folder(self, settings: Settings) -> Path:
        """Return the folder of what was trained."""
        return self.folder / ("model" if settings.method.peft is None else "adapter")

    def read_training(self) -> dict[str, Any] | None:
        """Return what is known of a training that is done, if the weights it left are whole."""
        if not (self.folder / TRAINED_FILE).is_file():
            return None
        for name in ("model", "adapter"):
            found = read_seal(self.folder / name, self.folder / TRAINED_FILE)
            if found:
                return found
        remove_path(self.folder / TRAINED_FILE)
        return None

    def read_log(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; one that a kill cut short ends them."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
        return rows

    def append_log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, handed to the system when this returns."""
        with translate_write_errors(self.folder / "metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def write_lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        self.write_file(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write_file(self, name: str, content: Any) -> None:
        """Write a file whole or not at all: to a temporary name first, then renamed."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False) + "\n"
        partial = self.folder / f".{name}.partial"
        with translate_write_errors(self.folder / name):
            try:
                with partial.open("w", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
                partial.replace(self.folder / name)
                flush_to_disk(self.folder)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
