"""Gradient checkpointing: the same gradients and identities, less kept for backward, and plans that know it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tasks
from dual_lora import set_update_scale
from dual_lora.analysis.memory import measure_kept_bytes
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.adapt import attach_method
from dual_lora.lab.model.load import load_model
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.activations import apply_gradient_checkpointing
from dual_lora.lab.train.plan import compute_plan
from dual_lora.lab.train.run import train_run
from tests.support.small_runs import plan_run

TASKS = {"tiny-llama": "demo/restaurants", "tiny-gpt2": "demo/choice", "tiny-roberta": "demo/sentiment"}
ON = "train.gradient_checkpointing=true"
FROZEN = ["dual_lora", "lora"]


def choose(model: str, method: str, *more: str):
    return load_settings([f"model={model}", f"task={TASKS[model]}", f"method={method}", "task.max_length=64", *more])


def build_step(model: str, method: str, *more: str):
    """Return a model with the method attached, its update at full scale, and a function that computes its loss."""
    chosen = choose(model, method, *more)
    task = tasks.load(chosen.task.name)
    torch.manual_seed(0)
    adapted = attach_method(load_model(chosen, task)[0], chosen, task.form).train()
    if method == "dual_lora":
        set_update_scale(adapted, 1.0)
    apply_gradient_checkpointing(adapted, chosen)
    ids = torch.randint(5, 50, (4, 64), generator=torch.Generator().manual_seed(1))
    labels = ids if task.form == "generation" else ids[:, 0] % 2

    def step():
        torch.manual_seed(2)  # of dropout
        return adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward

    return adapted, step


@pytest.mark.parametrize("kernel", ["auto", "recompute", "eager"])
@pytest.mark.parametrize("model", TASKS)
def test_gradients_of_dual_lora_are_those_without(model, kernel):
    found = []
    for switch in ((), (ON,)):
        adapted, step = build_step(model, "dual_lora", *switch, f"+method.peft.kernel={kernel}")
        step()()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and any(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_of_other_methods_are_those_without_also_under_dropout(method):
    dropout = ["method.dropout=0.2"] if method == "lora" else []
    found = []
    for switch in ((), (ON,)):
        adapted, step = build_step("tiny-llama", method, *switch, *dropout)
        step()()
        found.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", FROZEN)
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-roberta"])
def test_a_plan_is_what_a_checkpointed_step_takes(model, method):
    sized = ("train.batch_size=4", ON)
    found = compute_plan(choose(model, method, *sized))
    adapted, step = build_step(model, method, *sized)
    counter = FlopCounterMode(display=False)
    with counter:
        kept = measure_kept_bytes(adapted, step)
    config = adapted.get_base_model().config
    # torch counts no attention on a CPU: two products forward, twice, and five backward, of 2 tokens^2 hidden each
    attention = 18 * 4 * 64**2 * config.hidden_size * config.num_hidden_layers
    assert found["flops"]["step"] == counter.get_total_flops() + attention
    plain = measure_kept_bytes(*build_step(model, method, *sized[:1]))
    layer = (plain - kept) / config.num_hidden_layers  # about what one layer keeps beyond its input
    assert kept < 0.6 * plain
    assert found["memory"]["activations"] == pytest.approx(kept + layer, rel=0.05)


def test_a_run_is_named_apart_only_with_it_and_learns_the_same(runs_folder):
    short = ["train.max_steps=4", "eval.max_examples=4", "eval.before=false", "train.log_steps=1"]
    runs = [Run.prepare(choose("tiny-llama", "dual_lora", *short, *more)) for more in ((), (ON,))]
    off = Run.prepare(choose("tiny-llama", "dual_lora", *short, "train.gradient_checkpointing=false"))
    assert off.identity == runs[0].identity != runs[1].identity
    losses = []
    for run in runs:
        train_run(run)
        losses.append([row["train/loss"] for row in Record(run.record.folder).read_log() if "train/loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_plan_that_does_not_fit_proposes_it(runs_folder, capsys):
    large = ["model=llama3-70b-instruct", "task=commonsense", "hardware=qlora", "plan=true"]
    with pytest.raises(UserError, match="or train.gradient_checkpointing=true"):
        plan_run(Run.prepare(load_settings(large)))
    plan_run(Run.prepare(load_settings([*large, ON])))
    capsys.readouterr()


def test_a_model_that_cannot_be_checkpointed_is_refused(monkeypatch):
    chosen = choose("tiny-gpt2", "lora", ON)
    base, _ = load_model(chosen, tasks.load(chosen.task.name))
    monkeypatch.setattr(type(base), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="^train.gradient_checkpointing=true: transformers cannot checkpoint a GPT2LM"):
        apply_gradient_checkpointing(base, chosen)
