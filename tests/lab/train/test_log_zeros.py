"""`train.log_zeros`: the share of exact zeros in an update, logged while it trains."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.identity import compute_identity
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run

SHORT = ["model=tiny-roberta", "task=demo/sentiment", "train.max_steps=4", "train.batch_size=4"]
SHORT += [
    "train.max_examples=16",
    "eval.max_examples=4",
    "eval.before=false",
    "wandb.mode=disabled",
    "train.log_steps=2",
]


def train(*words: str):
    run = Run.prepare(load_settings([*SHORT, *words]))
    train_run(run)
    return run.record


def count_zeros(record) -> float:
    """Return the share of zeros in the trained update, from the saved factors."""
    weights = load_file(record.folder / "adapter/adapter_model.safetensors")
    factors = {name: value for name, value in weights.items() if ".lora_" in name or "dual_lora_" in name}
    zeros = []
    for name, A in factors.items():
        if name.endswith(("lora_A.weight", "factors.A")):
            B = factors[name.replace("lora_A.weight", "lora_B.weight").replace("factors.A", "factors.B")]
            product = B @ A
            zeros.append((product <= 0 if "dual" in name else product == 0).ravel())
    return float(np.concatenate(zeros).mean())


@pytest.mark.parametrize("method", ["dual_lora", "lora"])
def test_zeros_are_logged_as_they_are_in_the_trained_update(method, runs_folder):
    record = train(f"method={method}", "train.log_zeros=true")
    logged = [row["train/zeros"] for row in record.read_log() if "train/zeros" in row]
    assert len(logged) == 2
    assert logged[-1] == pytest.approx(count_zeros(record), abs=1e-6)
    assert (0.4 < logged[-1] < 0.6) if method == "dual_lora" else logged[-1] == 0


def test_logging_them_changes_neither_the_run_nor_its_name(runs_folder):
    silent, counted = (load_settings([*SHORT, word]) for word in ("train.log_zeros=null", "train.log_zeros=true"))
    assert compute_identity(silent) == compute_identity(counted)
    losses = []
    for word in ("train.log_zeros=true", "train.log_zeros=null"):
        record = train("force=true", word)
        losses.append([row["train/loss"] for row in record.read_log() if "train/loss" in row])
        assert ("train/zeros" in (record.folder / "metrics.jsonl").read_text()) == (word == "train.log_zeros=true")
    assert losses[0] == losses[1] and json.dumps(losses[0])


def test_an_adapter_on_no_weight_logs_none(runs_folder):
    record = train("method=head_only", "train.log_zeros=true")
    assert not any("train/zeros" in row for row in record.read_log())


@pytest.mark.parametrize("method", ["full", "oft"])
def test_a_method_without_such_an_update_refuses(method):
    with pytest.raises(UserError, match="^train.log_zeros=True: only an update that is a product of factors"):
        load_settings([*SHORT, f"method={method}", "train.log_zeros=true"])


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_a_start_that_changes_the_base_weights_refuses(start):
    """The update is what B A has become less what it was, and not B A."""
    words = [*SHORT, "method=lora", f"+method.peft.init_lora_weights={start}"]
    with pytest.raises(UserError, match=f"^train.log_zeros=True: method.peft.init_lora_weights={start} changes"):
        load_settings([*words, "train.log_zeros=true"])
    load_settings([*SHORT, "method=lora", "+method.peft.init_lora_weights=gaussian", "train.log_zeros=true"])


def test_a_sharded_update_is_refused():
    words = ["model=tiny-llama", "task=demo/restaurants", "method=dual_lora", "hardware=fsdp2", "train.log_zeros=true"]
    with pytest.raises(UserError, match="^train.log_zeros=true: not with hardware.sharding=full"):
        load_settings(words)
