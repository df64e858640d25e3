"""Whole runs on the bundled models: every method and family, the record, finishing, re-evaluation, failures."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import tasks
from dual_lora import set_update_scale
from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate.evaluate import compute_outputs, evaluate_splits
from dual_lora.lab.evaluate.predict import classify_rows, score_choices
from dual_lora.lab.evaluate.trained import load_trained_model
from dual_lora.lab.inputs.model_files import identify_weights
from dual_lora.lab.model.adapt import attach_method, count_parameters
from dual_lora.lab.model.encode import get_position_limit
from dual_lora.lab.model.load import load_model
from dual_lora.lab.record import mirror
from dual_lora.lab.record.identity import compute_identity
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.record.summary import describe_data
from dual_lora.lab.study.experiment import drop_replaced_overrides
from dual_lora.lab.system.sealed import hash_content
from dual_lora.lab.train import callbacks as train_callbacks
from dual_lora.lab.train import trainer as train_trainer
from dual_lora.lab.train.callbacks import ProgressBar
from dual_lora.lab.train.run import train_run
from dual_lora.lab.train.trainer import RunTrainer
from tests.support import forked
from tests.support.places import GOLDEN, ROOT
from tests.support.small_runs import FAMILIES, SHORT, attached, settings
from tests.support.wandb_stub import WandbStub


def inputs(model: str, tokenizer) -> dict[str, torch.Tensor]:
    rows = tasks.load(FAMILIES[model]).split("validation").rows
    texts = [row.get("prompt") or row["text"] for row in rows.select(range(4))]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("model", FAMILIES)
def test_accumulated_batches_train_as_one(model, runs_folder):
    """Also where the model divides its loss by the examples of a batch and not of a step."""
    found = []
    for size, parts in ((8, 1), (4, 2)):
        result = train_run(Run.prepare(settings(model, f"train.batch_size={size}", f"train.accumulation={parts}")))
        logged = Record(runs_folder / "adhoc" / result["identity"]).read_log()
        found.append([row for row in logged if "train/loss" in row])
    for whole, halves in zip(*found, strict=True):
        assert halves == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("method", list_choices("method"))
def test_a_run_leaves_a_whole_record(method, runs_folder):
    chosen = settings("tiny-roberta", f"method={method}")
    result = train_run(Run.prepare(chosen))
    folder = runs_folder / "adhoc" / result["identity"]
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "predictions.jsonl",
        "result.json",
        "model" if chosen.method.peft is None else "adapter",
    }
    assert json.loads((folder / "result.json").read_text()) == result
    assert {"metrics", "trainable_parameters", "train_seconds", "peak_memory_bytes", "identity"} <= result.keys()
    steps = 4 if result["trainable_parameters"] else 0  # the model as it is takes none
    assert result["steps"] == steps
    assert not steps or (result["peak_memory_bytes"] > 50e6 and result["tokens_per_second"] > 0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [*range(steps + 1), steps]
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 8
    assert load_recorded_settings(folder) == chosen


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("method", ["dual_lora", "full"])
def test_evaluation_from_the_record_alone_gives_every_digit_again(model, method, runs_folder, capsys):
    result = train_run(Run.prepare(settings(model, f"method={method}", "train.max_steps=8")))
    folder = runs_folder / "adhoc" / result["identity"]
    assert evaluate_command([f"run={folder}"]) == 0
    assert "reproduced exactly" in capsys.readouterr().out
    assert json.loads((folder / "evaluation.json").read_text())["metrics"] == result["metrics"]


def test_the_same_command_again_finds_the_run_finished(runs_folder, capsys):
    chosen = settings("tiny-roberta")
    first = train_run(Run.prepare(chosen))
    stamp = (runs_folder / "adhoc" / first["identity"] / "result.json").stat().st_mtime_ns
    assert train_run(Run.prepare(chosen)) == first
    assert "finished: " in capsys.readouterr().out
    assert (runs_folder / "adhoc" / first["identity"] / "result.json").stat().st_mtime_ns == stamp
    again = train_run(Run.prepare(settings("tiny-roberta", "force=true")))
    assert again["metrics"] == first["metrics"] and again["train_loss"] == first["train_loss"]
    assert (runs_folder / "adhoc" / first["identity"] / "result.json").stat().st_mtime_ns > stamp


@pytest.mark.parametrize("model", FAMILIES)
def test_equal_budgets_train_equally_many_weights(model):
    counted = {}
    for method in ("lora", "dual_lora"):
        _, _, adapted, _ = attached(model, method, "method.rank=8")
        counted[method] = count_parameters(adapted)
    assert counted["lora"]["trainable_parameters"] == counted["dual_lora"]["trainable_parameters"]
    assert counted["lora"]["adapter_parameters"] == counted["dual_lora"]["adapter_parameters"] > 0


@pytest.mark.parametrize("model", FAMILIES)
def test_the_adapted_model_starts_as_its_base(model):
    _, _, adapted, tokenizer = attached(model, "dual_lora")
    adapted.eval()
    batch = inputs(model, tokenizer)
    with torch.no_grad():
        ours = adapted(**batch).logits
        with adapted.disable_adapter():
            base = adapted(**batch).logits
        set_update_scale(adapted, 1.0)
        full = adapted(**batch).logits
    if adapted.modules_to_save:
        assert torch.allclose(ours, base)
    else:
        assert torch.equal(ours, base)
    assert not torch.allclose(full, base)


@pytest.mark.parametrize("model", FAMILIES)
def test_at_any_positive_ramp_every_factor_has_a_gradient(model):
    _, _, adapted, tokenizer = attached(model, "dual_lora")
    set_update_scale(adapted, 0.05)
    adapted(**inputs(model, tokenizer)).logits.square().sum().backward()
    factors = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    assert {n.rsplit(".", 1)[1] for n in factors} == {"A", "B", "C", "D"}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors.values())


@pytest.mark.parametrize("model", FAMILIES)
def test_outputs_do_not_depend_on_the_batch_size(model):
    _, task, adapted, tokenizer = attached(model, "lora")
    rows = list(task.split("validation").rows.select(range(24)))
    given = {}
    for size in (1, 8):
        chosen = settings(model, f"eval.batch_size={size}")
        given[size] = compute_outputs(adapted, tokenizer, task, rows, chosen, "test")
    assert given[1] == given[8]


@pytest.mark.parametrize("fit", [3, 1])
def test_rows_that_memory_does_not_hold_at_once_are_evaluated_by_parts(fit, monkeypatch):
    chosen, task, adapted, tokenizer = attached("tiny-roberta", "lora", "eval.batch_size=8")
    rows, real, sizes = list(task.split("validation").rows.select(range(16))), classify_rows, []
    whole = compute_outputs(adapted, tokenizer, task, rows, chosen, "test")

    def classify(model, tokenizer, task, rows, settings):
        sizes.append(len(rows))
        if len(rows) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, task, rows, settings)

    monkeypatch.setattr("dual_lora.lab.evaluate.evaluate.classify_rows", classify)
    assert compute_outputs(adapted, tokenizer, task, rows, chosen, "test") == whole
    assert sizes == {3: 2 * [8, 4, 2, 2, 4, 2, 2], 1: 2 * [8, *2 * [4, *2 * [2, 1, 1]]]}[fit]


@pytest.mark.parametrize(
    ("model", "method", "more"),
    [
        ("tiny-roberta", "full", []),
        ("tiny-llama", "full", []),
        ("tiny-deberta", "lora", []),
        ("tiny-llama", "lora", ["+method.peft.modules_to_save=[embed_tokens]"]),
        ("tiny-llama", "lora", ["+method.peft.modules_to_save=[model.embed_tokens,lm_head]"]),
        ("tiny-llama", "lora", ["+method.peft.modules_to_save=[norm]"]),
        ("tiny-gpt2", "lora", ["+method.peft.bias=all"]),
    ],
)
def test_what_trains_is_held_in_float32_whatever_the_model_is_in(model, method, more, runs_folder, capsys):
    chosen, _, adapted, _ = attached(model, method, "model.dtype=bfloat16", "train.lr=1e-5", *more)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    frozen = {
        p.dtype
        for n, p in adapted.named_parameters()
        if not p.requires_grad and p.ndim > 1 and ".original_module." not in n
    }
    assert frozen == (set() if method == "full" else {torch.bfloat16})
    result = train_run(Run.prepare(chosen))
    record = Record(runs_folder / "adhoc" / result["identity"])
    assert evaluate_command([f"run={record.folder}"]) == 0
    again, _ = load_trained_model(chosen, record, tasks.load(chosen.task.name))
    (file,) = record.folder.glob("*/*model.safetensors")
    left = load_file(file)
    assert {t.dtype for t in left.values()} == {torch.float32}
    held = again.state_dict() if method == "full" else get_peft_model_state_dict(again)
    assert all(torch.equal(held[name], tensor) for name, tensor in left.items())


def test_float16_is_not_trained_in_without_a_gpu(runs_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^model.dtype=float16: trains on a GPU only; take model.dtype=bfloat16"):
        train_run(Run.prepare(settings("tiny-roberta", "model.dtype=float16")))


def test_a_composite_models_positions_are_those_of_its_text():
    from transformers import Gemma3Config

    text = {"max_position_embeddings": 16, "num_hidden_layers": 1, "hidden_size": 8, "layer_types": ["full_attention"]}
    model = SimpleNamespace(config=Gemma3Config(text_config=text), base_model=None)
    assert not hasattr(model.config, "max_position_embeddings") and get_position_limit(model) == 16


def test_a_model_has_room_behind_the_position_of_padding():
    for model, tokens in (("tiny-roberta", 256), ("tiny-deberta", 256), ("tiny-llama", 256)):
        chosen = settings(model)
        base, _ = load_model(chosen, tasks.load(chosen.task.name))
        assert get_position_limit(base) == tokens
        ids = torch.full((1, tokens), 7)
        assert base(input_ids=ids).logits.isfinite().all()
        if model == "tiny-roberta":
            with pytest.raises(RuntimeError, match="out of bounds"):
                base(input_ids=torch.full((1, tokens + 1), 7))


def test_a_prompt_that_leaves_no_room_for_its_target_is_refused(runs_folder):
    with pytest.raises(UserError, match=r"^task.max_length=8: the prompt of \S+ is \d+ tokens, so nothing of its"):
        train_run(Run.prepare(settings("tiny-llama", "task.max_length=8")))


def test_rows_that_are_cut_are_counted(runs_folder):
    """With the loss on the prompt, too, rows are cut and not refused, as in LLM-Adapters' script."""
    words = ["task.max_length=30", "task.loss_on_prompt=true", "train.max_examples=9", "train.max_steps=1"]
    result = train_run(Run.prepare(settings("tiny-llama", *words)))
    assert result["data"]["train"]["rows"] == result["data"]["train"]["cut"] == 9
    assert describe_data(result["data"]).startswith("9 rows to train on (9 of them cut at task.max_length), ")
    whole = train_run(Run.prepare(settings("tiny-llama", *words[2:])))
    assert "cut" not in whole["data"]["train"]


@pytest.mark.parametrize("metric", ["accuracy", "pearson"])
def test_classified_texts_that_are_cut_are_counted_in_training_and_in_what_is_scored(
    metric, tmp_path, runs_folder, capfd
):
    """A text that fills task.max_length to the last token is whole."""
    (tmp_path / "train.csv").write_text(f"text,label\n{'a ' * 9}a,0\na,1\n{'b ' * 50}b,1\nb,0\n")
    (tmp_path / "test.csv").write_text(f"text,label\n{'c ' * 50}c,0\n{'d ' * 60}d,1\nd,1\n")
    words = ["task=classification", f"data_dir={tmp_path}", f"task.options.metric={metric}", "train.max_steps=1"]
    words += ["train.max_examples=null", "eval.max_examples=null"]
    result = train_run(Run.prepare(load_settings(["model=tiny-roberta", *SHORT, *words, "task.max_length=12"])))
    assert {name: facts.get("cut") for name, facts in result["data"].items()} == {"train": 1, "test": 2}
    assert describe_data(result["data"]).startswith("4 rows to train on (1 of them cut at task.max_length), ")
    assert "test: 2 of 3 rows are cut at task.max_length=12\n" in capfd.readouterr().err


def test_the_best_epoch_is_kept_where_the_protocol_says_so(runs_folder, monkeypatch):
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.9])  # before, three epochs, after
    kept = []
    real = evaluate_splits

    def evaluate(model, *args):
        _, predictions = real(model, *args)
        kept.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        return {"accuracy": next(scores)}, predictions

    monkeypatch.setattr("dual_lora.lab.train.run.evaluate_splits", evaluate)
    few = ["train.max_steps=null", "train.max_examples=32", "train.epochs=3", "train.batch_size=16"]
    result = train_run(Run.prepare(settings("tiny-roberta", "task.checkpoint=best", *few)))
    assert result["best_epoch"] == 2.0 and result["metrics_last_epoch"] == {"accuracy": 0.2}
    assert all(torch.equal(kept[2][name], kept[4][name]) for name in kept[2])
    assert any(not torch.equal(kept[3][name], kept[4][name]) for name in kept[2])


def test_a_loss_that_is_no_number_ends_the_run_with_the_step(runs_folder):
    chosen = settings("tiny-roberta", "method=full", "train.lr=9e5", "train.max_grad_norm=9e5")
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d; take a lower train.lr"):
        train_run(Run.prepare(chosen))
    record = Run.prepare(chosen).record
    assert (
        record.read_result() is None
        and record.read_failure()["error"] == "UserError"
        and record.read_failure()["diverged"]
    )


def test_a_rate_whose_epoch_cannot_be_scored_diverged(runs_folder):
    wild = ["method=full", "train.lr=9e5", "train.max_grad_norm=9e5", "task.checkpoint=best", "train.log_steps=99"]
    few = ["train.max_steps=null", "train.max_examples=32", "train.epochs=3", "train.batch_size=16"]
    chosen = settings("tiny-roberta", *wild, *few)
    with pytest.raises(UserError, match="the model's outputs are NaN or Inf; .* a lower train.lr"):
        train_run(Run.prepare(chosen))
    assert Run.prepare(chosen).record.read_failure()["diverged"]


def test_scoring_epochs_is_no_time_of_training(runs_folder, monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1e-3
            return self.now

    clock = Clock()

    def evaluate(model, tokenizer, task, held_out, settings, title):
        clock.now += 1000
        return {"accuracy": 0.5}, []

    for module in (train_callbacks, train_trainer):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr("dual_lora.lab.train.run.evaluate_splits", evaluate)
    monkeypatch.setattr("dual_lora.lab.train.run.find_warnings", lambda *_: [])
    few = ["train.max_steps=null", "train.max_examples=8", "train.epochs=5", "train.batch_size=8", "eval.before=false"]
    result = train_run(Run.prepare(settings("tiny-roberta", "task.checkpoint=best", *few)))
    assert result["train_seconds"] < 1000 < clock.now


@pytest.mark.parametrize("saving", ["null", "1"])
def test_weights_that_are_no_numbers_are_never_kept(saving, runs_folder):
    """The loss of the last step is of the weights before it."""
    wild = ["train.weight_decay=1e300", "train.max_grad_norm=0", "train.max_steps=2", f"train.save_steps={saving}"]
    chosen = settings("tiny-roberta", "eval.before=false", *wild)
    with pytest.raises(UserError, match=r"trained weights contain NaN or Inf at step 2; take a lower"):
        train_run(Run.prepare(chosen))
    record = Run.prepare(chosen).record
    assert record.read_result() is None and record.read_training() is None and record.read_failure()["step"] == 2
    good = record.find_checkpoint()
    expected = {"null": None, "1": "checkpoint-1"}[saving]
    assert (good and good.name) == record.read_failure()["last_good_checkpoint"] == expected


@pytest.mark.parametrize(("model", "task"), [*FAMILIES.items(), ("tiny-llama", "commonsense")])
def test_outputs_that_are_no_numbers_are_not_scored(model, task):
    chosen = load_settings([f"model={model}", f"task={task}", "task.num_beams=1"])
    asked = tasks.load(task)
    base, tokenizer = load_model(chosen, asked)
    with torch.no_grad():
        next(p for name, p in base.named_parameters() if "norm" in name.lower() or "ln_" in name).fill_(float("nan"))
    with pytest.raises(UserError, match="the model's outputs are NaN or Inf"):
        rows = [{"id": "1", "prompt": "one two", "text": "one", "text_pair": [], "label": 0}]
        ask = {"commonsense": score_choices}.get(task)
        asked.choices = lambda row: ["true", "false"]
        compute_outputs(base, tokenizer, asked, rows, chosen, "test", ask)


def test_a_score_that_is_no_number_is_no_result(runs_folder, monkeypatch):
    chosen = settings("tiny-roberta", "eval.before=false")
    monkeypatch.setattr(type(tasks.load(chosen.task.name)), "score", lambda self, judged: {"accuracy": float("nan")})
    with pytest.raises(UserError, match="after: accuracy is nan"):
        train_run(Run.prepare(chosen))
    assert Run.prepare(chosen).record.read_result() is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        Run.prepare(chosen).record.write_file("result.json", {"accuracy": float("inf")})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+method.peft.zzz=1", "method.peft.zzz: DUAL_LORA has no such field. Drop it."),
        ("+method.peft.lora_alfa=1", "method.peft.lora_alfa: DUAL_LORA has no such field. Did you mean lora_alpha?"),
        ("method.peft.peft_type=LORRA", "PEFT has no such method. Did you mean LORA?"),
        ("+method.peft.rank_pattern={query:1}", "rank_pattern['query']=1: expected an integer of at least 2"),
        ("model.adapt=[q] model.roles.q=nothing_like_it", "on model=tiny-roberta: No modules were targeted"),
    ],
)
def test_a_method_that_does_not_fit_is_told_in_one_line(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        attached("tiny-roberta", "dual_lora", *override.split())


def test_inputs_longer_than_the_model_are_refused_with_its_limit(runs_folder):
    with pytest.raises(
        UserError, match="tiny-gpt2 takes 256 tokens, and the prompt of .* alone has .* take task.max_new_tokens="
    ):
        train_run(Run.prepare(settings("tiny-gpt2", "task.max_new_tokens=250")))


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_weights(runs_folder, monkeypatch):
    chosen = settings("tiny-roberta", "train.max_steps=6", "train.save_steps=2")
    whole = train_run(Run.prepare(chosen))
    record = Run.prepare(chosen).record
    logged = record.read_log()
    weights = (record.folder / "adapter/adapter_model.safetensors").read_bytes()
    (record.folder / "result.json").unlink()

    class Killed(BaseException):
        pass

    def die(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_log", die)
        with pytest.raises(Killed):
            train_run(Run.prepare(chosen))
    assert (record.folder / "checkpoints/checkpoint-4").is_dir() and record.read_result() is None
    with (record.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "tra')  # the line a kill cut short
    resumed = train_run(Run.prepare(chosen))
    assert resumed["metrics"] == whole["metrics"] and resumed["steps"] == 6
    assert resumed["metrics_before"] == whole["metrics_before"]
    assert record.read_log() == logged
    assert (record.folder / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert not (record.folder / "checkpoints").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model.safetensors"])
def test_a_run_is_not_taken_for_that_of_another_models_files(name, runs_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-llama", folder)
    here = f"model.path={folder}"
    chosen = settings("tiny-llama", here, "train.max_steps=1")
    result = train_run(Run.prepare(chosen))
    run = runs_folder / "adhoc" / result["identity"]
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    uses = [lambda: evaluate_command([f"run={run}", here])]
    if compute_identity(chosen) == result["identity"]:  # the ends of weights name a run
        uses.append(lambda: train_run(Run.prepare(chosen)))
    for use in uses:
        with pytest.raises(UserError, match=f"started with a different {name} of model=tiny-llama; give"):
            use()
    shutil.copy(BUNDLED / "tiny-llama" / name, folder / name)
    assert train_run(Run.prepare(chosen)) == result


def test_an_unfinished_run_does_not_go_on_with_other_files(runs_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-roberta", folder)
    chosen = settings("tiny-roberta", f"model.path={folder}", "force=true")
    record = Run.prepare(chosen).record.select_attempt_record(chosen)
    record.prepare_folder(chosen)
    record.append_log({"step": 0, "eval/accuracy": 0.5})
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="started with a different tokenizer_config.json"):
        record.prepare_folder(chosen)


def test_a_folder_is_not_taken_for_a_model_of_the_hub():
    chosen = load_settings(["model=roberta-base", "task=glue/rte", f"model.hub={BUNDLED / 'tiny-roberta'}"])
    with pytest.raises(UserError, match="is a folder here; give it as model.path=DIR"):
        identify_weights(chosen)


def test_evaluation_refuses_other_data_and_other_folders(runs_folder, tmp_path, monkeypatch):
    result = train_run(Run.prepare(settings("tiny-roberta")))
    folder = runs_folder / "adhoc" / result["identity"]
    with pytest.raises(UserError, match="no config.yaml there"):
        evaluate_command([f"run={tmp_path}"])
    stored = json.loads((folder / "result.json").read_text())
    with monkeypatch.context() as patch, pytest.raises(UserError, match="of demo/sentiment, which is now version 99;"):
        patch.setattr(type(tasks.load("demo/sentiment")), "version", 99)
        evaluate_command([f"run={folder}"])
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("beams: 1", "beams: 2") + "\n")
    with pytest.raises(UserError, match="config.yaml: changed since the run"):
        evaluate_command([f"run={folder}"])
    (folder / "config.yaml").write_text(config)
    stored["data"]["validation"]["sha256"] = stored.pop("digest")
    (folder / "result.json").write_text(json.dumps(stored | {"digest": hash_content(stored)}))
    with pytest.raises(UserError, match="not the validation rows this run was evaluated on"):
        evaluate_command([f"run={folder}"])


ALONE = """import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

found, ids = {}, torch.tensor(IDS)
for folder, head in FOLDERS.items():
    model = globals()["AutoModelFor" + head].from_pretrained(folder).eval()
    AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        found[folder] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().tolist()
    assert "dual_lora" not in sys.modules and "peft" not in type(model).__module__
print(json.dumps(found))
"""


def test_exported_runs_give_their_logits_under_transformers_alone(runs_folder, tmp_path, capsys):
    heads, expected = {}, {}
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    for model, method in [*((model, "dual_lora") for model in FAMILIES), ("tiny-llama", "full")]:
        chosen, out = settings(model, f"method={method}"), tmp_path / f"{model}-{method}"
        record = Record(runs_folder / "adhoc" / train_run(Run.prepare(chosen))["identity"])
        assert evaluate_command([f"run={record.folder}", f"export={out}"]) == 0
        said = re.search(r"differ from the unmerged run's by (\S+) of", capsys.readouterr().out)
        assert float(said[1]) < 1e-5
        assert (out / "adapter/adapter_config.json").is_file() == (method != "full")
        task = tasks.load(chosen.task.name)
        heads[str(out)] = "CausalLM" if task.form == "generation" else "SequenceClassification"
        unmerged = load_trained_model(chosen, record, task)[0].eval()
        with torch.inference_mode():
            expected[str(out)] = unmerged(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double()
    code = ALONE.replace("IDS", str(ids.tolist())).replace("FOLDERS", str(heads))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, logits in json.loads(done.stdout).items():
        torch.testing.assert_close(torch.tensor(logits, dtype=torch.double), expected[folder], rtol=1e-4, atol=1e-4)


def test_what_an_export_in_16_bits_loses_is_said(runs_folder, tmp_path, capsys):
    run = f"run={runs_folder / 'adhoc' / train_run(Run.prepare(settings('tiny-roberta')))['identity']}"
    assert evaluate_command([run, f"export={tmp_path / 'out'}", "model.dtype=bfloat16"]) == 0
    said = re.search(r"bfloat16\); its logits differ .* by (\S+) of", capsys.readouterr().out)
    assert 1e-4 < float(said[1]) < 0.1
    for arguments, message in (
        ([f"export={tmp_path / 'out'}"], "not empty; give a new folder"),
        ([f"export={tmp_path / 'b'}", "model.dtype=int8"], "model.dtype=int8"),
        (["model.dtype=bfloat16"], "only with export=DIR"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_command([run, *arguments])


def test_an_export_that_fails_leaves_nothing_in_the_way_of_the_next(runs_folder, tmp_path, monkeypatch):
    run = f"run={runs_folder / 'adhoc' / train_run(Run.prepare(settings('tiny-roberta')))['identity']}"

    def full(*args, **kwargs):
        (tmp_path / "out" / "half").write_text("a")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"export={tmp_path / 'out'}: "):
        patch.setattr("dual_lora.lab.evaluate.export.shutil.copytree", full)
        evaluate_command([run, f"export={tmp_path / 'out'}"])
    assert evaluate_command([run, f"export={tmp_path / 'out'}"]) == 0 and not (tmp_path / "out/half").exists()


def test_another_batch_size_must_be_a_number(runs_folder):
    with pytest.raises(UserError, match="eval.batch_size=abc: must be a whole number"):
        evaluate_command(["run=nowhere", "eval.batch_size=abc"])


@pytest.mark.parametrize("method", ["lora", "dual_lora", "full"])
def test_training_starts_from_another_runs_weights_with_a_fresh_head(method, runs_folder):
    first = train_run(Run.prepare(settings("tiny-deberta", f"method={method}")))
    folder = runs_folder / "adhoc" / first["identity"]
    chosen = settings("tiny-deberta", f"method={method}", f"init_from={folder}")
    assert Run.prepare(chosen).record.name != first["identity"]
    task = tasks.load(chosen.task.name)

    def weights(chosen):
        torch.manual_seed(1)
        base, _ = load_model(chosen, task)
        model = attach_method(base, chosen, task.form)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    started, fresh = weights(chosen), weights(settings("tiny-deberta", f"method={method}"))
    changed = {name for name in fresh if not torch.equal(started[name], fresh[name])}
    heads = {name for name in fresh if {"pooler", "classifier"} & set(name.split("."))}
    assert changed and heads and not changed & heads
    assert len(changed) > 0.5 * (len(fresh) - len(heads))
    assert train_run(Run.prepare(chosen))["steps"] == 4


def test_training_in_full_starts_from_another_run_of_a_model_with_tied_embeddings(runs_folder):
    first = train_run(Run.prepare(settings("tiny-gpt2", "method=full")))
    folder = runs_folder / "adhoc" / first["identity"]
    chosen, _, model, _ = attached("tiny-gpt2", "full", f"init_from={folder}")
    kept = load_file(folder / "model/model.safetensors")
    assert "lm_head.weight" not in kept and all(torch.equal(model.state_dict()[n], t) for n, t in kept.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert train_run(Run.prepare(chosen))["steps"] == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_from=nowhere", "init_from=nowhere: no finished run with adapter_model.safetensors"),
        ("init_from={run} method=lora", "trained with method=dual_lora, this run has method=lora; take method=dual_"),
    ],
)
def test_a_run_to_start_from_must_fit(override, message, runs_folder):
    run = runs_folder / "adhoc" / train_run(Run.prepare(settings("tiny-roberta")))["identity"]
    with pytest.raises(UserError, match=message):
        train_run(Run.prepare(settings("tiny-roberta", *override.format(run=run).split())))


def test_multirun_keeps_every_run_skips_finished_ones_and_tells_what_failed(runs_folder):
    sweep = ["train.py", "-m", "model=tiny-roberta", "task=demo/sentiment", *SHORT, "method=lora,dual_lora", "seed=0,1"]
    odd = "+method.peft.rank_pattern={query:1}"  # Dual LoRA needs at least 2, which the run finds out
    broken = [*sweep, odd]
    done = forked.run(*broken)
    assert done.returncode == 2
    assert "2 of 4 runs finished" in done.stderr
    assert done.stderr.count("failed: ") == 4 and "rank_pattern" in done.stderr  # each at once and again at the end
    finished = sorted(p.parent.name for p in runs_folder.glob("adhoc/*/result.json"))
    assert len(finished) == 2 and all("_lora_" in name for name in finished)
    again = forked.run(*drop_replaced_overrides([*sweep, odd, "method=lora"]))
    assert again.returncode == 0 and again.stdout.count("finished: ") == 2


def test_the_demo_run_shows_before_after_parameters_time_and_the_record(runs_folder):
    done = forked.run("train.py", "train.max_steps=3", "eval.max_examples=4")
    assert done.returncode == 0, done.stderr
    for word in ("before", "after", "parameters", "tokens/s", "record"):
        assert word in done.stdout
    assert "tiny-llama  demo/restaurants  dual_lora max_steps=3  seed 0" in done.stdout
    assert list(runs_folder.glob("adhoc/*/wandb/offline-run-*"))


def test_reevaluation_is_what_eval_runs(runs_folder):
    result = train_run(Run.prepare(settings("tiny-roberta")))
    done = forked.run("eval.py", f"run={runs_folder / 'adhoc' / result['identity']}", "eval.batch_size=3")
    assert done.returncode == 0, done.stderr
    assert "reproduced exactly" in done.stdout


def test_an_online_mirror_gets_the_run_while_the_record_stays_whole(runs_folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setattr(mirror, "INIT_SECONDS", 60.0)
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 60.0)
    with WandbStub() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        result = train_run(Run.prepare(settings("tiny-roberta", "wandb.mode=online")))
    (mirrored,) = stub.runs.values()
    recorded = (runs_folder / "adhoc" / result["identity"] / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in mirrored["rows"]] == [json.loads(line)["step"] for line in recorded]
    assert mirrored["displayName"] == result["identity"] and mirrored["exit_code"] == 0
    assert mirrored["summary"]["metrics"]["accuracy"] == result["metrics"]["accuracy"]


def test_a_mirror_without_a_server_does_not_harm_the_run(runs_folder, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    result = train_run(Run.prepare(settings("tiny-roberta", "wandb.mode=online")))
    assert "wandb sync" in capsys.readouterr().out
    assert list((runs_folder / "adhoc" / result["identity"]).glob("wandb/offline-run-*"))


GOLDEN_METHODS = [m for m in list_choices("method") if (GOLDEN / f"{m}.json").is_file()]


@pytest.mark.parametrize("method", GOLDEN_METHODS)
def test_twenty_steps_have_the_golden_losses(method, runs_folder):
    """DUAL_LORA_GOLDEN=write overwrites the files, for a change that is meant to change the losses. A method has golden
    losses if it has such a file."""
    result = train_run(
        Run.prepare(settings("tiny-roberta", f"method={method}", "train.max_steps=20", "eval.before=false"))
    )
    log = (runs_folder / "adhoc" / result["identity"] / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, log) if "train/loss" in row]
    golden = GOLDEN / f"{method}.json"
    if os.environ.get("DUAL_LORA_GOLDEN") == "write":
        golden.write_text(json.dumps(losses, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=1e-3)


def test_how_much_of_signs_gradient_is_clipped_is_logged(runs_folder):
    found = {}
    for extra in ("train.loss_scale=null", "train.loss_scale=65536", "+method.peft.kernel=eager", "method=lora"):
        words = ["train.log_steps=2", extra] + ["train.loss_scale=65536"] * extra.endswith("eager")
        result = train_run(Run.prepare(settings("tiny-roberta", *words)))
        logged = Record(runs_folder / "adhoc" / result["identity"]).read_log()
        shares = [row["train/clipped_share"] for row in logged if "train/clipped_share" in row]
        assert len(shares) == (0 if extra == "method=lora" else 2)
        assert result["clipped_share"] == max(shares, default=None)
        found[extra] = result["clipped_share"]
    none, scaled, eager, _ = found.values()
    assert none == 0 and 0 < scaled < 1 and eager == pytest.approx(scaled, rel=1e-3)


def test_the_clip_of_signs_gradient_bites_under_a_scaled_loss_alone(runs_folder):
    """With a mean loss no entry reaches 1; a loss scale of fp16 training changes nothing but that."""

    def trained(*overrides):
        chosen = settings("tiny-roberta", "eval.before=false", "method.peft.scale_warmup_steps=0", *overrides)
        train_run(Run.prepare(chosen))
        return load_file(Run.prepare(chosen).record.folder / "adapter" / "adapter_model.safetensors")

    def same(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    clip, free = trained("+method.peft.ste=clip"), trained("+method.peft.ste=identity")
    assert same(clip, free)
    assert same(free, trained("+method.peft.ste=identity", "train.loss_scale=65536"))
    assert not same(clip, trained("+method.peft.ste=clip", "train.loss_scale=65536"))


@pytest.mark.parametrize("method", ["full", "lora", "lora_plus", "dora", "dual_lora"])
def test_one_head_rate_for_every_method_and_each_group_is_recorded(method, runs_folder):
    chosen = settings("tiny-roberta", f"method={method}", "train.head_lr=3e-3", "train.lr=1e-3", "train.max_steps=1")
    result = train_run(Run.prepare(chosen))
    rates = {"full": {"weights": 1e-3}, "lora_plus": {"adapter": 1e-3, "B": 8e-3}}.get(method, {"adapter": 1e-3})
    assert result["learning_rates"] == rates | {"head": 3e-3}


def test_rates_reach_the_weights_biases_of_a_head_included(runs_folder, monkeypatch):
    """LoRA+ in PEFT trains a head's weights at A's rate and its biases at B's."""
    seen = {}

    def create(self, *args, real=RunTrainer.create_optimizer):
        optimizer = real(self, *args)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        seen.update({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        return optimizer

    monkeypatch.setattr(RunTrainer, "create_optimizer", create)
    train_run(Run.prepare(settings("tiny-roberta", "method=lora_plus", "train.lr=1e-3", "train.max_steps=1")))
    assert {rate for name, rate in seen.items() if "lora_B" in name} == {8e-3}
    assert {rate for name, rate in seen.items() if "lora_B" not in name} == {1e-3}
    assert any(name.endswith("bias") for name in seen)


def test_a_ramp_lasts_a_share_of_the_steps_and_begins_before_the_first(runs_folder):
    chosen = settings("tiny-roberta", "train.max_steps=50", "method.ramp_share=0.1", "eval.before=false")
    run = Run.prepare(chosen)
    result = train_run(run)
    config = json.loads((run.record.folder / "adapter" / "adapter_config.json").read_text())
    assert config["scale_warmup_steps"] == 5 and not any("ramp" in warning for warning in result["warnings"])
    first = [row for row in run.record.read_log() if "train/loss" in row][0]
    assert first["train/grad_norm"] > 0


def test_an_update_that_never_reached_its_full_scale_is_a_warning(runs_folder):
    chosen = settings("tiny-roberta", "train.max_steps=4", "method.peft.scale_warmup_steps=20", "eval.before=false")
    (warning,) = [w for w in train_run(Run.prepare(chosen))["warnings"] if "ramp" in w]
    assert "0.25 of its full scale" in warning  # one step before the first optimizer step, and four after


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["task.warmup_steps=9"],
            ["the learning rate only rose for 7 of 9 steps; train longer or lower task.warmup_steps"],
        ),
        (["task.warmup_steps=7"], []),
        (["task.warmup_steps=9", "train.schedule=constant_with_warmup"], 1),
    ],
)
def test_a_learning_rate_that_was_never_reached_is_a_warning(words, said, runs_folder):
    chosen = settings("tiny-roberta", "train.max_steps=7", *words, "eval.before=false")
    warnings = train_run(Run.prepare(chosen))["warnings"]
    found = [warning for warning in warnings if "learning rate" in warning]
    assert found == said if isinstance(said, list) else len(found) == said


def test_a_ratio_that_the_ranks_cannot_have_and_a_stop_of_two_tokens_are_warnings(runs_folder):
    words = ["method.rank=8", "method.magnitude_ratio=0.3", "task.stop=[a,Solution2]", "eval.before=false"]
    warnings = train_run(Run.prepare(settings("tiny-llama", *words)))["warnings"]
    cut = "outputs are cut there, but only after they are generated in full"
    assert "method.magnitude_ratio=0.3: the ranks are 2 and 6, a ratio of 0.25" in warnings
    assert [w for w in warnings if "task.stop" in w] == [f"task.stop: 'Solution2' is 2 tokens here: {cut}"]


def test_a_folder_of_another_kind_of_model_is_a_warning_and_costs_no_result(runs_folder):
    folder = ROOT / "dual_lora/lab/model/bundled/tiny-llama"
    words = ["model=gpt2-medium", f"model.path={folder}", "model.roles={q: q_proj, v: v_proj}", "model.adapt=[q,v]"]
    chosen = load_settings([*words, f"task={FAMILIES['tiny-llama']}", *SHORT, "eval.before=false"])
    assert "model.path is no gpt2-medium: model_type llama, not gpt2" in train_run(Run.prepare(chosen))["warnings"]


def test_the_first_optimizer_step_trains_every_factor(runs_folder, monkeypatch):
    moved = {}

    def step(self, *args, real=RunTrainer.training_step, **kwargs):
        loss = real(self, *args, **kwargs)
        moved.update({n: float(p.grad.abs().max()) for n, p in self.model.named_parameters() if "dual_lora" in n})
        return loss

    monkeypatch.setattr(RunTrainer, "training_step", step)
    train_run(Run.prepare(settings("tiny-roberta", "train.max_steps=1", "eval.before=false")))
    assert moved and min(moved.values()) > 0
