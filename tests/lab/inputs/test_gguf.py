"""A model in a GGUF file: the same numbers as the saved model, every method, the record, plan, export and analysis."""

import pytest
import torch

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError
from dual_lora.lab.inputs import gguf as inputs_gguf
from dual_lora.lab.inputs.gguf import read_checked_header, read_gguf_header
from dual_lora.lab.inputs.model_files import identify_weights
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.tokenizer import load_tokenizer
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.plan import compute_plan
from dual_lora.lab.train.run import train_run
from tests.support.gguf_files import SAVED, write
from tests.support.small_runs import SHORT

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", template=TEMPLATE)


def settings(path, *overrides):
    return load_settings(["model=tiny-llama", "task=demo/restaurants", f"model.path={path}", *SHORT, *overrides])


def loaded(chosen):
    return load_model(chosen, load_task(chosen))


def texts() -> list[str]:
    rows = load_task(load_settings([])).split("validation").rows
    strange = ["", "  two  blanks", "a1b22 333 4444", "naïve – 東京 🙂", "it's\n\tI'll"]
    return [row["prompt"] for row in rows][:50] + strange


def test_it_is_the_model_that_was_written(file):
    (ours, mine), (theirs, saved) = loaded(settings(file)), loaded(settings(SAVED))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [mine(text)["input_ids"] for text in texts()] == [saved(text)["input_ids"] for text in texts()]
    assert mine.all_special_ids == saved.all_special_ids and mine.pad_token_id == saved.pad_token_id
    batch = mine(texts()[:8], return_tensors="pt", padding=True)
    with torch.inference_mode():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)
    assert loaded(settings(file, "model.dtype=bfloat16"))[0].dtype == torch.bfloat16


FEW = ["train.max_steps=2", "train.max_examples=32", "eval.max_examples=4", "eval.before=false"]


@pytest.mark.parametrize("method", ["lora", "dual_lora", "full"])
def test_a_run_is_that_of_the_saved_model_and_evaluates_again(method, file, runs_folder, capsys):
    made, other = (train_run(Run.prepare(settings(path, f"method={method}", *FEW))) for path in (file, SAVED))
    assert made["identity"] != other["identity"]
    assert (made["metrics"], made["train_loss"]) == (other["metrics"], other["train_loss"])
    assert evaluate_command([f"run={runs_folder / 'adhoc' / made['identity']}"]) == 0
    assert "reproduced exactly" in capsys.readouterr().out


def test_a_run_is_exported_and_analysed(file, runs_folder, tmp_path, capsys):
    made = train_run(Run.prepare(settings(file, "model.adapt=[q]", *FEW)))
    run = f"run={runs_folder / 'adhoc' / made['identity']}"
    assert evaluate_command([run, f"export={tmp_path / 'out'}"]) == 0
    assert evaluate_command([run, "analyse=true"]) == 0
    assert "Signs flipped: compared with" in capsys.readouterr().out
    exported = loaded(settings(tmp_path / "out"))[0].config
    assert exported.model_type == "llama" and not hasattr(exported, "quantization_config")


def test_its_content_names_the_run_not_its_place(file, tmp_path):
    moved = tmp_path / "other.gguf"
    moved.write_bytes(file.read_bytes())
    assert Run.prepare(settings(moved)).record.name == Run.prepare(settings(file)).record.name
    content = bytearray(moved.read_bytes())
    for place in (content.index(b"<pad>"), -1):
        moved.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place:][1:])
        assert identify_weights(settings(moved)) != identify_weights(settings(file))


def test_a_plan_reads_the_architecture_from_it(file):
    mine, saved = (compute_plan(settings(path, "method=dual_lora")) for path in (file, SAVED))
    assert mine == saved


def test_files_beside_it_are_not_read(file, tmp_path):
    here = tmp_path / "model.gguf"
    here.write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}')
    model, tokenizer = loaded(settings(here))
    assert len(tokenizer.get_vocab()) == model.config.vocab_size
    assert model.name_or_path == model.config.name_or_path == ""  # a folder of this process's own leaves no trace


@pytest.mark.parametrize(
    ("cut", "pieces"), [("gpt-2", ["room", "Ġ2024"]), ("smollm", ["room", "Ġ", *"2024"]), ("llama-bpe", None)]
)
def test_a_text_is_cut_as_the_file_says(cut, pieces, tmp_path):
    tokenizer = load_tokenizer(settings(write(tmp_path / "x.gguf", cut=cut)))
    backend = tokenizer.backend_tokenizer
    found = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("room 2024")]
    assert found == (pieces or ["room", "Ġ", "202", "4"])
    assert backend.model.ignore_merges == (cut == "llama-bpe") and tokenizer("a")["input_ids"][0] == 0


def test_what_transformers_would_read_otherwise_is_refused(tmp_path):
    for number, (options, message) in enumerate(
        [
            ({"cut": "deepseek-llm"}, r"the way its tokenizer splits texts \(deepseek-llm\) is not supported"),
            ({"cut": None}, r"the way its tokenizer splits texts \(unnamed\) is not supported"),
            ({"more": {"llama.rope.scaling.type": "yarn"}}, "its positions are scaled"),
            ({"extra": ["rope_freqs.weight"]}, "its positions are scaled"),
            ({"more": {"split.count": 3}}, "one of 3 parts; join them first"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            Run.prepare(settings(write(tmp_path / f"{number}.gguf", **options)))
    biased = settings(write(tmp_path / "bias.gguf", extra=["blk.0.attn_q.bias"]))
    with pytest.raises(UserError, match="holds 31 weights, LlamaForCausalLM takes 30"):
        loaded(biased)


def test_every_part_of_a_model_is_refused_by_its_own_header(tmp_path):
    """Only the first part names an architecture."""
    write(tmp_path / "x.gguf", split=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"x-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        with pytest.raises(UserError, match="one of 3 parts; join them first"):
            Run.prepare(settings(part))


def test_a_header_that_is_cut_or_changed_anywhere_ends_in_one_line(file, tmp_path):
    content, here = file.read_bytes(), tmp_path / "x.gguf"
    size = read_gguf_header(file).size
    for place in range(0, size, size // 200):
        here.write_bytes(content[:place])
        with pytest.raises(UserError, match=r"not a GGUF file|damaged"):
            read_gguf_header(here)
        here.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
        try:
            read_gguf_header(here)
        except UserError as error:
            assert len(str(error).splitlines()) == 1


def test_without_the_package_the_extra_is_named(file, monkeypatch):
    read_checked_header.cache_clear()
    monkeypatch.setattr(inputs_gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need the package gguf; pip install -e '.\[quantised\]'"):
        Run.prepare(settings(file))


def test_a_sentence_is_classified_with_a_fresh_head(file, runs_folder):
    chosen = load_settings(["model=tiny-llama", "task=demo/sentiment", f"model.path={file}", *SHORT, *FEW])
    assert train_run(Run.prepare(chosen))["steps"] == 2
