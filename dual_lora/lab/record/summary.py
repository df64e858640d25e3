"""What a run prints when it is done."""

import shlex
from typing import Any

from tabulate import tabulate

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from tasks import Task


def format_summary(result: dict[str, Any], run: Run) -> str:
    """Return a finished run as text: a table of scores, what it trained, for how long, and its folder."""
    before = result["metrics_before"] or {}
    ordered = sorted(result["metrics"], key=lambda name: name != result["metric"])
    table = format_score_table(load_task(run.settings), ordered, before=before, after=result["metrics"])
    batch = f" of {result['batch']}" if "batch" in result else ""
    share = result["trainable_parameters"] / result["parameters"]
    facts = [["data", describe_data(result["data"])]] if result.get("data") else []
    facts += [["kept", kept]] if (kept := describe_kept_epoch(result, run.settings)) else []
    facts += [
        ["trained", f"{result['trainable_parameters']:,} of {result['parameters']:,} parameters ({share:.2%})"],
        [
            "time",
            f"{result['train_seconds']:.1f} s for {result['steps']} steps{batch}, "
            f"{result['tokens_per_second']:,.0f} tokens/s, peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ],
        ["record", run.record.format_path()],
    ]
    facts += [["upload", command] for command in find_upload_commands(run.record)]
    facts += [["warning", text] for text in result.get("warnings", ())]
    return f"\n{run.title}\n\n{table}\n\n{tabulate(facts, tablefmt='plain')}"


def describe_data(splits: dict[str, dict[str, Any]]) -> str:
    """Return how many rows a run was trained and scored on, and where the scored ones are from; `splits` are those of a
    result."""
    scored = [facts for name, facts in splits.items() if name != "train"]
    origins = dict.fromkeys(facts["origin"] for facts in scored)
    train = splits.get("train", {})
    cut = f" ({train['cut']:,} of them cut at task.max_length)" if "cut" in train else ""
    trained = f"{train['rows']:,} rows to train on{cut}, " if train else ""
    origin = next(iter(origins)) if len(origins) == 1 else f"{len(scored)} sets"
    return f"{trained}{sum(facts['rows'] for facts in scored):,} scored ({origin})"


def describe_kept_epoch(result: dict[str, Any], settings: Settings) -> str | None:
    """Return which epoch's weights were kept, of how many, and by what; None where those of the last step were."""
    rows = result.get("data", {}).get("train", {}).get("rows")
    if result.get("best_epoch") is None or not rows:
        return None
    done, planned = (
        steps / settings.count_epoch_steps(rows) for steps in (result["steps"], settings.count_steps(rows))
    )
    stopped = f" ({planned:.4g} planned)" if done < planned else ""
    judged = "the scored rows"
    if settings.task.checkpoint == "best_loss":
        judged = f"the loss on {settings.task.validation_size:,} validation rows"
    elif result.get("development"):
        judged = f"{result['development']['rows']:,} development rows"
    return f"epoch {result['best_epoch']:.4g} of {done:.4g}{stopped}, by {judged}"


def find_upload_commands(record: Record) -> list[str]:
    """Return the command that sends what W&B mirrored offline to its server; none if nothing was."""
    offline = any(record.folder.glob("wandb/offline-run-*"))
    return [f"wandb sync {shlex.quote(record.format_path())}/wandb/offline-run-*"] if offline else []


def format_finished(result: dict[str, Any], run: Run) -> str:
    """Return the text printed for a run that had already finished."""
    return f"finished: {run.record.format_path()} (force=true runs it again)\n{format_summary(result, run)}"


def format_comparison(task: Task, result: dict[str, Any], now: dict[str, float], record: Record) -> str:
    """Return the scores of a second evaluation next to the recorded ones, and whether every digit is equal."""
    table = format_score_table(task, list(now), recorded=result["metrics"], now=now)
    verdict = "reproduced exactly" if result["metrics"] == now else "NOT reproduced"
    return f"{table}\n\n{verdict}: {record.format_path()}"


def format_score_table(task: Task, names: list[str], **columns: dict[str, float]) -> str:
    """Return a table of the named scores: in percent, except those that the task prints as they are."""
    units = [(name, name in task.unscaled) for name in names]
    rows = [
        [name_score(name, unscaled), *(format_score(some.get(name), unscaled) for some in columns.values())]
        for name, unscaled in units
    ]
    aligned = ("left", *("right" for _ in columns))
    return tabulate(rows, headers=["score", *columns], disable_numparse=True, colalign=aligned)


def name_score(name: str, unscaled: bool) -> str:
    """Return a score's name with its unit: percent, unless it is shown as it is."""
    return name if unscaled else f"{name} %"


def format_score(value: float | None, unscaled: bool) -> str:
    """Return a score in percent, or as it is if `unscaled`; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.2f}" if unscaled else f"{100 * value:.1f}"


def format_seconds(seconds: float) -> str:
    """Return a duration in the largest unit that it fills at least twice: 45 s, 3 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
