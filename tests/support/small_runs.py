"""Settings, models and experiments of runs that take seconds."""

import torch

import tasks
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.model.adapt import attach_method
from dual_lora.lab.model.load import load_model

FAMILIES = {
    "tiny-gpt2": "demo/choice",
    "tiny-llama": "demo/restaurants",
    "tiny-roberta": "demo/sentiment",
    "tiny-deberta": "demo/sentiment",
}

SHORT = ["train.max_steps=4", "eval.max_examples=8", "train.log_steps=1", "wandb.mode=disabled"]


def settings(model: str, *overrides: str):
    return load_settings([f"model={model}", f"task={FAMILIES[model]}", *SHORT, *overrides])


def attached(model: str, method: str, *overrides: str):
    """Return settings, task, base-with-method and tokenizer, untrained."""
    chosen = settings(model, f"method={method}", *overrides)
    task = tasks.load(chosen.task.name)
    torch.manual_seed(0)
    base, tokenizer = load_model(chosen, task)
    return chosen, task, attach_method(base, chosen, task.form), tokenizer


SMALL = ["train.max_steps=2", "train.max_examples=64", "eval.max_examples=4", "eval.before=false"]
SMALL += ["wandb.mode=disabled"]

SPEC = {
    "title": "Small",
    "columns": "task.name",
    "baselines": ["LoRA"],
    "cells": {"LoRA": ["method=lora"], "Dual LoRA": ["method=dual_lora"]},
    "smoke": {"seeds": [0, 1], "run": ["model=tiny-roberta", "task=demo/sentiment"]},
}

TINY = ["model=tiny-roberta", "task=demo/sentiment", *SMALL]


def plan_run(run) -> None:
    """Plan a run and check that it fits, as train.py does with plan=true."""
    from dual_lora.lab.train.plan import check_fit, make_plan

    check_fit(run.settings, make_plan(run))
