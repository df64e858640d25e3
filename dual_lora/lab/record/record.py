"""Run records: one folder per run, named after its identity. A `result.json`, written last, means that it finished.

    runs/<study>/<identity>/
        config.yaml          every setting, resolved
        environment.json     versions, machine, code commit
        metrics.jsonl        one line per logged step
        predictions.jsonl    one line per example: split, id, raw output, and the columns of `Task.judge`
        adapter/ or model/   what was trained
        result.json          metrics, parameters, time, memory, identity

An unfinished run also has `checkpoints/` (written by train/trainer.py), `.lock` (which process is doing it),
`trained.json` once training is done, and `failure.json` if an attempt failed. A run with `force=true` is done in
`.again/`; its files replace the old ones once they are complete, so that no result is lost on the way.

A finished record is sealed: `result.json` holds the run's identity, the SHA-256 of every other file and a digest of
itself. A record that was renamed to another run, was changed, or got a file added to its weights is refused.
"""

import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dual_lora.lab.config.paths import read_json_object
from dual_lora.lab.config.recorded import format_settings
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import RunHeldElsewhere, UserError, get_first_line, require
from dual_lora.lab.inputs.model_files import find_changed_files, hash_model_files, warn_unchecked_weights
from dual_lora.lab.record.provenance import RECORD_VERSION, describe_environment, merge_environments
from dual_lora.lab.system.files import (
    append_text,
    remove_path,
    remove_temporary_files,
    translate_access_errors,
    translate_write_errors,
    write_text,
)
from dual_lora.lab.system.lock import LOCK_NAME, hold_lock
from dual_lora.lab.system.sealed import (
    check_owner,
    find_newest_checkpoint,
    hash_content,
    hash_file,
    is_digest_right,
    list_files,
    read_seal,
)

# What a record's environment must contain.
ENVIRONMENT_FIELDS = ("commit", "uncommitted_changes", "threads")
# What a run's result must contain, whatever version wrote it.
RESULT_FIELDS = {"identity", "model", "task", "method", "seed", "metric", "metrics", "data"}
# The folders that are loaded as a whole, and all files of a finished run that its result seals with a SHA-256.
SEALED_FOLDERS = ("adapter", "model")
SEALED_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "predictions.jsonl", *SEALED_FOLDERS)
RERUN_FOLDER, TRAINED_FILE = ".again", "trained.json"
# Files that are written while the lock is held, so partial copies of them are leftovers.
LOCKED_FILES = (
    "config.yaml", "environment.json", "metrics.jsonl", "predictions.jsonl", "result.json", "failure.json",
    TRAINED_FILE,
)  # fmt: skip
ANALYSIS_FILE, TRUNCATION_FILE, CURVATURE_FILE = "analysis.json", "truncation.json", "curvature.json"
SIMILARITY_FILE, FIT_FILE = "similarity.json", "fit.json"
ANALYSIS_FIGURES = ("ranks", "stable_ranks", "histograms")  # of an analysis
# Files that become invalid when a run is trained again.
OUTDATED_FILES = (
    "checkpoints",
    TRAINED_FILE,
    "failure.json",
    "evaluation.json",
    "tensorboard",
    ANALYSIS_FILE,
    TRUNCATION_FILE,
    CURVATURE_FILE,
    SIMILARITY_FILE,
    FIT_FILE,
    "analysis.csv",
    *(f"{name}.{kind}" for name in ANALYSIS_FIGURES for kind in ("png", "pdf")),
)


IDENTITY_END = re.compile(r"_[0-9a-f]{10}$")  # of the names that runs give their folders
RERUN_REMEDY = "run its command again with force=true"


@dataclass(frozen=True)
class Record:
    """One run's folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The identity of the run whose folder this is."""
        return (self.folder.parent if self.folder.name == RERUN_FOLDER else self.folder).name

    @property
    def is_named_by_run(self) -> bool:
        """Whether the folder's name ends like a run's identity; a copy that the user renamed need not match one."""
        return IDENTITY_END.search(self.name) is not None

    def select_attempt_record(self, settings: Settings) -> "Record":
        """Return the record to write a run with these settings into: this one, or, with force=true, the one in
        `.again`, until it is complete."""
        return Record(self.folder / RERUN_FOLDER) if settings.force else self

    def is_rerun_whole(self) -> bool:
        """Return whether the run in `.again` is finished and its files are as it left them, whether or not some were
        moved here before an interruption."""
        again = Record(self.folder / RERUN_FOLDER)
        if not again.holds_result():
            return False
        for name, digest in again.read_result().get("sha256", {}).items():
            path = next((f / name for f in (again.folder, self.folder) if (f / name).is_file()), None)
            if path is None or hash_file(path) != digest:
                return False
        return True

    def install_rerun(self) -> None:
        """Replace the old files by those of a complete run in `.again`, result.json last; leave them if it is not
        complete. If this is interrupted, the next call does the rest.

        Raises:
            OSError: a file cannot be read or moved.
        """
        again = Record(self.folder / RERUN_FOLDER)
        if not self.is_rerun_whole():
            return
        again.remove_leftovers()
        self.remove_outdated_files()
        for path in sorted(again.folder.iterdir(), key=lambda path: path.name == "result.json"):
            if path.is_dir():
                remove_path(self.folder / path.name)
            path.replace(self.folder / path.name)
        again.folder.rmdir()

    def remove_outdated_files(self) -> None:
        """Remove what an earlier training left, and what was made of it since.

        Raises:
            OSError: a file cannot be removed.
        """
        for name in OUTDATED_FILES:
            remove_path(self.folder / name)

    def finish_cleanup(self) -> None:
        """Finish the cleanup of a run that was killed right after it wrote its result. A run that another process
        holds, or on a read-only disk, is left as it is; so are the checkpoints next to a result that is damaged or
        another run's, because they may be all that is left of this one."""
        left = (RERUN_FOLDER, TRAINED_FILE, "checkpoints", LOCK_NAME)
        if not any((self.folder / name).exists() for name in left) or not os.access(self.folder, os.W_OK):
            return
        if self.holds_result() or Record(self.folder / RERUN_FOLDER).holds_result():
            with suppress(RunHeldElsewhere), hold_lock(self.folder), translate_write_errors(self.folder):
                self.install_rerun()
                if self.holds_result():
                    self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what a finished run no longer needs, and what killed writers left.

        Raises:
            OSError: a file cannot be removed.
        """
        for path in (self.folder / "checkpoints", self.folder / TRAINED_FILE):
            remove_path(path)
        with suppress(OSError):  # one that holds an unfinished run stays
            (self.folder / RERUN_FOLDER).rmdir()
        remove_temporary_files(self.folder, *LOCKED_FILES)

    def format_path(self) -> str:
        """Return the folder as a user would type it."""
        return os.path.relpath(self.folder) if self.folder.is_relative_to(Path.cwd()) else str(self.folder)

    def read_result(self) -> dict[str, Any] | None:
        """Return the finished run's result, or None while there is none.

        Raises:
            UserError: it is damaged, was changed, or is another run's.
        """
        path = self.folder / "result.json"
        with translate_access_errors(path):
            is_file = path.is_file()
        if not is_file and not os.path.lexists(path):
            return None
        what = "a folder, not a file" if path.is_dir() else "a link to nothing, a pipe or a device, not a file"
        require(is_file, f"{path}: {what}; remove it, and run its command again")
        found = self.read_json(path.name, *sorted(RESULT_FIELDS))
        is_intact = is_digest_right(found) if "digest" in found else self.predates_seals(found)
        require(is_intact, f"{path}: changed since the run; {RERUN_REMEDY}")
        identity = found["identity"]
        is_own = identity == self.name or not self.is_named_by_run
        require(is_own, f"{path}: the result of run {identity}; remove it, or give the folder that name")
        return found

    def read_digest(self) -> str | None:
        """Return the digest of the result, which differs between two trainings of the same run; None while there is no
        result, and of one from before digests existed.

        Raises:
            UserError: see `read_result`.
        """
        return (self.read_result() or {}).get("digest")

    def holds_result(self) -> bool:
        """Return whether there is a result, and it is this run's and as it was written."""
        try:
            return self.read_result() is not None
        except UserError:
            return False

    def predates_seals(self, result: dict[str, Any]) -> bool:
        """Return whether a result without a digest was written before digests existed: newer results also hold hashes
        of files, and their environment a hash of the code.

        Raises:
            UserError: the environment, which must say so, is missing or damaged.
        """
        return "sha256" not in result and "code" not in self.read_json("environment.json", *ENVIRONMENT_FIELDS)

    def predates_sealed_files(self) -> bool:
        """Return whether the record is of a version that sealed no other file than its result.

        Raises:
            UserError: the environment, which must say so, is missing or damaged.
        """
        return self.read_json("environment.json", *ENVIRONMENT_FIELDS).get("record_version", 1) < RECORD_VERSION

    def write_result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result, with the SHA-256 of what the run leaves and of the result itself, and return it.

        Raises:
            UserError: it cannot be written.
        """
        left = [path for name in SEALED_FILES for path in (self.folder / name, *list_files(self.folder / name))]
        found = {str(p.relative_to(self.folder)): hash_file(p) for p in left if p.is_file()}
        result = {**result, "sha256": {name: value for name, value in found.items() if not name.endswith(".md")}}
        result["digest"] = hash_content(result)
        self.write_file("result.json", result)
        return result

    def verify_files(self, *names: str) -> None:
        """Compare files of a finished run with the SHA-256 in its result. names: files or folders; without any, all are
        compared. Results of earlier versions have no hashes and pass.

        Raises:
            UserError: one is missing, was changed, or was added to a folder that is loaded as a whole.
        """
        kept = (self.read_result() or {}).get("sha256", {})
        for name in (name for name in kept if name.startswith(names or "")):
            path = self.folder / name
            with translate_access_errors(path):
                require(path.exists(), f"{path}: removed since the run; {RERUN_REMEDY}")
                is_unchanged = path.is_file() and hash_file(path) == kept[name]
            require(is_unchanged, f"{path}: changed since the run; {RERUN_REMEDY}")
        for folder in (folder for folder in SEALED_FOLDERS if kept and folder.startswith(names or "")):
            for path in list_files(self.folder / folder):
                # a model card is not loaded
                is_recorded = str(path.relative_to(self.folder)) in kept or path.suffix == ".md"
                require(is_recorded, f"{path}: added after the run; remove it")

    def verify_kept_files(self) -> None:
        """Compare all files of a finished run, except weights that are not there: a record may be kept without them.

        Raises:
            UserError: one is missing, was changed, or was added to the weights.
        """
        lost = [name for name in SEALED_FOLDERS if not (self.folder / name).exists()]
        self.verify_files(*(name for name in SEALED_FILES if name not in lost))

    def require_result(self, label: str) -> dict[str, Any]:
        """Return the result of a run that must be finished. label: the run as the command line names it.

        Raises:
            UserError: it is not finished, or see `read_result`.
        """
        result = self.read_result()
        require(result is not None, f"{label}: not finished (no result.json); run its command to the end first")
        return result

    def read_finished(self) -> dict[str, Any] | None:
        """Return the result of a finished run whose files are all as it left them, or None while there is none.

        Raises:
            UserError: a file is missing, damaged, changed or added.
        """
        result = self.read_result()
        self.verify_files()
        return result

    @property
    def says_run(self) -> bool:
        """Whether one of the files is there that say which run this is."""
        return any(os.path.lexists(self.folder / name) for name in ("config.yaml", "result.json"))

    @property
    def is_begun(self) -> bool:
        """Whether a run has begun or finished here, as far as its folder says, or one did of which only parts are left:
        files without the settings they belong to, or a file where the folder was."""
        if self.says_run:
            return True
        left = (self.folder / name for name in ("environment.json", "predictions.jsonl", *SEALED_FOLDERS))
        return self.is_named_by_run and (not self.folder.is_dir() or self.holds_work or any(map(os.path.lexists, left)))

    def check_kept(self) -> None:
        """Refuse what is left of a run that has lost the files that say which one it was.

        Raises:
            UserError: what is missing, and the remedy.
        """
        remedy = "put it back, or remove what is left and run its command again"
        require(self.folder.is_dir(), f"{self.folder}: not a folder; {remedy}")
        require(self.says_run, f"{self.folder}: no config.yaml and no result.json; {remedy}")

    @property
    def holds_work(self) -> bool:
        """Whether the run finished or got far enough to resume. One that failed before has nothing to protect."""
        paths = (self.folder / name for name in ("result.json", TRAINED_FILE, "metrics.jsonl", "checkpoints"))
        return any(any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size for path in paths)

    def verify_model_files(self, settings: Settings) -> None:
        """Compare the model's files with those that the run began with. Earlier versions did not record them, and of a
        commit of the hub they are not recorded: files given instead cannot be compared, which is printed.

        Raises:
            UserError: one is different.
        """
        known = self.read_environment().get("model_files")
        known = known if isinstance(known, dict) else {}
        if not known and settings.model.path:
            warn_unchecked_weights(self.folder, settings)
        other = find_changed_files(known, settings) if known else []
        require(
            not other,
            f"{self.folder}: started with a different {', '.join(other)} of model={settings.model.name}; give the "
            "original folder as model.path=DIR, or choose another study=NAME",
        )

    def read_failure(self) -> dict[str, Any] | None:
        """Return why the latest attempt failed: `error` (its type) and `message`; None if it did not.

        Raises:
            UserError: failure.json is damaged.
        """
        return self.read_json("failure.json", "error", "message") if (self.folder / "failure.json").is_file() else None

    def write_failure(self, error: BaseException) -> None:
        """Keep why an attempt failed: of several processes, what the first one that failed says. The others only find
        that it is gone.

        Raises:
            UserError: it cannot be written.
        """
        if (self.folder / "failure.json").exists():  # of this attempt, which began by removing an older one
            return
        content = {"error": type(error).__name__, "message": str(error), **getattr(error, "details", {})}
        self.write_file("failure.json", redact_values(content))

    def read_json(self, name: str, *keys: str) -> dict[str, Any]:
        """Return a JSON file of the record, which must hold these keys.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.folder / name
        with translate_access_errors(path):
            found = path.is_file()
        require(found, f"{path}: missing; is {self.folder} the folder of a finished run?")
        begun = name == "environment.json"  # it cannot be made again once the run is finished
        return read_json_object(path, RERUN_REMEDY if begun else "remove it and run the same command again", *keys)

    def read_sealed(self, name: str, *keys: str) -> dict[str, Any]:
        """Return a JSON file of the record that was written by `write_sealed`; in version 1 it may be unsealed.

        Raises:
            UserError: it is missing, damaged, changed or another run's.
        """
        found, path = self.read_json(name, *keys), self.folder / name
        if self.is_named_by_run:
            check_owner(found, self.name, path)
        is_intact = is_digest_right(found) if "digest" in found else self.predates_sealed_files()
        require(is_intact, f"{path}: changed since it was written; remove it, and it is made again")
        return found

    def write_sealed(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file with the run's identity and a digest.

        Raises:
            UserError: it cannot be written.
        """
        identity = (self.read_result() or {"identity": self.name})["identity"]
        content = json.loads(json.dumps(content | {"identity": identity}, allow_nan=False))  # as it will be read
        self.write_file(name, content | {"digest": hash_content(content)})

    def prepare_folder(self, settings: Settings) -> None:
        """Prepare the folder for a run: write config and environment, and cut metrics.jsonl back to the newest
        checkpoint, or to the end of training, of an interrupted attempt. Without such an attempt, what was made of an
        earlier training goes, as its result did.

        Raises:
            UserError: it cannot be written, what it holds so far is another run's, or it resumes and does not say with
                which model files it began.
        """
        with translate_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.remove_stale_files()
        checkpoint, trained = self.find_checkpoint(), self.read_training()
        if trained:
            rows = trained["logged"]
        elif checkpoint:
            rows = Record(checkpoint).read_log()
        else:
            rows = [row for row in self.read_log() if row["step"] == 0]
        resumes = bool(trained or checkpoint or rows)
        if resumes:
            begun = self.read_begun_environment()
            check_owner(begun, self.name, self.folder / "environment.json")
            self.verify_model_files(settings)
        if not (trained or checkpoint):
            with translate_write_errors(self.folder):
                self.remove_outdated_files()
        self.write_lines("metrics.jsonl", rows)
        self.write_file("config.yaml", format_settings(settings))
        now = describe_environment() | {"identity": self.name, "model_files": hash_model_files(settings)}
        self.write_file("environment.json", merge_environments(begun, now) if resumes else now)

    def remove_stale_files(self) -> None:
        """Remove what an earlier attempt left that must not be read, and links where the run makes folders.

        Raises:
            OSError: a file cannot be removed.
            UserError: a folder is where the run writes a file, or a file where it makes one.
        """
        for name in LOCKED_FILES:
            require(not (self.folder / name).is_dir(), f"{self.folder / name}: a folder, not a file; remove it")
        checkpoints = self.folder / "checkpoints"
        require(checkpoints.is_dir() or not checkpoints.exists(), f"{checkpoints}: not a folder; remove it")
        for name in ("failure.json", "predictions.jsonl", "result.json"):
            (self.folder / name).unlink(missing_ok=True)
        remove_temporary_files(self.folder, *LOCKED_FILES)
        for name in ("checkpoints", *SEALED_FOLDERS):
            if (self.folder / name).is_symlink():
                (self.folder / name).unlink()

    def read_environment(self) -> dict[str, Any]:
        """Return the machine and code of the run; nothing where that file is missing or damaged."""
        try:
            return self.read_json("environment.json", *ENVIRONMENT_FIELDS)
        except UserError:
            return {}

    def read_begun_environment(self) -> dict[str, Any]:
        """Return the environment of the attempt that this one resumes. Without it nobody knows whose work that is.

        Raises:
            UserError: it is missing or damaged.
        """
        path, remedy = self.folder / "environment.json", f"put it back, or remove {self.folder} to start the run again"
        with translate_access_errors(path):
            found = path.is_file()
        require(found, f"{path}: missing, so the model files of the interrupted attempt are unknown; {remedy}")
        return read_json_object(path, remedy, *ENVIRONMENT_FIELDS)

    def find_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint of an unfinished attempt.

        Raises:
            UserError: it is another run's.
        """
        return find_newest_checkpoint(self.folder / "checkpoints", self.name)

    def get_weights_folder(self, settings: Settings) -> Path:
        """Return the folder of the trained weights."""
        return self.folder / ("model" if settings.method.peft is None else "adapter")

    def get_weights_file(self, settings: Settings) -> Path:
        """Return the file of the trained weights, unless they are so large that they are in parts."""
        name = "model.safetensors" if settings.method.peft is None else "adapter_model.safetensors"
        return self.get_weights_folder(settings) / name

    def read_training(self) -> dict[str, Any] | None:
        """Return what is known of a finished training, if the weights it left are intact.

        Raises:
            UserError: it is another run's.
        """
        path = self.folder / TRAINED_FILE
        if not path.is_file():
            return None
        for name in SEALED_FOLDERS:
            if found := read_seal(self.folder / name, path):
                check_owner(found, self.name, path)
                return found
        remove_path(path)
        return None

    def read_log(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl up to the first that a kill cut short."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else ():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
        return rows

    def append_log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; it survives a kill of this process once this returns.

        Raises:
            UserError: it cannot be written.
        """
        with translate_write_errors(self.folder / "metrics.jsonl"):
            append_text(self.folder / "metrics.jsonl", json.dumps(row) + "\n")

    def write_lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a file of one JSON object per line.

        Raises:
            UserError: it cannot be written.
        """
        self.write_file(name, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))

    def write_file(self, name: str, content: Any) -> None:
        """Write a text, or anything else as JSON, completely or not at all.

        Raises:
            UserError: it cannot be written.
        """
        text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False) + "\n"
        with translate_write_errors(self.folder / name):
            write_text(self.folder / name, text)

    def try_write_file(self, name: str, content: Any) -> None:
        """Write an optional file; if that fails, only print why."""
        try:
            self.write_file(name, content)
        except UserError as error:
            print(f"not kept: {get_first_line(error).partition(';')[0]}", file=sys.stderr)


def redact_values(content: Any) -> Any:
    """Return nested JSON values with secrets redacted in every text."""
    if isinstance(content, dict):
        return {key: redact_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact_values(value) for value in content]
    return redact_secrets(content) if isinstance(content, str) else content
