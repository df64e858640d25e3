"""Rows that a model has too few positions for are named before anything is trained."""

import json
import shutil
from pathlib import Path

import pytest

from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.evaluate.evaluate import compute_outputs
from dual_lora.lab.evaluate.predict import score_choices
from dual_lora.lab.inputs.splits import load_development_split, load_scored_splits
from dual_lora.lab.model.encode import encode_prompt, encode_prompts
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from dual_lora.lab.train.trainer import RunTrainer
from tests.support.refused_runs import SHORT, refuse

LONG = "a film and a soup " * 100  # more tokens than the bundled models take: 256


@pytest.fixture
def untrained(monkeypatch, runs_folder) -> None:
    """Nothing may be trained."""

    def fail(self, *args):
        raise AssertionError("trained")

    monkeypatch.setattr(RunTrainer, "fit_run", fail)


def write_rows(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_instructions(folder: Path, **last: str) -> Path:
    """Write rows to train on and to score, of which the last has other columns."""
    write_rows(folder, "train", [{"prompt": f"say {n}", "response": f"it is {n}"} for n in range(8)])
    rows = [{"prompt": f"tell {n}", "response": f"that is {n}"} for n in range(4)]
    write_rows(folder, "test", [*rows, rows[0] | {"prompt": "tell me"} | last])
    return folder


def write_classes(folder: Path, split: str | None, place: int = -1) -> Path:
    """Write rows of two classes, of which one in a split is long."""
    for name, count in (("train", 24), ("test", 8)):
        rows = [{"text": f"{name} {n} film", "label": n % 2} for n in range(count)]
        if name == split:
            rows[place]["text"] += LONG
        write_rows(folder, name, rows)
    return folder


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize("loss", ["true", "false"])
def test_a_long_prompt_to_score_is_named_before_training(model, loss, tmp_path, untrained):
    data = write_instructions(tmp_path / "data", prompt=LONG)
    words = [f"model={model}", "task=instruction", f"data_dir={data}", "task.max_new_tokens=8"]
    said = refuse([*words, f"task.options.loss={loss}"])
    assert f"task.max_new_tokens=8: {model} takes 256 tokens, and the prompt of test-4 of test alone has" in said
    assert said.endswith("; remove the row, or take another model")  # fewer new tokens would not help


def test_new_tokens_that_do_not_fit_are_told_with_the_number_that_does(tmp_path, untrained):
    data = write_instructions(tmp_path / "data", prompt="tell me of a film")
    words = ["model=tiny-gpt2", "task=instruction", f"data_dir={data}", "task.max_new_tokens=250"]
    said = refuse(words)
    assert "the prompt of test-4 of test alone has" in said
    settings = load_settings(words)
    row = load_scored_splits(load_task(settings), settings)["test"].rows[4]
    room = 256 - len(encode_prompt(load_tokenizer(settings), row, settings))
    assert f"take task.max_new_tokens={room} or less, remove the row, or take another model" in said


def test_a_long_response_whose_likelihood_is_scored_is_named_before_training(tmp_path, untrained):
    data = write_instructions(tmp_path / "data", response=LONG)
    words = ["model=tiny-gpt2", "task=instruction", f"data_dir={data}", "task.max_new_tokens=8"]
    said = refuse(words)
    assert "task=instruction: tiny-gpt2 takes 256 tokens, and test-4 of test has" in said
    assert "take task.options.loss=false, remove the row, or take another model" in said


def test_without_its_likelihood_a_long_response_is_scored(tmp_path, runs_folder):
    data = write_instructions(tmp_path / "data", response=LONG)
    words = ["model=tiny-gpt2", "task=instruction", f"data_dir={data}", "task.max_new_tokens=8"]
    result = train_run(Run.prepare(load_settings([*SHORT, *words, "task.options.loss=false"])))
    assert "loss" not in result["metrics"]


def test_a_long_prompt_beside_a_long_response_of_another_row_is_scored(tmp_path):
    """Each row fits; the batch does not, and is scored in parts."""
    data = write_instructions(tmp_path / "data")
    prompt, response = "tell me of a film " * 30, "a film and a soup " * 30
    write_rows(data, "test", [{"prompt": prompt, "response": "yes"}, {"prompt": "tell", "response": response}])
    words = ["model=tiny-gpt2", "task=instruction", f"data_dir={data}", "task.max_new_tokens=8"]
    settings = load_settings([*SHORT, *words])
    task = load_task(settings)
    model, tokenizer = load_model(settings, task)
    rows = list(load_scored_splits(task, settings)["test"].rows)
    together = compute_outputs(model, tokenizer, task, rows, settings, "test", score_choices)
    alone = [compute_outputs(model, tokenizer, task, [row], settings, "test", score_choices)[0] for row in rows]
    lengths = [len(encode_prompt(tokenizer, rows[0], settings)), together[1][0][1]]
    assert max(lengths) < 250 and sum(lengths) > 256 and together == alone


@pytest.mark.parametrize(
    ("split", "words", "row"),
    [
        ("test", [], "test-7 of test"),
        ("train", ["eval.development_rows=23", "train.early_stopping=1"], "train-0 of the development rows"),
        ("train", ["task.validation_rows=23"], "train-0 of the validation rows"),
        ("train", [], "train-0 of train"),
    ],
)
def test_a_long_text_of_any_rows_is_named_before_training(split, words, row, tmp_path, untrained):
    """With 23 of 24 rows set apart, the long one is among them."""
    data = write_classes(tmp_path / "data", split, place=0 if split == "train" else -1)
    given = ["model=tiny-roberta", "task=classification", f"data_dir={data}", "task.max_length=1024", *words]
    said = refuse(given)
    assert f"task.max_length=1024: tiny-roberta takes 256 tokens, and {row} has " in said
    assert said.endswith("; take task.max_length=256 or less, or another model")


def test_the_length_that_is_told_for_a_text_helps(tmp_path, runs_folder):
    data = write_classes(tmp_path / "data", "test")
    given = ["model=tiny-roberta", "task=classification", f"data_dir={data}", "task.max_length=256"]
    assert train_run(Run.prepare(load_settings([*SHORT, *given])))["data"]["test"]["cut"] == 1


def test_the_chat_template_is_tried_on_development_rows_before_the_model_is_loaded(tmp_path, untrained, monkeypatch):
    folder = shutil.copytree(BUNDLED / "tiny-llama", tmp_path / "model")
    refuses = "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}"
    (folder / "chat_template.jinja").write_text(f"{{% for m in messages %}}{refuses}{{% endfor %}}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{**turns[0], "content": f"say {n}"}, turns[1]]} for n in range(8)]
    write_rows(tmp_path / "data", "test", [{"messages": turns}])
    words = ["model=tiny-llama", f"model.path={folder}", "model.chat=true", "task=instruction"]
    words += [f"data_dir={tmp_path / 'data'}", "eval.development_rows=4", "train.early_stopping=1"]
    write_rows(tmp_path / "data", "train", rows)
    settings = load_settings([*SHORT, *words])
    apart = load_development_split(load_task(settings), settings)["test"].rows["id"][0]
    rows[int(apart.removeprefix("train-"))]["messages"].insert(0, {"role": "system", "content": "be brief"})
    write_rows(tmp_path / "data", "train", rows)
    monkeypatch.setattr("dual_lora.lab.train.run.draw_initial_model", None)
    assert f"chat template fails on {apart} of instruction (System role not supported)" in refuse(words)


def test_prompts_encoded_together_are_those_encoded_alone():
    for model in ("tiny-gpt2", "tiny-llama"):
        settings = load_settings([f"model={model}", "task=demo/choice"])
        tokenizer = load_tokenizer(settings)
        prompts = ["", "one", "two words", f"ends in {tokenizer.eos_token}", tokenizer.eos_token]
        rows = [{"id": str(n), "prompt": prompt} for n, prompt in enumerate(prompts)]
        assert encode_prompts(tokenizer, rows, settings) == [encode_prompt(tokenizer, row, settings) for row in rows]
