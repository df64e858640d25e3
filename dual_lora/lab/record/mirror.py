"""Weights & Biases as the mirror of a run's local record.

The local record is written first and is authoritative; the mirror is a copy that is never read back. If it fails, the
run continues. Opening it online takes at most about ten seconds (after that it is offline), and so does finishing it.
The first W&B error is printed as one line and ends the mirroring. W&B is imported only when a mirror is opened.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dual_lora.lab.config.schema import WANDB_MODES
from dual_lora.lab.config.secrets import redact_secrets

MAX_TAG_CHARACTERS = 64  # W&B refuses longer ones
INIT_SECONDS = 5.0  # for the server to accept the run; W&B waits 90 by default
FINISH_SECONDS = 8.0  # for the last upload; W&B waits without limit by default


class NoApiKey(Exception):
    """There is no key for the W&B server."""


class Mirror:
    """The W&B copy of one run. Without a W&B run (`Mirror()`) every call does nothing. No call raises."""

    def __init__(self, run: Any = None, warn: Callable[[str], None] = print):
        self._run, self._warn, self._failed = run, warn, False

    def log(self, row: dict) -> None:
        """Send one row of metrics; charts are drawn over `row["step"]`, the optimizer step, in any order."""
        if self._run is not None and not self._failed:
            self._call_safely(self._run.log, row)

    def set_summary(self, values: dict) -> None:
        """Set the run's final values; a key not named here keeps its last logged value."""
        if self._run is not None and not self._failed:
            self._call_safely(self._run.summary.update, values)

    def send_report(self, tables: dict[str, Any], images: dict[str, Path]) -> None:
        """Send tables (data frames) and images (PNG files) by name."""
        if self._run is not None and not self._failed:
            self._call_safely(self._log_report, tables, images)

    def _log_report(self, tables: dict[str, Any], images: dict[str, Path]) -> None:
        wandb = sys.modules["wandb"]
        rows = {name: wandb.Table(dataframe=frame) for name, frame in tables.items()}
        self._run.log(rows | {name: wandb.Image(str(path)) for name, path in images.items()})

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, marked failed if `exit_code` is not 0; what could not be uploaded stays on disk."""
        run, self._run = self._run, None
        if run is not None:
            self._call_safely(run.finish, exit_code=exit_code, where=_suggest_upload(run))
            _end_session()

    def _call_safely(self, call: Callable, *args: Any, where: str = "", **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            if not self._failed:
                where = where or _suggest_upload(self._run)
                self._warn(f"W&B stopped mirroring this run ({_describe_error(error)}); {where}")
            self._failed = True


class Mirrors:
    """Several copies of one run's log, each with the methods of `Mirror`."""

    def __init__(self, *mirrors: Any) -> None:
        self._mirrors = mirrors

    def log(self, row: dict) -> None:
        """Send one row of metrics to all."""
        for mirror in self._mirrors:
            mirror.log(row)

    def set_summary(self, values: dict) -> None:
        """Set the run's final values in all."""
        for mirror in self._mirrors:
            mirror.set_summary(values)

    def finish(self, exit_code: int = 0) -> None:
        """Close all."""
        for mirror in self._mirrors:
            mirror.finish(exit_code)


def open_mirror(
    mode: str,
    *,
    project: str,
    entity: str | None,
    run_id: str,
    name: str,
    group: str | None,
    job_type: str | None,
    tags: list[str],
    config: dict,
    folder: str | Path,
    warn: Callable[[str], None] = print,
) -> Mirror:
    """Open the mirror of one run; its files go to `folder`/wandb.

    mode: "online" sends to WANDB_BASE_URL or W&B's default server, with the key of WANDB_API_KEY, ~/.netrc or W&B's
    settings, and becomes "offline" if there is no key or no server; "offline" uses no network; "disabled" does nothing.
    run_id: a rerun or a later `wandb sync` with the same id goes to the same run on the server.
    warn: gets one line if the mirror is not what `mode` asked for.
    Other W&B runs of this process are finished first.

    Raises:
        ValueError: there is no such mode. Nothing else is raised.
    """
    if mode not in WANDB_MODES:
        raise ValueError(f"W&B mode {mode!r} is not one of {', '.join(WANDB_MODES)}")
    if mode == "disabled":
        return Mirror()
    facts = {
        "project": project,
        "entity": entity,
        "id": run_id,
        "name": name,
        "group": group,
        "job_type": job_type,
        "tags": [tag[:MAX_TAG_CHARACTERS] for tag in tags],
        "config": config,
        "dir": os.path.abspath(folder),
    }
    try:
        return Mirror(_start_run(mode, facts, warn), warn)
    except Exception as error:
        warn(f"W&B is off for this run ({_describe_error(error)})")
        return Mirror()


def _start_run(mode: str, facts: dict, warn: Callable[[str], None]) -> Any:
    """Return a W&B run of the mode, an offline one if online does not succeed."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while W&B is imported
    import wandb

    if mode == "offline":
        return _init_run(wandb, mode, facts)
    try:
        return _init_run(wandb, mode, facts)
    except Exception as error:
        run = _init_run(wandb, "offline", facts)
        warn(f"W&B is offline for this run ({_describe_error(error)}); {_suggest_upload(run)}")
        return run


def _init_run(wandb: Any, mode: str, facts: dict) -> Any:
    """Start a run in a new W&B session: an old one keeps its environment, its server and its unfinished runs.

    Raises:
        NoApiKey: the server needs a key.
    """
    _end_session()
    wandb.setup(_build_wandb_settings(wandb, mode))
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise NoApiKey("set WANDB_API_KEY or run `wandb login`")
    run = wandb.init(mode=mode, **facts)
    run.define_metric("*", step_metric="step")
    return run


def _end_session() -> None:
    """Finish what still runs and end W&B's helper process, which may be dead or report a run's exit code as its own."""
    if (wandb := sys.modules.get("wandb")) is None:
        return
    with contextlib.suppress(Exception):
        if wandb.run is not None:
            wandb.run.finish()
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
    wandb.run = None  # a run that could not be finished would forbid the next log-in


def _build_wandb_settings(wandb: Any, mode: str) -> Any:
    """Return W&B's settings: bounded waits, no messages, and nothing recorded except what the run logs."""
    return wandb.Settings(
        mode=mode,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        silent=True,
        console="off",
        symlink=False,
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


def _suggest_upload(run: Any) -> str:
    folder = shlex.quote(str(Path(run.dir).parent))
    # Without the flag, a run that began online is skipped.
    return f"upload it later with: wandb sync --include-online {folder}"


def _describe_error(error: Exception) -> str:
    """Return an error as one line without secrets; pydantic's with the fields that it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if hasattr(error, "errors") and lines:  # pydantic's: a headline, then fields and reasons in turn
        found = [(".".join(map(str, wrong["loc"])), wrong["msg"]) for wrong in error.errors()]
        lines = ["; ".join(f"{field}: {reason}" for field, reason in found)]
    return redact_secrets(f"{type(error).__name__}: {lines[0] if lines else ''}".strip())
