"""hardware=qlora: the frozen base in 4 bits, trained on, evaluated again, analysed, exported and planned."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import train  # noqa: F401 - sets the lazy import the command line uses
from dual_lora.analysis.memory import measure_kept_bytes
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.commands.train import check_command, train_command
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import EXIT_USER, UserError
from dual_lora.lab.evaluate.export import compute_probe_logits
from dual_lora.lab.evaluate.trained import load_trained_model
from dual_lora.lab.model.adapt import attach_method, count_parameters
from dual_lora.lab.model.load import get_head_class, load_model
from dual_lora.lab.model.merge import merge_adapter
from dual_lora.lab.model.nf4 import count_entries, list_4bit_layers
from dual_lora.lab.record.identity import compute_identity
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.callbacks import get_trained_state
from dual_lora.lab.train.plan import compute_plan
from dual_lora.lab.train.run import train_run
from dual_lora.lab.weights.updates import load_updates
from tests.support.places import GOLDEN
from tests.support.small_runs import plan_run

SHORT = ["train.max_steps=4", "train.max_examples=64", "train.batch_size=8", "train.log_steps=1", "train.lr=0.01"]
SHORT += ["eval.max_examples=4", "eval.before=false", "wandb.mode=disabled"]
TASKS = {
    "tiny-llama": "demo/restaurants",
    "tiny-gpt2": "demo/restaurants",
    "tiny-roberta": "demo/sentiment",
    "tiny-deberta": "demo/sentiment",
}
COMPARED = [m for m in list_choices("method") if m != "full" and (GOLDEN / f"{m}.json").is_file()]
RUNS = [("tiny-llama", method) for method in COMPARED]
RUNS += [(model, "dual_lora") for model in TASKS if model != "tiny-llama"]
UNLIKE = [run for run in RUNS if run[1] in ("lora", "dora", "dual_lora")]  # LoRA+ and rsLoRA are LoRA but for rates

held = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def settings(model: str, *overrides: str):
    short = ["task.max_new_tokens=8"] if TASKS[model] == "demo/restaurants" else []
    return load_settings(["hardware=qlora", f"model={model}", f"task={TASKS[model]}", *SHORT, *short, *overrides])


def attached(chosen):
    """Return the model as training starts from it."""
    task = load_task(chosen)
    base, _ = load_model(chosen, task)
    return attach_method(base, chosen, task.form)


def frozen(model) -> dict[str, torch.Tensor]:
    """Return copies of all that must not change, the constants of 4-bit weights among them."""
    trained = get_trained_state(model)
    drawn = re.compile(r"classifier|pooler")  # anew at every start; those that train are copies
    state = model.state_dict().items()
    return {name: value.clone() for name, value in state if name not in trained and not drawn.search(name)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return what does a run once for all tests: settings, record, result, and the frozen weights after it."""
    known = {}

    def run(model: str, method: str):
        if (model, method) not in known:
            chosen, after = settings(model, f"method={method}"), {}

            def merge(trained, merge=merge_adapter):
                after.update(frozen(trained))
                return merge(trained)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
                patch.setattr("dual_lora.lab.train.run.merge_adapter", merge)
                known[model, method] = chosen, Run.prepare(chosen).record, train_run(Run.prepare(chosen)), after
        return known[model, method]

    return run


@held
@pytest.mark.parametrize("model", TASKS)
def test_linear_weights_are_in_4_bits_and_all_else_is_as_without(model):
    chosen = settings(model, "model.dtype=bfloat16")
    base, _ = load_model(chosen, load_task(chosen))
    plain, _ = load_model(settings(model, "model.dtype=bfloat16", "hardware.base=null"), load_task(chosen))
    small = {f"{name}.weight" for name, _ in list_4bit_layers(base)}
    assert len(small) >= 12 and not re.search("classifier|pooler|lm_head|embed", " ".join(small))
    for (name, mine), theirs in zip(base.named_parameters(), plain.parameters(), strict=True):
        assert count_entries(mine) == theirs.numel()
        if name in small:
            assert mine.nbytes == theirs.numel() / 2 and not mine.requires_grad
        elif not re.search("classifier|pooler", name):  # drawn anew
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)


@held
@pytest.mark.parametrize(("model", "method"), RUNS)
def test_training_changes_the_adapter_alone(model, method, finished):
    chosen, record, result, after = finished(model, method)
    before = frozen(attached(chosen))
    assert before.keys() == after.keys() and any(name.endswith("absmax") for name in after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = [row["train/loss"] for row in record.read_log() if "train/loss" in row]
    assert len(set(losses)) == 4 and result["merged"] is False
    without = settings(model, f"method={method}", "hardware.base=null")
    counts = count_parameters(attached(without))
    assert {key: result[key] for key in counts} == counts and result["identity"] != compute_identity(without)


@held
@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*list_choices("method")} - {*COMPARED}))
def test_any_other_method_trains_on_4_bits_or_is_refused_in_one_line(method, finished):
    try:
        _, _, result, _ = finished("tiny-llama", method)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert result["merged"] is False


@held
@pytest.mark.parametrize(("model", "method"), UNLIKE)
def test_evaluation_from_the_record_alone_gives_every_digit_again(model, method, finished, capsys):
    _, record, result, _ = finished(model, method)
    assert evaluate_command([f"run={record.folder}"]) == 0
    assert "reproduced exactly" in capsys.readouterr().out
    assert json.loads((record.folder / "evaluation.json").read_text())["metrics"] == result["metrics"]


@held
@pytest.mark.parametrize(("model", "method"), UNLIKE)
def test_the_exported_model_computes_what_was_evaluated(model, method, finished, tmp_path, capsys):
    chosen, record, _, _ = finished(model, method)
    assert evaluate_command([f"run={record.folder}", f"export={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "(float32, its 4-bit base dequantized)" in said and float(re.search(r"by (\S+) of", said)[1]) < 1e-5
    kept = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in kept
    task = load_task(chosen)
    unmerged = compute_probe_logits(load_trained_model(chosen, record, task)[0].eval())
    loaded = get_head_class(task).from_pretrained(tmp_path / "out").eval()
    original = load_model(settings(model, f"method={method}", "hardware.base=null"), task)[0]
    assert (compute_probe_logits(loaded) - unmerged).norm() < 1e-5 * unmerged.norm()
    if task.form == "generation":  # the base that was not in 4 bits is another model
        assert (compute_probe_logits(original.eval()) - unmerged).norm() > 1e-3 * unmerged.norm()


@held
def test_an_export_of_a_16_bit_run_is_rounded_once(runs_folder, tmp_path, capsys):
    chosen = settings("tiny-llama", "model.dtype=bfloat16")
    train_run(Run.prepare(chosen))
    folder = Run.prepare(chosen).record.folder
    for dtype, most in (("float32", 1e-5), ("bfloat16", 2e-2)):
        assert evaluate_command([f"run={folder}", f"export={tmp_path / dtype}", f"model.dtype={dtype}"]) == 0
        assert float(re.search(r"by (\S+) of", capsys.readouterr().out)[1]) < most
        assert AutoModelForCausalLM.from_pretrained(tmp_path / dtype).dtype == getattr(torch, dtype)


@held
@pytest.mark.parametrize(("model", "method"), UNLIKE)
def test_the_analysis_takes_the_base_for_what_its_4_bits_stand_for(model, method, finished, capsys):
    chosen, record, _, _ = finished(model, method)
    (first, *_) = load_updates(chosen, record)
    task = load_task(chosen)
    base = dict(list_4bit_layers(load_model(chosen, task)[0]))[first.module]
    one = torch.eye(base.in_features)
    assert torch.allclose((base(one) - base(0 * one)).T[first.block], first.get_weight(), atol=1e-6)
    assert evaluate_command([f"run={record.folder}", "analyse=true"]) == 0
    assert "analysed: " in capsys.readouterr().out
    rows = json.loads((record.folder / "analysis.json").read_text())["rows"]
    assert all(0 < row["relative_size"] < 1 for row in rows)


@held
def test_the_best_epoch_keeps_trained_weights_alone(runs_folder):
    few = ["train.max_steps=null", "train.max_examples=16", "train.epochs=2", "train.batch_size=8"]
    assert train_run(Run.prepare(settings("tiny-roberta", "task.checkpoint=best", *few)))["best_epoch"]
    assert not [name for name in get_trained_state(attached(settings("tiny-roberta"))) if "base_layer" in name]


@held
def test_a_cpu_that_could_pack_weights_does_not(monkeypatch):
    """Packed, they have other constants and training has no gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = attached(settings("tiny-llama"))
    before, ids = frozen(model), torch.arange(8)[None]
    with torch.inference_mode():
        model.eval()(input_ids=ids)
    assert all(torch.equal(before[name], value) for name, value in frozen(model).items())


def held_bytes(model) -> int:
    """Return the bytes of every storage that weights and their constants lie in."""
    parts = list(model.parameters())
    for _, layer in list_4bit_layers(model):
        state = layer.weight.quant_state
        parts += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


@held
@pytest.mark.parametrize(
    ("model", "dtype"), [("tiny-llama", "float32"), ("tiny-llama", "bfloat16"), ("tiny-roberta", "float32")]
)
@pytest.mark.parametrize("method", ["lora", "dual_lora"])
def test_a_plan_is_what_a_real_run_holds(model, dtype, method):
    chosen = settings(model, f"method={method}", f"model.dtype={dtype}", "train.batch_size=4", "task.max_length=64")
    found, real = compute_plan(chosen), attached(chosen).train()
    assert found["memory"]["weights"] == pytest.approx(held_bytes(real), rel=0.02)
    ids = torch.randint(5, 50, (4, 64))
    labels = ids if model == "tiny-llama" else ids[:, 0] % 2

    @torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")  # as the Trainer
    def step():
        return real(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward

    kept = measure_kept_bytes(real, step)
    assert found["memory"]["activations"] == pytest.approx(kept, rel=0.05 if dtype == "float32" else 0.1)


def test_70b_on_one_card_is_planned_as_its_yaml_says(runs_folder, capsys):
    text = (paths.CONF / "hardware" / "qlora.yaml").read_text()
    (command,) = re.findall(r"#   python train.py (.*)", text)
    plan_run(Run.prepare(load_settings([*command.split(), "plan=true"])))
    assert "64.5" in text and "64.54 GB a device" in capsys.readouterr().out
    four = [word.replace("batch_size=2", "batch_size=4") for word in command.split()]
    with pytest.raises(UserError, match="needs 82.6 GB a device, .* would fit: train.batch_size=2"):
        plan_run(Run.prepare(load_settings([*four, "plan=true"])))


def test_4_bits_are_proposed_where_they_would_fit_and_the_base_stays_as_it_is(runs_folder, capsys):
    overrides = ["model=llama3-70b-instruct", "task=commonsense", "plan=true"]
    with pytest.raises(UserError, match="would fit: train.batch_size=2 train.accumulation=8 hardware.base=nf4, or"):
        plan_run(Run.prepare(load_settings([*overrides, "method=lora"])))
    with pytest.raises(UserError, match="would fit: ") as error:
        plan_run(Run.prepare(load_settings([*overrides, "method=full"])))
    assert "nf4" not in str(error.value)


def test_without_bitsandbytes_a_run_is_refused_before_anything_is_loaded(runs_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("dual_lora.lab.model.adapt.load_model", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["train.py", "hardware=qlora"])
    with pytest.raises(SystemExit) as end:
        run_command(train_command, ["hardware=qlora"])
    assert end.value.code == EXIT_USER
    said = "train.py: hardware.base=nf4: needs bitsandbytes; pip install -e '.[quantised]'\n"
    assert capsys.readouterr().err == said
    assert check_command(["hardware=qlora", "plan=true"])  # a plan holds nothing
