"""What lies in a model's folder beside its weights: it changes no output, or is refused in one line.

`test_any_field_is_without_effect_or_refused` draws fields of the files that models are saved with. DUAL_LORA_FUZZ=N
makes N times as many draws; `make test-slow` takes 500.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, GenerationConfig

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.outside.hub import fetch_files
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.inputs.model_config import DROPPED_FIELDS, REFUSED_FIELDS
from dual_lora.lab.inputs.model_files import hash_model_files, identify_weights
from dual_lora.lab.model.load import load_model, load_tuned_model
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tests.support.model_folders import (
    CONFIG,
    DECODING,
    INDEX,
    PAIRS,
    SPECIAL,
    TOKENIZER,
    WEIGHTS,
    change,
    choose,
    compare,
    compute,
    copy,
    is_equal,
    refused,
)

WRITERS = ("tiny-llama", "tiny-gpt2")


# Decoding.


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "min_new_tokens": 20, "guidance_scale": 1.5},
        {"max_time": 0.001, "cache_implementation": "static", "stop_strings": ["a"], "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "num_beams": 5, "do_sample": True, "top_k": 3},
    ],
)  # fmt: skip
def test_decoding_is_the_protocols_alone(fields, beams, plain, tmp_path):
    folder = change(copy("tiny-llama", tmp_path), DECODING, **fields)
    compare(plain, "tiny-llama", "demo/restaurants", folder, f"task.num_beams={beams}")


# The tokenizer.


@pytest.mark.parametrize("model", PAIRS)
def test_a_row_does_not_depend_on_the_rows_beside_it(model, plain, tmp_path):
    sides = {"padding_side": "left", "truncation_side": "left", "model_input_names": ["input_ids"]}
    compare(plain, model, PAIRS[model], change(copy(model, tmp_path), TOKENIZER, **sides))


@pytest.mark.parametrize("model", WRITERS)
def test_truncation_and_padding_inside_the_tokenizer_do_not_count(model, plain, tmp_path):
    folder = copy(model, tmp_path)
    cut = {"direction": "Left", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0}
    change(folder, "tokenizer.json", truncation=cut, padding=pad | {"pad_token": "<pad>"})
    compare(plain, model, PAIRS[model], folder)


@pytest.mark.parametrize(
    ("model", "said"),
    [("tiny-llama", "names no end of text (eos_token)"), ("tiny-roberta", "names neither padding (pad_token) nor")],
)
def test_a_tokenizer_without_an_end_is_refused(model, said, tmp_path):
    folder = copy(model, tmp_path)
    content = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(content | {"eos_token": None, "pad_token": None}))
    found = refused(folder, model)
    assert said in found and "set it in tokenizer_config.json" in found


@pytest.mark.parametrize("fields", [{"pad_token": "e"}, {"eos_token": "e"}, {"extra_special_tokens": ["the"]}])
def test_a_word_does_not_become_a_special_token(fields, tmp_path):
    folder = change(copy("tiny-llama", tmp_path), TOKENIZER, **fields)
    assert "makes special tokens of ordinary words" in refused(folder, "tiny-llama")


@pytest.mark.parametrize(("model", "kind"), [("tiny-deberta", "BertTokenizer"), ("tiny-llama", "GemmaTokenizer")])
def test_of_a_class_that_splits_texts_otherwise_and_the_file_the_file_is_used(model, kind, plain, tmp_path, capsys):
    compare(plain, model, PAIRS[model], change(copy(model, tmp_path), TOKENIZER, tokenizer_class=kind))
    line = f"warning: model={model}: its tokenizer's class, {kind}, encodes texts differently from its tokenizer.json;"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(("model", "kind"), [("tiny-gpt2", "GPT2Tokenizer"), ("tiny-roberta", "RobertaTokenizer")])
def test_a_class_that_splits_texts_as_the_file_does_is_taken(model, kind, plain, tmp_path):
    folder = change(copy(model, tmp_path), TOKENIZER, tokenizer_class=kind)
    assert type(load_tokenizer(choose(model, PAIRS[model], folder))).__name__ == kind
    compare(plain, model, PAIRS[model], folder)


CANNOT = [("tiny-deberta", "DebertaV2Tokenizer")]
CANNOT += [("tiny-roberta", kind) for kind in ("XLMRobertaTokenizer", "CamembertTokenizer")]


@pytest.mark.parametrize(("model", "kind"), CANNOT)
def test_a_class_that_cannot_take_the_file_gives_way_to_it(model, kind, plain, tmp_path, capsys):
    compare(plain, model, PAIRS[model], change(copy(model, tmp_path), TOKENIZER, tokenizer_class=kind))
    assert f"warning: model={model}: its tokenizer's class cannot take its tokenizer.json (" in capsys.readouterr().err


def surround(folder: Path, single: str, pair: str) -> Path:
    """Give a folder's tokenizer.json the special tokens that stand around a text, and around two."""
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = sorted({word.split(":")[0] for word in (single + " " + pair).split()} - {"$A", "$B"})
    known.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[(word, known.token_to_id(word)) for word in words]
    )
    known.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("model", "kind", "single", "pair", "fields"),
    [
        ("tiny-roberta", "RobertaTokenizer", "<s> $A </s>", "<s> $A </s> $B </s>", {}),
        ("tiny-roberta", "RobertaTokenizer", "<s> $A </s>", "<s> $A </s> </s> $B </s>", {"cls_token": "<unk>"}),
        ("tiny-roberta", "MPNetTokenizer", "<s> $A", "<s> $A </s> $B", {}),
        ("tiny-llama", "GPTNeoXTokenizer", "<s> $A", "<s> $A $B", {}),
        ("tiny-deberta", "DebertaTokenizer", "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", {}),
        ("tiny-deberta", "DebertaV2Tokenizer", "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", {}),
    ],
)
def test_special_tokens_stand_where_the_file_puts_them(model, kind, single, pair, fields, tmp_path, capsys):
    folder = surround(copy(model, tmp_path), single, pair)
    change(change(folder, TOKENIZER, tokenizer_class=kind, **fields), CONFIG, type_vocab_size=2)
    found = load_tokenizer(choose(model, PAIRS[model], folder))
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for texts in (["It is bad."], ["It is bad.", "Is it?"]):
        assert found(*texts)["input_ids"] == known.encode(*texts).ids
        assert found(*texts)["token_type_ids"] == known.encode(*texts).type_ids
    assert "; the file is used" in capsys.readouterr().err


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "it takes longer than 1 s"),
        ("{{ bos_token }}Hello.", "chat template leaves the prompt out; take model.chat=false"),
        ("{{ 'x' * 10 ** 18 }}", "fails on a single prompt (it fills the memory); take model.chat=false"),
        ("{{ messages[7].content }}", "fails on a single prompt"),
        ("{% if %}", "fails on a single prompt"),
        ("{{ messages[0].content }}{{ ['a'] | random }}", "fails on a single prompt (it draws at random)"),
        ("{{ messages[0].content }}{{ [['a']] | map('random') | join }}", "fails on a single prompt (it draws at ra"),
        ("{{ messages[0].content }}{{ lipsum(1) }}", "fails on a single prompt (it draws at random)"),
        ("{{ messages[0].content }}{{ messages[0].content.strip }}", "chat template prints an address in memory; take"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template, said, tmp_path, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.model.tokenizer.TEMPLATE_SECONDS", 1.0)
    folder = copy("tiny-llama", tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    assert said in refused(folder, "tiny-llama", "model.chat=true")
    assert time.monotonic() - start < 30 and sys.gettrace() is None


# The configuration.


def test_fields_of_use_do_not_count(plain, tmp_path):
    fields = {"problem_type": "regression", "return_dict": False, "chunk_size_feed_forward": 3, "eos_token_id": 0}
    fields |= {"attn_implementation": "flex_attention", "dtype": "float16", "id2label": {"0": "a", "1": "b", "2": "c"}}
    compare(plain, "tiny-roberta", "demo/sentiment", change(copy("tiny-roberta", tmp_path), CONFIG, **fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "with hardware=qlora for 4"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config: quantization_config"),
        ({"text_config": {"num_hidden_layers": 1}}, "text_config: a roberta has no such part; drop the field"),
        ({"decoder": {"model_type": "gpt2"}}, "decoder: a roberta has no such part; drop the field"),
        ({"text_encoder": 5}, "text_encoder: a roberta has no such part; drop the field"),
        ({"pad_token_id": 0}, "pads with 1 ('<pad>'), but its config.json says pad_token_id=0, after which the posi"),
        ({"pad_token_id": None}, "but its config.json says pad_token_id=None, after which the positions of a roberta"),
        ({"transformers_weights": "sub/w.safetensors"}, "names another file of weights"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000, but its weights hold"),
        ({"num_hidden_layers": 59}, "num_hidden_layers=59, but its weights hold 58 tensors"),
        ({"num_attention_heads": 10**7}, "num_attention_heads=10000000, but at most"),
        ({"num_attention_heads": -1}, "num_attention_heads=-1 is not a valid count"),
        ({"is_decoder": True}, "is_decoder=True makes another kind of model of a roberta"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, said, tmp_path):
    folder = change(copy("tiny-roberta", tmp_path), CONFIG, **fields)
    found = refused(folder, "tiny-roberta")
    assert said in found and "config.json" in found


def test_positions_start_where_the_weights_have_them_whatever_token_pads(plain, tmp_path):
    folder = change(copy("tiny-roberta", tmp_path), TOKENIZER, pad_token="<unk>")
    said = "its tokenizer pads with 3 ('<unk>'), but its config.json says pad_token_id=1, after which the positions of"
    assert said in refused(folder, "tiny-roberta")
    compare(plain, "tiny-roberta", "demo/sentiment", change(folder, TOKENIZER, pad_token=None))
    settings = choose("tiny-roberta", "demo/sentiment", folder)
    task = load_task(settings)
    base, tokenizer = load_model(settings, task)
    base.save_pretrained(tmp_path / "tuned")
    tuned = load_tuned_model(tmp_path / "tuned", settings, task, tokenizer)
    inputs = tokenizer("It is bad.", return_tensors="pt")
    weights = base.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in tuned.state_dict().items())
    # Weights that lie elsewhere in memory may be added up in another order.
    torch.testing.assert_close(tuned.eval()(**inputs).logits, base.eval()(**inputs).logits)


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("model", ["tiny-roberta", "tiny-deberta", "tiny-gpt2"])
def test_a_head_is_drawn_whatever_head_the_weights_bring(model, labels, plain, tmp_path):
    folder = copy(model, tmp_path)
    torch.manual_seed(5)
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, dtype=torch.float32)
    other.save_pretrained(folder)
    compare(plain, model, "demo/sentiment", folder)


# The files of the weights.


def split(folder: Path, index: dict[str, str], **files: dict[str, torch.Tensor]) -> Path:
    """Give a folder its weights in these files, with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return change(folder, "model.safetensors.index.json", metadata={}, weight_map=index)


def halve(folder: Path) -> Path:
    """Give a folder its weights in two shards, a and b."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    halves = {"a": {n: weights[n] for n in names[::2]}, "b": {n: weights[n] for n in names[1::2]}}
    return split(folder, {n: f"{file}.safetensors" for file, part in halves.items() for n in part}, **halves)


def test_shards_are_read_as_one_file_is(plain, tmp_path):
    folder = halve(copy("tiny-roberta", tmp_path))
    compare(plain, "tiny-roberta", "demo/sentiment", folder)
    settings = choose("tiny-roberta", "demo/sentiment", folder)
    assert "model.safetensors.index.json" not in hash_model_files(settings)  # the shards say all that it says


def test_an_index_that_chooses_between_weights_is_part_of_the_identity(tmp_path):
    weights = load_file(BUNDLED / "tiny-roberta/model.safetensors")
    halved = {name: tensor / 2 for name, tensor in weights.items()}
    folder, found = copy("tiny-roberta", tmp_path), []
    for name in "ab":
        split(folder, dict.fromkeys(weights, f"{name}.safetensors"), a=weights, b=halved)
        settings = choose("tiny-roberta", "demo/sentiment", folder)
        assert "model.safetensors.index.json" in hash_model_files(settings)
        found.append((identify_weights(settings), compute("tiny-roberta", "demo/sentiment", folder)))
    assert found[0][0] != found[1][0] and not is_equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("pytorch_model.bin", "weights are read from *.safetensors in the same folder only"),
        ("../outside.safetensors", "weights are read from *.safetensors in the same folder only"),
        ("sub/a.safetensors", "weights are read from *.safetensors in the same folder only"),
        ("b.safetensors", "names b.safetensors, which is not there; get the complete model"),
        (7, "damaged (weight_map names no files)"),
    ],
)
def test_an_index_that_names_other_files_is_refused(shard, said, tmp_path):
    weights = load_file(BUNDLED / "tiny-roberta/model.safetensors")
    save_file(weights, tmp_path / "outside.safetensors")
    folder = split(copy("tiny-roberta", tmp_path), dict.fromkeys(weights, shard), a=weights)
    assert said in refused(folder, "tiny-roberta")


def test_two_shards_with_one_tensor_are_refused(tmp_path):
    weights = load_file(BUNDLED / "tiny-roberta/model.safetensors")
    index = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(weights)}
    folder = split(copy("tiny-roberta", tmp_path), index, a=weights, b=weights)
    with pytest.raises(UserError, match="two of its files hold the same tensor"):
        identify_weights(choose("tiny-roberta", "demo/sentiment", folder))


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = change(copy("tiny-llama", tmp_path), "adapter_config.json", peft_type="LORA")
    assert "adapter_config.json: an adapter next to the model, which may be merged already" in refused(
        folder, "tiny-llama"
    )


def test_an_adapter_added_to_a_tuned_model_is_refused(runs_folder):
    short = ["method=full", "train.max_steps=1", "train.max_examples=8", "eval.max_examples=4", "wandb.mode=disabled"]
    settings = load_settings(["model=tiny-roberta", "task=demo/sentiment", "eval.before=false", *short])
    folder = runs_folder / "adhoc" / train_run(Run.prepare(settings))["identity"]
    assert evaluate_command([f"run={folder}"]) == 0
    change(folder / "model", "adapter_config.json", peft_type="LORA")
    with pytest.raises(UserError, match="adapter_config.json"):
        evaluate_command([f"run={folder}"])


def test_a_model_is_read_from_the_listed_files_alone(plain, tmp_path):
    folder = copy("tiny-llama", tmp_path)
    for name in (".metadata", "__0_0.distcp", "consolidated.00.pth", "pytorch_model.bin", "preprocessor_config.json"):
        (folder / name).write_text("junk")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ junk }}")
    compare(plain, "tiny-llama", "demo/restaurants", folder)


# The hub.

HUB = ["model.bundled=false", "model.path=null", "model.hub=some/model", "model.revision=main"]
COMMIT, LATER = "0" * 40, "1" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What puts a bundled model into the hub's cache, as a download leaves it, and returns its folder there."""

    def put(model: str, commit: str = COMMIT) -> Path:
        place = tmp_path / "hub/models--some--model"
        shutil.copytree(BUNDLED / model, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs/main").write_text(commit)
        return place / "snapshots" / commit

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fetch_files.cache_clear()
    yield put
    fetch_files.cache_clear()


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("tiny-gpt2", {CONFIG: {"problem_type": "regression", "pad_token_id": 5}, TOKENIZER: {"padding_side": "left"}}),
        ("tiny-gpt2", {SPECIAL: {"add_eos_token": True}}),
        ("tiny-deberta", {SPECIAL: {"add_bos_token": False, "model_max_length": 5}}),
    ],
)
def test_what_does_not_count_in_a_folder_does_not_count_on_the_hub(model, fields, plain, hub):
    folder = hub(model)
    for name, values in fields.items():
        change(folder, name, **values)
    compare(plain, model, PAIRS[model], folder)
    assert is_equal(compute(model, PAIRS[model], folder, *HUB), plain[model, PAIRS[model], ()])


def repeat_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if name.startswith("transformer."))
    save_file(weights | {name.removeprefix("transformer."): weights[name].clone()}, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: change(folder, TOKENIZER, extra_special_tokens=["the"]), "special tokens of ordinary words"),
        (lambda folder: change(folder, SPECIAL, mask_token="the"), "special tokens of ordinary words"),
        (lambda folder: change(folder, SPECIAL, eos_token="the"), "special_tokens_map.json: eos_token is 'the', but"),
        (lambda folder: (folder / CONFIG).write_text('{"model_type": 1, "model_type": 2}'), "config.json: damaged"),
        (lambda folder: change(folder, "adapter_config.json"), "holds an adapter next to the model"),
        (lambda folder: (folder / CONFIG).unlink(), "some/model@main: no config.json there"),
        (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor"),
        (repeat_tensor, "hold one parameter under two names"),
    ],
)
def test_what_a_folder_is_refused_for_a_model_of_the_hub_is_refused_for(edit, said, hub):
    folder = hub("tiny-gpt2")
    edit(folder)
    assert said in refused(folder, "tiny-gpt2", *HUB)


@pytest.mark.parametrize(
    ("found", "remedy"),
    [(["refs/pr/6", "refs/pr/2"], "model.revision=refs/pr/6, the hub's conversion"), ([], "a revision that has one")],
)
def test_the_hubs_conversion_to_safetensors_is_named_and_not_taken(found, remedy, hub, monkeypatch):
    asked = []

    def get_repo_discussions(self, name: str, **wanted: str) -> Iterator[SimpleNamespace]:
        asked.append((name, wanted["author"], wanted["discussion_type"], wanted["discussion_status"]))
        return iter([SimpleNamespace(git_reference=reference) for reference in found])

    monkeypatch.setattr("huggingface_hub.HfApi.get_repo_discussions", get_repo_discussions)
    folder = hub("tiny-gpt2")
    (folder / WEIGHTS).unlink()
    assert (
        f"neither {WEIGHTS} nor model.safetensors.index.json there; take {remedy}, or give model.path=DIR"
        in refused(folder, "tiny-gpt2", *HUB)
    )
    assert asked == [("some/model", "SFconvertbot", "pull_request", "open")]


@pytest.fixture
def repository(tmp_path, monkeypatch) -> tuple[Path, list]:
    """A repository of the hub, and what is fetched from it: revision and name of every file."""
    folder, fetched, cache = copy("tiny-gpt2", tmp_path), [], tmp_path / "cache"

    def snapshot_download(name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        place = cache / (revision if revision in (COMMIT, LATER) else (folder / "main").read_text())
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            fetched.append((revision, file))
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, place / file)
        return str(place)

    (folder / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetch_files.cache_clear()
    yield folder, fetched
    fetch_files.cache_clear()


def test_of_the_hub_the_listed_files_of_one_commit_are_fetched_once(repository, plain):
    folder, fetched = repository
    for name in ("pytorch_model.bin", "consolidated.safetensors", "generation_config.json", "onnx/x.model"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("junk")
    halve(folder)
    settings = choose("tiny-gpt2", "demo/sentiment", folder, *HUB)
    load_tokenizer(settings)
    assert sorted(fetched) == [("main", name) for name in (CONFIG, "tokenizer.json", TOKENIZER)]
    (folder / "main").write_text(LATER)
    found = compute("tiny-gpt2", "demo/sentiment", folder, *HUB)
    assert sorted(fetched[3:]) == [(COMMIT, name) for name in ("a.safetensors", "b.safetensors", INDEX)]
    compare(plain, "tiny-gpt2", "demo/sentiment", folder)
    assert is_equal(found, plain["tiny-gpt2", "demo/sentiment", ()])


def test_a_tokenizer_of_the_hub_is_refused_before_the_weights_are_fetched(repository):
    folder, fetched = repository
    change(folder, TOKENIZER, extra_special_tokens=["the"])
    assert "special tokens of ordinary words" in refused(folder, "tiny-gpt2", *HUB)
    assert fetched and WEIGHTS not in {name for _, name in fetched}


def test_a_run_records_the_commit_of_a_named_revision_and_keeps_to_it(hub, runs_folder, capsys):
    hub("tiny-gpt2")
    short = ["train.max_steps=1", "train.max_examples=8", "eval.max_examples=4", "wandb.mode=disabled"]
    settings = load_settings(["model=tiny-gpt2", "task=demo/sentiment", "eval.before=false", *HUB, *short])
    run = Run.prepare(settings)
    train_run(run)
    assert run.record.read_environment()["model_files"] == {"commit": COMMIT}
    assert evaluate_command([f"run={run.record.folder}"]) == 0
    hub("tiny-gpt2", LATER)
    fetch_files.cache_clear()
    with pytest.raises(UserError, match="started with a different commit of model=tiny-gpt2"):
        evaluate_command([f"run={run.record.folder}"])
    pinned = replace(settings, model=replace(settings.model, revision=COMMIT))
    assert hash_model_files(pinned) == {}


# Any field.

NUMBERS = [-1, 0, 1, 2, 3, 8, 0.5, 1.5, 10**9]
VALUES = [*NUMBERS, True, False, None, "", "left", "right", "e", "</s>", "float16", "eager", [], [1], {}, {"a": 1}]
DECODING_FIELDS = [name for name in GenerationConfig().to_dict() if name != "transformers_version"]
DECODING_FIELDS += ["custom_generate", "nothing", "_from_model_config", "trust_remote_code"]
CONFIG_FIELDS = sorted(DROPPED_FIELDS | set(REFUSED_FIELDS)) + DECODING_FIELDS
CONFIG_FIELDS += ["architectures", "transformers_version", "auto_map", "nothing", "is_decoder", "is_encoder_decoder"]
CONFIG_FIELDS += [
    "add_cross_attention",
    "num_hidden_layers",
    "not_a_field",
    "prefix",
    "sep_token_id",
]
TOKENIZER_FIELDS = ["padding_side", "truncation_side", "model_max_length", "max_length", "stride", "truncation"]
TOKENIZER_FIELDS += ["truncation_strategy", "padding", "pad_to_multiple_of", "pad_token_type_id", "model_input_names"]
TOKENIZER_FIELDS += ["add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy"]
TOKENIZER_FIELDS += ["split_special_tokens", "do_lower_case", "strip_accents", "use_fast", "fix_mistral_regex", "vocab"]
TOKENIZER_FIELDS += [
    "name_or_path",
    "vocab_file",
    "tokenizer_file",
    "merges_file",
    "chat_template",
    "auto_map",
    "merges",
]
TOKENIZER_FIELDS += ["additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "bos_token"]
TOKENIZER_FIELDS += ["unk_token", "cls_token", "sep_token", "mask_token", "pad_token", "eos_token", "tokenizer_class"]
TOKENIZER_FIELDS += ["fast_tokenizer_files", "init_inputs", "is_local", "backend", "processor_class", "nothing"]
INDEX_FIELDS = ["weight_map", "metadata"]
FIELDS = {
    CONFIG: CONFIG_FIELDS,
    DECODING: DECODING_FIELDS,
    TOKENIZER: TOKENIZER_FIELDS,
    "special_tokens_map.json": [name for name in TOKENIZER_FIELDS if name.endswith(("_token", "_tokens"))],
    "model.safetensors.index.json": INDEX_FIELDS,
    "adapter_config.json": ["peft_type"],
    "added_tokens.json": ["e", "zebra"],
}
SENSIBLE = {
    "padding_side": ["left"], "truncation_side": ["left"], "problem_type": ["regression", "multi_label_classification"],
    "attn_implementation": ["eager", "flex_attention", "sdpa"], "dtype": ["float16", "bfloat16"],
    "quantization_config": [{"quant_method": "fp8"}], "cache_implementation": ["static", "quantized"],
    "id2label": [{"0": "a", "1": "b", "2": "c"}], "num_hidden_layers": [2, 4, 10**7], "is_decoder": [True],
    "tokenizer_class": ["GPT2Tokenizer", "LlamaTokenizer", "RobertaTokenizer", "BertTokenizer", "Nothing"],
    "model_input_names": [["input_ids"], ["attention_mask"]], "stop_strings": [["a"]], "weight_map": [{"a": "b.bin"}],
    "extra_special_tokens": [["the"], ["zebra"]], "additional_special_tokens": [["the"]], "transformers_weights": ["a"],
    "added_tokens_decoder": [{"300": {"content": "the", "special": True}}], "repetition_penalty": [1.3],
}  # fmt: skip


def draw(random: random.Random) -> tuple[str, dict[str, dict[str, object]]]:
    """Return a model and fields to set, by file."""
    model, fields = random.choice(sorted(PAIRS)), {}
    for _ in range(random.choice([1, 1, 2, 3])):
        file = random.choice([CONFIG, CONFIG, CONFIG, DECODING, DECODING, TOKENIZER, TOKENIZER, TOKENIZER, *FIELDS])
        name = random.choice(FIELDS[file])
        known = SENSIBLE.get(name, [])
        fields.setdefault(file, {})[name] = random.choice(known if known and random.random() < 0.6 else VALUES)
    return model, fields


def try_draw(plain: dict, seed: int, place: Path) -> str:
    """Return "equal", or the line in which a folder with drawn fields is refused."""
    model, fields = draw(random.Random(seed))
    folder = copy(model, place)
    for name, values in fields.items():
        change(folder, name, **values)
    try:
        compare(plain, model, PAIRS[model], folder)
        return "equal"
    except UserError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1
        return str(error)
    except BaseException as error:
        error.add_note(f"seed {seed}: {model} {fields}")
        raise


# What drawing found: fields that were taken, or ended in a traceback.
FOUND = [
    ("tiny-gpt2", "special_tokens_map.json", {"add_eos_token": True}),
    ("tiny-deberta", "special_tokens_map.json", {"add_bos_token": False}),
    ("tiny-llama", "special_tokens_map.json", {"pad_token": {"a": 1}}),
    ("tiny-deberta", "special_tokens_map.json", {"unk_token": {}}),
    ("tiny-roberta", TOKENIZER, {"model_max_length": "right"}),
]


@pytest.mark.parametrize(("model", "file", "fields"), FOUND)
def test_a_field_that_was_found_by_drawing_is_without_effect_or_refused(model, file, fields, plain, tmp_path):
    folder = change(copy(model, tmp_path), file, **fields)
    try:
        compare(plain, model, PAIRS[model], folder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


DRAWS = 25 * int(os.environ.get("DUAL_LORA_FUZZ", 1))


def test_any_field_is_without_effect_or_refused(plain, tmp_path):
    found = []
    for seed in range(DRAWS):
        place = tmp_path / str(seed)
        place.mkdir()
        found.append(try_draw(plain, seed, place))
        shutil.rmtree(place)
    print(f"{DRAWS} draws: {found.count('equal')} equal, {DRAWS - found.count('equal')} refused")
    assert "equal" in found and len(set(found)) > 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_of_500_fields_is_without_effect_or_refused():
    """The same test with 500 draws, in a process of its own."""
    words = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "any_field", "--timeout=1800"]
    done = subprocess.run(words, env=os.environ | {"DUAL_LORA_FUZZ": "20"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
