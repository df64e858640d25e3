"""Changed copies of the folders of bundled models, and what their models compute."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate.evaluate import compute_outputs
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.encode import build_collator, build_generation_encoder, build_sentence_encoder
from dual_lora.lab.model.load import load_model

PAIRS = {
    "tiny-llama": "demo/restaurants",
    "tiny-roberta": "demo/sentiment",
    "tiny-gpt2": "demo/sentiment",
    "tiny-deberta": "demo/sentiment",
}

CONFIG, DECODING, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"

SPECIAL, WEIGHTS, INDEX = "special_tokens_map.json", "model.safetensors", "model.safetensors.index.json"


def choose(model: str, task: str, folder: Path, *overrides: str):
    short = ["task.max_new_tokens=8"] if task == "demo/restaurants" else []
    return load_settings([f"model={model}", f"task={task}", f"model.path={folder}", *short, *overrides])


def compute(model: str, task: str, folder: Path, *overrides: str) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Return logits and loss of a batch of rows of very different lengths, and the model's answers."""
    settings = choose(model, task, folder, *overrides)
    asked = load_task(settings)
    torch.manual_seed(0)
    base, tokenizer = load_model(settings, asked)
    rows = load_split(asked, "validation", settings).rows.to_list()[:40]
    rows = sorted(rows, key=lambda row: len(row.get("prompt") or row["text"]))
    rows = [rows[0], rows[-1], rows[5]]
    encoder = build_generation_encoder if asked.form == "generation" else build_sentence_encoder
    columns = encoder(tokenizer, settings)
    batch = build_collator(asked, tokenizer)([columns(row) for row in rows])
    with torch.no_grad():
        found = base.eval()(**batch)
    real = found.logits[batch["attention_mask"].bool()] if asked.form == "generation" else found.logits
    return real, found.loss, compute_outputs(base, tokenizer, asked, rows, settings, "test")


def is_equal(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


def compare(plain: dict, model: str, task: str, folder: Path, *overrides: str) -> None:
    key = (model, task, overrides)
    if key not in plain:
        plain[key] = compute(model, task, BUNDLED / model, *overrides)
    assert is_equal(compute(model, task, folder, *overrides), plain[key])


def copy(model: str, place: Path) -> Path:
    return Path(shutil.copytree(BUNDLED / model, place / "model"))


def change(folder: Path, name: str, **fields: object) -> Path:
    """Set fields of a JSON file, which need not be there."""
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | fields))
    return folder


def refused(folder: Path, model: str, *overrides: str, task: str | None = None) -> str:
    """Return the line in which a folder is refused."""
    settings = choose(model, task or PAIRS[model], folder, *overrides)
    with pytest.raises(UserError) as error:
        load_model(settings, load_task(settings))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)
