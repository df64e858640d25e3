"""Runs that are stopped or killed at a step, and what must not depend on it."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import Stopped
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.system.signals import STOP
from dual_lora.lab.train.run import train_run
from dual_lora.lab.train.trainer import StopAndResume

# 5 batches an epoch, 3 optimizer steps: the last one is of a single batch
SMALL = ["model=tiny-roberta", "task=demo/sentiment", "wandb.mode=disabled", "eval.max_examples=8"]
SMALL += ["train.max_examples=40", "train.batch_size=8", "train.accumulation=2", "train.log_steps=2"]

TIMES = {"train_seconds", "tokens_per_second", "peak_memory_bytes", "sha256", "digest"}


def chosen(*overrides: str):
    return load_settings([*SMALL, "train.max_steps=7", *overrides])


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing more is done than Python's own unwinding."""


def kept(folder: Path) -> dict:
    """Everything of a run's record that must not depend on how often it was stopped."""
    result = json.loads((folder / "result.json").read_text())
    files = [p for p in sorted(folder.rglob("*")) if p.suffix == ".safetensors" or p.name.endswith(".jsonl")]
    return {
        "result": {name: value for name, value in result.items() if name not in TIMES},
        **{str(p.relative_to(folder)): p.read_bytes() for p in files},
    }


@contextmanager
def at_step(step: int, do):
    """Call `do` at the end of one optimizer step, after its losses are added up and before anything is saved."""
    real = StopAndResume.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            do()
        real(self, args, state, control, **kwargs)

    StopAndResume.on_step_end = on_step_end
    try:
        yield
    finally:
        StopAndResume.on_step_end = real


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


def stopped(settings, step: int) -> Record:
    """Start a run, stop it politely in a step and return its record."""
    with at_step(step, terminate), STOP.listen(), pytest.raises(Stopped):
        train_run(Run.prepare(settings))
    return Run.prepare(settings).record
