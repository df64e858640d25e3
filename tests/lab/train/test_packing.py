"""Packed batches: the same logits, loss and gradients as one example a row, in fewer rows."""

import json
import shutil

import pytest
import torch

import tasks
from dual_lora import set_update_scale
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.errors import UserError
from dual_lora.lab.inputs.splits import load_split
from dual_lora.lab.model.encode import IGNORED_LABEL, build_collator, encode_rows
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.packing import PackingCollator, assign_rows, check_packing, unmask_packed_batch
from dual_lora.lab.train.run import train_run
from tests.support.small_runs import attached, settings

MODELS = ["tiny-llama", "tiny-gpt2"]
LIMIT = 128  # the tasks' maximum length
ON = "train.packing=true"


def encode(model: str, *overrides: str, count: int = 12):
    """Return a model with an adapter at full scale, its first examples, and the collators without and with packing."""
    chosen, task, adapted, tokenizer = attached(model, "dual_lora", *overrides)
    set_update_scale(adapted, 1.0)
    rows = load_split(task, "train", chosen).rows.select(range(count))
    examples = [dict(row) for row in encode_rows(rows, task, tokenizer, chosen)]
    return adapted, examples, build_collator(task, tokenizer), PackingCollator(tokenizer.pad_token_id, LIMIT)


@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [9, 5, 4, 3, 3, 2, 1], [1] * 10 + [10]])
def test_rows_hold_every_example_once_and_are_never_too_long(lengths):
    rows = assign_rows(lengths, 10)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 10 for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // 10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_each_example_alone(model, implementation):
    adapted, examples, _, pack = encode(model)
    adapted.get_base_model().set_attn_implementation(implementation)
    batch = pack(examples)
    assert len(batch["input_ids"]) < len(examples)
    places = iter(assign_rows([len(example["input_ids"]) for example in examples], LIMIT))
    unmask_packed_batch(batch)
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = adapted.eval()(**batch).logits
        for row, chosen in enumerate(places):
            start = 0
            for number in chosen:
                alone = adapted(input_ids=torch.tensor([examples[number]["input_ids"]])).logits[0]
                end = start + len(alone)
                torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-4, atol=1e-4)
                known = examples[number]["labels"]
                assert labels[row, start:end].tolist() == [IGNORED_LABEL, *known[1:]]
                start = end
            assert (labels[row, start:] == IGNORED_LABEL).all()


@pytest.mark.parametrize("prompt", ["false", "true"])
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_the_padded_batch(model, prompt):
    found = []
    for packs in (False, True):
        adapted, examples, pad, pack = encode(model, f"task.loss_on_prompt={prompt}")
        batch = dict((pack if packs else pad)(examples))
        if packs:
            unmask_packed_batch(batch)
        loss = adapted(**batch).loss
        loss.backward()
        found.append((loss.item(), [p.grad for p in adapted.parameters() if p.requires_grad]))
    (padded, gradients), (packed, others) = found
    assert packed == pytest.approx(padded, rel=1e-5)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_learns_the_same_in_fewer_rows(model, runs_folder):
    """The same losses, step by step, and the same number of tokens, padding not counted; also with accumulation."""
    few = ["train.batch_size=8", "train.accumulation=2", "eval.before=false"]
    logs, speeds = [], []
    for switch in ([], [ON], ["train.packing=false"]):
        result = train_run(Run.prepare(settings(model, *few, *switch)))
        log = Record(runs_folder / "adhoc" / result["identity"]).read_log()
        logs.append([row["train/loss"] for row in log if "train/loss" in row])
        speeds.append((result["identity"], round(result["tokens_per_second"] * result["train_seconds"])))
    assert len(logs[0]) == 4 and logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert speeds[0] == speeds[2] and speeds[0][0] != speeds[1][0] and speeds[0][1] == speeds[1][1]


def test_tokens_are_counted_where_padding_is_the_end_of_text(runs_folder, tmp_path):
    """As many as the rows have, each row's end of text counted."""
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-gpt2", folder)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    del content["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    few = ["train.max_examples=16", "train.batch_size=8", "train.max_steps=2", "eval.before=false"]
    chosen = settings("tiny-gpt2", f"model.path={folder}", *few, ON)
    result = train_run(Run.prepare(chosen))
    task, tokenizer = tasks.load(chosen.task.name), load_tokenizer(chosen)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = encode_rows(load_split(task, "train", chosen).rows.select(range(16)), task, tokenizer, chosen)["input_ids"]
    assert any(tokenizer.eos_token_id in row for row in rows)
    assert round(result["tokens_per_second"] * result["train_seconds"]) == sum(map(len, rows))


def test_the_validation_loss_is_that_of_unpacked_examples(runs_folder):
    words = ["model=tiny-llama", "task=demo/restaurants", "train.max_steps=1", "train.lr=1e-9", "train.max_examples=32"]
    words += ["task.validation_rows=16", "eval.max_examples=2", "eval.before=false", "wandb.mode=disabled"]
    packed, padded = (train_run(Run.prepare(load_settings([*words, *more])))["validation_loss"] for more in ([ON], []))
    assert packed == pytest.approx(padded, rel=1e-5)


def test_a_model_that_mixes_packed_examples_is_refused(monkeypatch):
    _, _, adapted, _ = attached("tiny-gpt2", "lora")
    check_packing(adapted)
    base = adapted.get_base_model()
    real = type(base).forward
    monkeypatch.setattr(type(base), "forward", lambda self, *a, position_ids=None, **k: real(self, *a, **k))
    with pytest.raises(UserError, match="^train.packing=true: GPT2LMHeadModel does not keep packed examples apart"):
        check_packing(adapted)


def test_a_batch_of_one_text_is_refused():
    with pytest.raises(UserError, match="^train.packing=True: a batch of one text has no other to share a row with"):
        load_settings(["model=tiny-llama", "task=demo/restaurants", ON, "train.batch_size=1"])


def test_a_task_of_one_text_a_row_is_refused():
    with pytest.raises(UserError, match="^train.packing=true: demo/sentiment takes one text a row"):
        load_settings(["model=tiny-roberta", "task=demo/sentiment", ON])
    assert tasks.load("demo/sentiment").form == "classification"
