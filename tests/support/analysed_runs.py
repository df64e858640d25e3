"""Finished runs of experiments that analyse them, for the tests of several analyses."""

import json
import shutil
from pathlib import Path

import pytest

from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.config import paths


def sweep_smoke(folder: Path, names: tuple[str, ...]) -> Path:
    """Do the smoke runs of experiments below a folder and return it."""
    with pytest.MonkeyPatch.context() as patch:
        use_runs(patch, folder)
        for name in names:
            assert sweep_command([f"experiment={name}", "scale=smoke", "wandb.mode=disabled"]) == 0
    return folder


def use_runs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(paths, "RUNS", folder)
    patch.setenv("DUAL_LORA_RUNS", str(folder))


def copy_runs(patch: pytest.MonkeyPatch, finished: Path, folder: Path) -> Path:
    """Return a copy of finished runs that a test may change."""
    shutil.copytree(finished, folder)
    use_runs(patch, folder)
    return folder


def read_contents(folder: Path, name: str) -> dict[str, dict]:
    """Return a file of every run of `verdict`, by the run's name."""
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob(f"verdict_smoke/*/{name}")}


def check_report_without_weights(runs: Path, name: str) -> None:
    """Hold that an experiment's report is written again from the records alone, byte for byte."""
    for weights in [*runs.glob("*/*/adapter"), *runs.glob("*/*/model")]:
        shutil.rmtree(weights)
    report = runs / f"{name}_smoke/report"
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    shutil.rmtree(report)
    assert sweep_command([f"experiment={name}", "scale=smoke", "run=false"]) == 0
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
