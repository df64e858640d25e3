"""Runs that end in one line before anything is trained."""

import pytest

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run

SHORT = ["train.max_steps=1", "eval.before=false", "wandb.mode=disabled", "method=lora"]


def refuse(words: list[str]) -> str:
    """Return the line that a run ends with."""
    with pytest.raises(UserError) as caught:
        train_run(Run.prepare(load_settings([*SHORT, *words])))
    assert "\n" not in str(caught.value)
    return str(caught.value)
