"""The method in others' tools, as docs/tools.md says: accelerate, pipelines, TRL, lm-evaluation-harness. Offline, on
bundled models. TRL and lm-evaluation-harness are an extra; `make test-tools` runs these tests where it is installed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

import tasks
from dual_lora import DualLoraConfig
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tests.support.finished_runs import export
from tests.support.places import ROOT

LLAMA = str(ROOT / "dual_lora/lab/model/bundled/tiny-llama")
PAGE = (ROOT / "docs/tools.md").read_text()
PROMPT = "name[The Blue Fig], food[Thai]"
EXTRA = "pip install -e '.[tools]'"
RAMP = 3
LEARNT = ["train.max_steps=10", "train.lr=0.02", "train.max_examples=64", "eval.max_examples=2", "eval.before=false"]
LEARNT += ["task.max_new_tokens=4", "wandb.mode=disabled"]


def load_base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(LLAMA)


def create_config(**fields) -> DualLoraConfig:
    return DualLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **fields)


@pytest.fixture(autouse=True)
def accelerate_state():
    """accelerate keeps the device and the accumulation of the first that asks for the whole process: forget them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LLAMA)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What eval.py exports of a short run whose adapter changes what the model writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        run = Run.prepare(load_settings(["model=tiny-llama", "task=demo/restaurants", *LEARNT]))
        train_run(run)
        merged = tmp_path_factory.mktemp("exported") / "merged"
        assert export(run.record.folder, merged) == 0
    adapter, found = merged / "adapter", merged.parent / "found"
    shutil.copytree(adapter, found)
    # An export names no folder of this machine. PEFT's own save_pretrained does, and then others find the base model.
    content = json.loads((found / "adapter_config.json").read_text())
    (found / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": LLAMA}))
    return {"merged": merged, "adapter": adapter, "found": found}


def compute_logits(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokenizer(PROMPT, return_tensors="pt")["input_ids"]).logits


def read_ramps(model: torch.nn.Module) -> set[float]:
    return {buffer.item() for name, buffer in model.named_buffers() if name.endswith("update_scale")}


# Loading.


def test_without_the_import_peft_knows_no_such_type_and_the_card_says_why(folders, monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "DUAL_LORA")
    with pytest.raises(KeyError, match="^'DUAL_LORA'$"):
        PeftModel.from_pretrained(load_base(), folders["adapter"])
    assert "KeyError: 'DUAL_LORA'" in (folders["adapter"] / "README.md").read_text()


def find_code(word: str) -> str:
    """Return the Python of docs/tools.md that holds a word."""
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if word in part]
    return code


def load_as_documented(folder: str) -> torch.nn.Module:
    names = {"PeftModel": PeftModel, "base": load_base(), "FOLDER": folder}
    exec(find_code("config=DualLoraConfig.from_pretrained"), names)
    return names["model"]


LOADERS = {
    "as documented": load_as_documented,
    "PeftModel": lambda folder: PeftModel.from_pretrained(load_base(), folder),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained,
    "transformers": AutoModelForCausalLM.from_pretrained,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_what_was_saved(loader, folders, tokenizer):
    wanted = compute_logits(AutoModelForCausalLM.from_pretrained(folders["merged"]), tokenizer)
    found = compute_logits(LOADERS[loader](str(folders["found"])), tokenizer)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (compute_logits(load_base(), tokenizer) - wanted).abs().max() > 0.1


# transformers.pipeline.


def test_a_pipeline_writes_the_same_with_the_adapter_and_merged(folders, tokenizer):
    adapted = PeftModel.from_pretrained(load_base(), folders["adapter"])
    models = {
        "PEFT model": {"model": adapted, "tokenizer": tokenizer},
        "adapter folder": {"model": str(folders["found"]), "tokenizer": tokenizer},
        "merged folder": {"model": str(folders["merged"])},
        "base": {"model": LLAMA},
    }
    options = {"max_new_tokens": 12, "do_sample": False}
    texts = {name: pipeline("text-generation", **given)(PROMPT, **options) for name, given in models.items()}
    assert texts["PEFT model"] == texts["adapter folder"] == texts["merged folder"] != texts["base"]


def test_a_pipeline_on_an_exported_run_answers_as_its_record(trained, tmp_path):
    assert export(trained, tmp_path / "out") == 0
    recorded = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    task = tasks.load("demo/sentiment")
    texts = {row["id"]: row["text"] for row in task.split("validation", None).rows}
    answers = pipeline("text-classification", model=str(tmp_path / "out"))([texts[row["id"]] for row in recorded])
    assert recorded and [answer["label"] for answer in answers] == [task.labels[row["answer"]] for row in recorded]


# accelerate.


def test_a_loop_with_accelerate_trains_and_ramps_once_an_optimizer_step(tokenizer, tmp_path):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = get_peft_model(load_base(), create_config(scale_warmup_steps=RAMP))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3, weight_decay=0)
    ids = tokenizer("The Blue Fig serves Thai food.", return_tensors="pt")["input_ids"][0]
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader([ids] * 24, batch_size=2))
    losses, ramps = [], []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        ramps.append(read_ramps(accelerator.unwrap_model(model)))
    assert [round(min(r) * RAMP) for r in ramps] == [0, 1, 1, 2, 2, *[3] * 7] and all(len(r) == 1 for r in ramps)
    assert losses[-1] < 0.8 * losses[0]
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(), tmp_path)
    torch.testing.assert_close(
        compute_logits(loaded, tokenizer), compute_logits(accelerator.unwrap_model(model), tokenizer)
    )


# TRL.


def create_sft_trainer(model: torch.nn.Module, tokenizer, folder: Path):
    """Return TRL's trainer of a new adapter on one example, as docs/tools.md makes it."""
    trl = pytest.importorskip("trl", reason=f"TRL is not installed: {EXTRA}")
    row = {"prompt": PROMPT, "completion": " The Blue Fig serves Thai food."}
    arguments = trl.SFTConfig(
        str(folder),
        max_steps=8,
        learning_rate=5e-3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([row] * 16),
        processing_class=tokenizer,
        peft_config=create_config(scale_warmup_steps=RAMP),
    )


def test_the_sft_trainer_of_trl_trains_saves_and_documents_an_adapter(tokenizer, tmp_path):
    trainer = create_sft_trainer(load_base(), tokenizer, tmp_path)
    assert trainer.args.gradient_checkpointing  # its default, with which forwards run twice
    trained_weights = {n.rsplit(".", 1)[1] for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained_weights == {"A", "B", "C", "D"}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0] and read_ramps(trainer.model) == {1.0}
    trainer.save_model(str(tmp_path / "adapter"))
    assert "import dual_lora" in (tmp_path / "adapter/README.md").read_text()
    loaded = PeftModel.from_pretrained(load_base(), tmp_path / "adapter")
    torch.testing.assert_close(compute_logits(loaded, tokenizer), compute_logits(trainer.model, tokenizer))


def test_what_trl_casts_on_a_quantised_base_is_cast_back_as_documented(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(LLAMA, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    trainer = create_sft_trainer(base, tokenizer, tmp_path)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    exec(find_code("is_loaded_in"), {"trainer": trainer})
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


# lm-evaluation-harness.

CHOICES = ["The Blue Fig serves Thai food.", "There is a cheap restaurant."]
TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def own_task(tmp_path) -> Path:
    """A folder with a task of one's own."""
    pytest.importorskip("lm_eval", reason=f"lm-evaluation-harness is not installed: {EXTRA}")
    rows = [{"question": PROMPT.replace("Thai", food), "choices": CHOICES, "gold": 0} for food in ("Thai", "Greek")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_choice.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    return tmp_path


def compute_choice(model: torch.nn.Module, tokenizer, prompt: str, choice: str) -> float:
    """Return the log-likelihood of a choice after a prompt and a blank, in nats."""
    context, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {choice}")["input_ids"]
    with torch.no_grad():
        scores = log_softmax(model.eval()(torch.tensor([whole])).logits[0].float(), -1)
    return sum(scores[n - 1, whole[n]].item() for n in range(len(context), len(whole)))


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_lm_eval_scores_an_exported_model_as_transformers_does(form, own_task, folders, tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    given = {"merged": f"pretrained={folders['merged']}", "adapter": f"pretrained={LLAMA},peft={folders['adapter']}"}
    own = TaskManager(include_path=str(own_task), include_defaults=False)
    options = {"tasks": ["own_choice"], "task_manager": own, "device": "cpu", "batch_size": 2, "log_samples": True}
    found = simple_evaluate("hf", given[form], **options)
    model = AutoModelForCausalLM.from_pretrained(folders["merged"])
    samples = sorted(found["samples"]["own_choice"], key=lambda sample: sample["doc_id"])
    wanted = [[compute_choice(model, tokenizer, s["doc"]["question"], c) for c in CHOICES] for s in samples]
    scores = [[score for ((score, _),) in sample["resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(wanted), rtol=1e-3, atol=1e-3)
    right = [choices[0] > choices[1] for choices in wanted]
    assert found["results"]["own_choice"]["acc,none"] == sum(right) / len(right)


def test_the_command_of_lm_eval_takes_an_exported_folder(own_task, folders):
    (line,) = [line for line in PAGE.splitlines() if line.startswith("    lm_eval ")]
    places = {"pretrained=DIR": f"pretrained={folders['merged']}", "FOLDER": str(own_task)}
    words = [places.get(word, word) for word in line.split()[1:]]
    command = [sys.executable, "-m", "lm_eval", *words, "--device", "cpu"]
    done = subprocess.run(command, cwd=own_task, capture_output=True, text=True)
    assert done.returncode == 0 and "|own_choice|" in done.stdout.replace(" ", ""), done.stderr
