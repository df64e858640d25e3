"""Finished runs, to be damaged, evaluated again or exported."""

import json
from pathlib import Path

import pytest

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run

RUN = ["model=tiny-roberta", "task=demo/sentiment", "wandb.mode=disabled", "eval.max_examples=4", "eval.before=false"]
RUN += ["train.max_steps=1", "train.batch_size=4", "train.max_examples=20"]


def edit(path: Path, **changes: object) -> None:
    """Change a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


SHORT = ["train.max_steps=2", "train.max_examples=20", "train.batch_size=4", "eval.max_examples=4", "eval.before=false"]


def export(run: Path, folder: Path, *more: str) -> int:
    return evaluate_command([f"run={run}", f"export={folder}", *more])


def train_dual_lora(folder: Path) -> Path:
    """Do a short run of Dual LoRA on tiny-roberta, recorded below a folder, and return the run's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder)
        chosen = load_settings(["model=tiny-roberta", "task=demo/sentiment", "wandb.mode=disabled", *SHORT])
        run = Run.prepare(chosen)
        train_run(run)
        return run.record.folder
