"""Outputs at any batch size, from the shared cache and from plain `generate`, and the likelihood of given texts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tasks
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate import evaluate, predict
from dual_lora.lab.evaluate.beam_search import search_beams
from dual_lora.lab.evaluate.evaluate import compute_outputs
from dual_lora.lab.evaluate.kv_cache import read_prompts
from dual_lora.lab.evaluate.predict import score_choices
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.adapt import attach_method
from dual_lora.lab.model.encode import IGNORED_LABEL, encode_prompt, encode_rows
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.identity import compute_identity, select_identity_settings
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tasks import TaskError
from tools.throughput import measure_command

WRITERS = ("tiny-gpt2", "tiny-llama")
READERS = ("tiny-roberta", "tiny-deberta")
TASKS = list_choices("task")


def loaded(model: str, task: str, *overrides: str):
    chosen = load_settings([f"model={model}", f"task={task}", *overrides])
    task = load_task(chosen)
    torch.manual_seed(0)
    base, tokenizer = load_model(chosen, task)
    return chosen, task, base, tokenizer


def some(task, name: str, chosen, count: int = 9) -> list[dict]:
    return list(load_split(task, name, chosen).rows)[:count]


def is_public(name: str) -> bool:
    """Whether a task knows where its data comes from when no folder is given."""
    try:
        return bool(tasks.load(name).source())
    except TaskError:
        return False


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", WRITERS + READERS)
def test_predictions_are_the_same_at_batch_1_and_8(model, name, request):
    chosen = load_settings(["model=tiny-llama", f"task={name}"])
    writes = load_task(chosen).form == "generation"
    if writes and model in READERS:
        pytest.skip(f"{model} writes no text")
    own = name in ("classification", "instruction")
    if not own and not is_public(name):
        pytest.skip(f"{name} reads files of the user's only; its own tests have some")
    folder = "own_data" if own else "official_data"
    where = [] if name.startswith("demo/") else [f"data_dir={request.getfixturevalue(folder)}"]
    if name == "dart" and not list(request.getfixturevalue("official_data").rglob("dart-v1.1.1-full-train.json*")):
        pytest.skip("DART's training file is not among the official files here")
    short = ["task.max_new_tokens=12"] if writes else []
    chosen, task, base, tokenizer = loaded(model, name, "method=dual_lora", *where, *short)
    adapted = attach_method(base, chosen, task.form)
    for split in task.eval_splits[:2]:
        rows = sorted(
            some(task, split, chosen, 60), key=lambda row: len(row.get("prompt") or row["text"] + row["text_pair"])
        )[:9]
        given = {}
        for size in (1, 8):
            sized = load_settings(
                [f"model={model}", f"task={name}", "method=dual_lora", f"eval.batch_size={size}", *short]
            )
            given[size] = compute_outputs(adapted, tokenizer, task, rows, sized, "test")
        assert given[1] == (pytest.approx(given[8], rel=1e-5) if task.form == "regression" else given[8])


@pytest.mark.parametrize("model", WRITERS)
@pytest.mark.parametrize("beams", [1, 4])
def test_outputs_are_those_of_plain_generate(model, beams):
    chosen, task, base, tokenizer = loaded(
        model, "demo/restaurants", f"task.num_beams={beams}", "task.max_new_tokens=20", "eval.batch_size=5"
    )
    rows = some(task, "validation", chosen, 10)
    found = compute_outputs(base, tokenizer, task, rows, chosen, "test")
    for row, text in zip(rows, found, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, row, chosen)])
        with torch.inference_mode():
            made = base.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=20,
                num_beams=beams,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("model", WRITERS)
def test_only_what_was_generated_is_not_repeated(model, beams):
    options = [f"task.num_beams={beams}", "task.max_new_tokens=30"]
    chosen, task, base, tokenizer = loaded(model, "demo/restaurants", *options)
    rows = some(task, "validation", chosen, 10)

    def outputs(ngram: int, size: int = 10) -> list[list[int]]:
        changed = replace(chosen, task=replace(chosen.task, no_repeat_ngram=ngram))
        changed = replace(changed, eval=replace(changed.eval, batch_size=size))
        texts = compute_outputs(base, tokenizer, task, rows, changed, "test")
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def repeats(ids: list[int]) -> bool:
        pairs = list(zip(ids, ids[1:], strict=False))
        return len(set(pairs)) < len(pairs)

    free, bound = outputs(0), outputs(2)
    assert any(map(repeats, free)) and not any(map(repeats, bound))
    assert outputs(2, size=1) == bound
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    shared = [
        set(zip(p, p[1:], strict=False)) & set(zip(o, o[1:], strict=False)) for p, o in zip(prompts, bound, strict=True)
    ]
    assert any(shared)  # an output may copy from its prompt


@pytest.mark.parametrize("model", WRITERS)
@pytest.mark.parametrize(
    "prompts",
    [[[7]], [[7], [8, 9]], [[5, 6, 7], [5, 6, 7]], [[5, 6, 7, 8, 9], [5, 6, 4], [5, 6]], [[5, 6], [7, 8, 9]]],
    ids=["one token", "nothing shared", "equal", "one begins another", "different lengths"],
)
def test_prompts_of_any_shape_are_read(model, prompts):
    _, _, base, tokenizer = loaded(model, "demo/restaurants")
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.inference_mode():
        inputs = read_prompts(base.eval(), prompts, tokenizer.pad_token_id)
        made = base.generate(**inputs, **options, custom_generate=search_beams)[:, max(map(len, prompts)) :]
        for prompt, tokens in zip(prompts, made, strict=True):
            ids = torch.tensor([prompt])
            alone = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
            assert tokens[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("model", WRITERS)
def test_a_stop_text_of_one_token_ends_the_output(model):
    chosen, task, base, tokenizer = loaded(model, "demo/restaurants", "task.max_new_tokens=20")
    rows = some(task, "validation", chosen, 3)
    text = compute_outputs(base, tokenizer, task, rows, chosen, "test")[0]
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    place = next(i for i in range(2, len(words)) if words[i] not in words[:i])
    stop = tokenizer.decode(words[place])
    assert tokenizer(stop, add_special_tokens=False)["input_ids"] == [words[place]]
    chosen = replace(chosen, task=replace(chosen.task, stop=[stop]))
    assert compute_outputs(base, tokenizer, task, rows, chosen, "test")[0] == tokenizer.decode(words[: place + 1])


@pytest.mark.parametrize("model", WRITERS)
def test_likelihoods_are_sums_over_the_tokens_of_each_choice(model, monkeypatch):
    chosen, task, base, tokenizer = loaded(model, "demo/restaurants", "eval.batch_size=3")
    rows = some(task, "validation", chosen, 7)
    texts = [[" the", " a restaurant near it", " it serves"], [" one", " two three"]]
    monkeypatch.setattr(task, "choices", lambda row: texts[len(row["prompt"]) % 2])
    found = compute_outputs(base, tokenizer, task, rows, chosen, "test", score_choices)
    for row, scores in zip(rows, found, strict=True):
        prompt = encode_prompt(tokenizer, row, chosen)
        for text, (score, tokens) in zip(task.choices(row), scores, strict=True):
            choice = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = base.eval()(input_ids=torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
            expected = sum(logits[place, token].item() for place, token in zip(places, choice, strict=True))
            assert score == pytest.approx(expected, abs=1e-4) and tokens == len(choice)


def test_throughput_compares_with_single_prompts_at_equal_outputs(runs_folder, capsys):
    overrides = ["model=tiny-llama", "task=demo/restaurants", "train.max_steps=2", "eval.max_examples=5"]
    result = train_run(Run.prepare(load_settings([*overrides, "wandb.mode=disabled", "task.max_new_tokens=8"])))
    run = f"run={runs_folder / 'adhoc' / result['identity']}"
    capsys.readouterr()
    assert measure_command([run, "split=validation", "eval.max_examples=6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == found["equal_outputs"] == 6 and found["ratio"] > 0
    with pytest.raises(UserError, match="split=test: demo/restaurants has validation"):
        measure_command([run, "split=test"])


TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn['role'] + ' says ' + turn['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'the restaurant says ' }}{% endif %}"
)


@pytest.fixture
def talker(tmp_path) -> list[str]:
    """The bundled model with a chat template, as overrides."""
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-llama", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return [f"model.path={folder}", "model.chat=true"]


def test_a_chat_is_the_same_in_training_and_evaluation(talker, monkeypatch):
    chosen, task, base, tokenizer = loaded("tiny-llama", "demo/restaurants", *talker, "task.max_new_tokens=8")
    rows = some(task, "validation", chosen)
    examples = encode_rows(load_split(task, "validation", chosen).rows.select(range(9)), task, tokenizer, chosen)
    seen = []
    read = read_prompts
    monkeypatch.setattr(
        predict, "read_prompts", lambda model, prompts, *rest: seen.extend(prompts) or read(model, prompts, *rest)
    )
    compute_outputs(base, tokenizer, task, rows, chosen, "test")
    for row, example in zip(rows, examples, strict=True):
        told = [label for label in example["labels"] if label != IGNORED_LABEL]
        prompt = example["input_ids"][: -len(told)]
        said = f"<s>user says {row['prompt']}\nthe restaurant says "
        assert tokenizer.decode(prompt) == said and prompt.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(told) == row["target"] + tokenizer.eos_token
        assert example["labels"] == [IGNORED_LABEL] * len(prompt) + example["input_ids"][len(prompt) :]
        assert prompt in seen


def test_a_chat_is_answered_alike_at_any_batch_size(talker):
    chosen, task, base, tokenizer = loaded("tiny-llama", "demo/restaurants", *talker, "task.max_new_tokens=12")
    rows = some(task, "validation", chosen, 12)
    given = {}
    for size in (1, 8):
        sized = replace(chosen, eval=replace(chosen.eval, batch_size=size))
        given[size] = compute_outputs(base, tokenizer, task, rows, sized, "test")
    plainly = replace(chosen, model=replace(chosen.model, chat=False))
    assert given[1] == given[8] != compute_outputs(base, tokenizer, task, rows, plainly, "test")


DATED = "{% macro today(form) %}{{ strftime_now(form) if strftime_now is defined }}{% endmacro %}"
DATED += "{{ today('%d %b %Y') }} {{ strftime_now('%-d/%m %H:%M%z') }}: {{ messages[0].content }}"


def test_a_chat_template_that_prints_the_date_prints_the_same_one_every_day(talker):
    chosen = load_settings(["model=tiny-llama", "task=demo/restaurants", *talker])
    (Path(chosen.model.path) / "chat_template.jinja").write_text(DATED)
    tokenizer = load_tokenizer(chosen)
    prompt = encode_prompt(tokenizer, {"id": "1", "prompt": "The oak"}, chosen)
    assert tokenizer.decode(prompt) == "26 Jul 2024 26/07 00:00: The oak"


def test_only_a_chat_is_named(talker):
    place, chat = talker
    known = load_settings(["model=tiny-llama"])
    assert compute_identity(load_settings(["model=tiny-llama", "model.chat=false"])) == compute_identity(known)
    assert compute_identity(load_settings(["model=tiny-llama", chat])) != compute_identity(known)
    assert "chat" not in select_identity_settings(known)["model"]


@pytest.mark.parametrize(
    ("task", "message"),
    [("demo/restaurants", "tiny-llama's tokenizer has no chat template"), ("demo/sentiment", "has no prompts")],
)
def test_a_chat_without_template_or_prompts_is_refused(task, message):
    with pytest.raises(UserError, match=f"model.chat=true: .*{message}"):
        loaded("tiny-llama", task, "model.chat=true")


def build_sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer that, like SentencePiece's, writes a blank in front of a text and none behind a word."""
    vocabulary = {"</s>": 0, "\u2581": 1, "x": 2, "\u2581x": 3, ".": 4, "\u2581.": 5, "#": 6, "##": 7, "\u2581###": 8}
    merges = [("\u2581", "x"), ("\u2581", "."), ("#", "#"), ("\u2581", "##"), ("\u2581##", "#")]
    vocabulary["\u2581##"] = 9
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def test_a_stop_is_the_token_it_is_behind_a_word():
    tokenizer = build_sentencepiece()
    chosen = load_settings(["model=tiny-llama", "task=demo/restaurants", "task.stop=['.','###']"])
    assert predict.build_generation_config(tokenizer, chosen).eos_token_id == [0, 5, 4, 8]
    (warning,) = predict.describe_idle_stops(tokenizer, chosen)
    assert warning.startswith("task.stop: '###' is 2 tokens here: outputs are cut there")


@pytest.mark.parametrize(
    ("output", "answer"),
    [("A pub.", "A pub"), ("A pub ### more.", "A pub "), ("A pub", "A pub"), (".A", ""), ("##", "##")],
)
def test_what_is_judged_ends_before_the_first_stop(output, answer, monkeypatch):
    chosen = load_settings(["model=tiny-llama", "task=demo/restaurants", "task.stop=['###','.']"])
    task = load_task(chosen)
    split = load_split(task, "validation", chosen)
    split = replace(split, rows=split.rows.select([0]))
    monkeypatch.setattr(evaluate, "compute_outputs", lambda *given: [output])
    monkeypatch.setattr(type(task), "choices", lambda self, row: [])
    seen = []
    monkeypatch.setattr(type(task), "judge", lambda self, row, text: seen.append(text) or {"score": 1.0})
    monkeypatch.setattr(type(task), "score", lambda self, results: {task.metric: 1.0})
    _, (row,) = evaluate.evaluate_splits(None, None, task, {"validation": split}, chosen)
    assert seen == [answer] and row["output"] == output


@pytest.mark.parametrize(("prompts", "lost"), [(["a b"] * 3, 0), (["a b", "a " * 40, "a b"], 1), (["a " * 40] * 3, 3)])
def test_targets_that_are_cut_off_whole_are_counted_where_prompts_carry_loss(prompts, lost, capfd):
    words = ["model=tiny-llama", "task=demo/restaurants", "task.loss_on_prompt=true", "task.max_length=30"]
    chosen = load_settings(words)
    rows = [{"id": str(i), "prompt": text, "target": "yes", "references": ["yes"]} for i, text in enumerate(prompts)]
    given = Dataset.from_list(rows), load_task(chosen), load_tokenizer(chosen), chosen
    said = f"task.max_length=30: {lost} of 3 prompts fill it, so nothing of their targets is trained on; raise it"
    if lost == len(rows):
        with pytest.raises(UserError, match=said):
            encode_rows(*given)
        return
    assert len(encode_rows(*given)) == len(rows) and (f"warning: {said}\n" in capfd.readouterr().err) == bool(lost)
