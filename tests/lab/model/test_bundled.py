"""The bundled models: small, trained, and loadable from their folders alone."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import tasks
from tasks import demo
from tests.support.places import ROOT
from tools.make_bundled_models import format_readme

FOLDER = ROOT / "dual_lora" / "lab" / "model" / "bundled"
DECODERS = ["tiny-gpt2", "tiny-llama"]
ENCODERS = ["tiny-roberta", "tiny-deberta"]
MODELS = DECODERS + ENCODERS


def tokenizer_of(name: str):
    return AutoTokenizer.from_pretrained(FOLDER / name)


def model_of(name: str, random: bool = False):
    head = AutoModelForCausalLM if name in DECODERS else AutoModelForMaskedLM
    model = head.from_pretrained(FOLDER / name)
    if random:
        torch.manual_seed(0)
        model = head.from_config(model.config)
    return model.eval()


def task_texts() -> list[str]:
    rows = [row for subset in demo.SUBSETS for s in ("train", "validation") for row in demo.task(subset).split(s).rows]
    return [row.get("text") or row["prompt"] + row["target"] for row in rows]


@torch.no_grad()
def loss(name: str, random: bool = False) -> float:
    """Return the mean loss a token on validation sentences; an encoder's every fifth token is masked."""
    model, tokenizer = model_of(name, random), tokenizer_of(name)
    texts = list(tasks.load("demo/sentiment").split("validation").rows["text"])
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
    if name in ENCODERS:
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        hidden[:, 3::5] = True
        labels = labels.masked_fill(~hidden, -100)
        batch["input_ids"] = ids.masked_fill(hidden & (labels != -100), tokenizer.mask_token_id)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.item()


def test_the_readme_is_what_the_script_writes():
    assert (FOLDER / "README.md").read_text("utf-8") == format_readme()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_whole_and_small(name):
    files = list((FOLDER / name).iterdir())
    assert sum(file.stat().st_size for file in files) <= 3e6
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    needed |= {"generation_config.json"} if name in DECODERS else set()
    assert needed <= {file.name for file in files}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_in_float32_with_the_head_a_task_needs(name):
    model = model_of(name)
    assert model.dtype == torch.float32
    if name in ENCODERS:
        classifier = AutoModelForSequenceClassification.from_pretrained(FOLDER / name, num_labels=3)
        assert classifier(**tokenizer_of(name)("the food", return_tensors="pt")).logits.shape == (1, 3)


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_round_trips_every_demo_text(name):
    tokenizer = tokenizer_of(name)
    for text in task_texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("name", MODELS)
def test_model_and_tokenizer_agree(name):
    config, tokenizer = model_of(name).config, tokenizer_of(name)
    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    if name in DECODERS:
        assert config.eos_token_id == tokenizer.eos_token_id


def test_special_tokens_stand_where_the_families_put_them():
    assert {name: tokenizer_of(name)("the").tokens() for name in MODELS} == {
        "tiny-gpt2": ["the"],
        "tiny-llama": ["<s>", "the"],
        "tiny-roberta": ["<s>", "the", "</s>"],
        "tiny-deberta": ["[CLS]", "the", "[SEP]"],
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_trained(name):
    trained, untrained, uniform = loss(name), loss(name, random=True), math.log(model_of(name).config.vocab_size)
    assert untrained > 0.9 * uniform
    assert trained < 0.3 * uniform


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_does_not_change_what_is_generated(name):
    model, tokenizer = model_of(name), tokenizer_of(name)
    prompts = ["the bakery", "Solution1: bread\n\nSolution2: roses\n\nroses is"]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    padded = torch.stack(model.generate(**batch, **options).logits, dim=1)
    for row, prompt in zip(padded, prompts, strict=True):
        single = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        alone = torch.stack(model.generate(**single, **options).logits, dim=1)[0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-4, rtol=1e-4)
