"""Exports: whole or not at all, never into what others made, and refused where they would compute something else."""

import errno
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluate import export as evaluate_export
from dual_lora.lab.record.run import Run
from dual_lora.lab.system.sealed import hash_content, hash_file
from dual_lora.lab.train.run import train_run
from dual_lora.lab.weights import save
from tests.support.finished_runs import SHORT, export


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_export_has_a_card_that_says_what_it_is_and_how_to_load_it(trained, tmp_path):
    out = tmp_path / "new" / "out"
    assert export(trained, out) == 0
    card = (out / "README.md").read_text()
    result = json.loads((trained / "result.json").read_text())
    for fact in ("tiny-roberta", "demo/sentiment", "dual_lora", "rank 16", trained.name, "import dual_lora"):
        assert fact in card
    assert f"{result['trainable_parameters']:,} of" in card and f"{100 * result['metrics']['accuracy']:.1f}" in card
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace('"DIR"', repr(str(out)))
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], AutoModelForSequenceClassification.from_pretrained(out).__class__)
    assert names["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained(out).get_vocab()
    assert list_names(tmp_path / "new") == {"out"}
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o666 & ~mask}


def test_the_card_of_a_chat_says_which_date_its_template_printed(runs_folder, tmp_path):
    folder = Path(shutil.copytree(BUNDLED / "tiny-llama", tmp_path / "model"))
    template = "{{ strftime_now('%Y') }}: {{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    words = ["model=tiny-llama", f"model.path={folder}", "model.chat=true", "task=demo/restaurants", *SHORT]
    run = Run.prepare(load_settings([*words, "task.max_new_tokens=4", "wandb.mode=disabled"]))
    train_run(run)
    assert export(run.record.folder, tmp_path / "out") == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == template
    line = "| prompts | in the tokenizer's chat template; its date, if it prints one, is 26 July 2024 |"
    for card in ("README.md", "adapter/README.md"):
        assert line in (tmp_path / "out" / card).read_text().splitlines()


def test_the_loser_of_two_exports_leaves_the_winners_alone(trained, tmp_path, monkeypatch):
    out, real = tmp_path / "out", evaluate_export.install_folder

    def install_late(partial, folder):
        monkeypatch.setattr(evaluate_export, "install_folder", real)
        assert export(trained, out) == 0  # another, meanwhile
        real(partial, folder)

    monkeypatch.setattr(evaluate_export, "install_folder", install_late)
    with pytest.raises(UserError, match="another process wrote to it meanwhile"):
        export(trained, out)
    assert AutoModelForSequenceClassification.from_pretrained(out) and list_names(tmp_path) == {"out"}


def test_a_failed_export_removes_what_it_wrote_and_nothing_else(trained, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").write_text("mine")

    def fail(*_, **__):
        (tmp_path / "out" / "theirs").write_text("theirs")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate_export, "format_model_card", fail)
    with pytest.raises(UserError, match="export=.*: No space left on device; free some space"):
        export(trained, tmp_path / "out")
    assert list_names(tmp_path) == {"out", ".out.partial"} and list_names(tmp_path / "out") == {"theirs"}


def test_an_export_is_refused_where_it_must_not_be(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_export, "load_trained_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "run").symlink_to(trained)
    for folder, message in (
        (trained / "adapter" / "out", "within the record of a run"),
        (trained / "out", "within the record of a run"),
        (tmp_path / "run" / "out", "within the record of a run"),
        (tmp_path / "link", "a link; give a new folder"),
        (tmp_path / "dangling", "is not a writable folder; give another folder"),
    ):
        before = list_names(trained), list_names(tmp_path)
        with pytest.raises(UserError, match=message):
            export(trained, folder)
        assert (list_names(trained), list_names(tmp_path)) == before


def change_weights(run: Path, folder: Path, change) -> Path:
    """Return a copy of a run whose adapter was changed and sealed again."""
    copied = shutil.copytree(run, folder)
    name = "adapter/adapter_model.safetensors"
    weights = load_file(copied / name)
    change(weights)
    save_file(weights, copied / name, metadata={"format": "pt"})
    result = json.loads((copied / "result.json").read_text())
    result["sha256"][name] = hash_file(copied / name)
    result.pop("digest")
    (copied / "result.json").write_text(json.dumps({**result, "digest": hash_content(result)}))
    return copied


def test_weights_that_are_nan_are_neither_exported_nor_analysed(trained, tmp_path):
    def spoil(weights):
        weights[next(name for name in weights if name.endswith(".A"))] *= float("nan")

    run = change_weights(trained, tmp_path / "run", spoil)
    with pytest.raises(UserError, match=r"export=.*nan"):
        export(run, tmp_path / "out")
    assert list_names(tmp_path) == {"run"}
    with pytest.raises(UserError, match="contains NaN or Inf"):
        evaluate_command([f"run={run}", "analyse=true"])


def test_a_ramp_factor_that_is_nan_is_not_analysed(trained, tmp_path):
    def spoil(weights):
        for name in weights:
            if name.endswith("update_scale"):
                weights[name] = torch.full_like(weights[name], float("nan"))

    run = change_weights(trained, tmp_path / "run", spoil)
    with pytest.raises(UserError, match="update_scale contains NaN or Inf"):
        evaluate_command([f"run={run}", "analyse=true"])


def test_weights_that_float16_does_not_hold_are_not_exported(trained, tmp_path):
    def enlarge(weights):
        weights[next(name for name in weights if name.endswith("out_proj.bias"))] += 1e5

    run = change_weights(trained, tmp_path / "run", enlarge)
    with pytest.raises(UserError, match=r"contains NaN or Inf in float16; take model\.dtype=float32"):
        export(run, tmp_path / "out", "model.dtype=float16")
    assert list_names(tmp_path) == {"run"}


def test_logits_that_are_nan_are_called_so(tmp_path):
    with pytest.raises(
        UserError, match="the logits of the merged model are NaN, so its weights or its method cannot be"
    ):
        evaluate_export.check_difference(tmp_path, float("nan"))


@pytest.mark.parametrize(("dtype", "change"), [("float32", 0.01), ("bfloat16", 0.5)])
def test_a_folder_that_gives_other_logits_than_the_run_is_not_left(dtype, change, trained, tmp_path, monkeypatch):
    save = PreTrainedModel.save_pretrained

    def save_others(model, *args, **options):
        model.classifier.out_proj.weight.data *= 1 + change
        model.classifier.out_proj.bias.data *= 1 + change
        save(model, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_others)
    remedy = "take another run" if dtype == "float32" else "take model.dtype=float32"
    said = f"export=.*: the logits of the model that is read back in {dtype} differ from the run's by"
    with pytest.raises(UserError, match=rf"{said}.* of their norm, so .*; {remedy}, or only the adapter$"):
        export(trained, tmp_path / "out", f"model.dtype={dtype}")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert export(trained, tmp_path / "out", f"model.dtype={dtype}") == 0


# Full disks, other writers, and what killed ones leave.


@contextmanager
def limit_file_size(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_updates_that_the_disk_does_not_hold_are_refused_in_one_line(trained, tmp_path):
    reason = os.strerror(errno.EFBIG)
    said = f"u.safetensors: cannot be written .{reason}.; free some space there, or give another file as save_updates="
    with pytest.raises(UserError, match=said), limit_file_size(4096):
        evaluate_command([f"run={trained}", f"save_updates={tmp_path / 'u.safetensors'}"])
    assert not list(tmp_path.iterdir())


def test_updates_do_not_replace_a_file_written_meanwhile(trained, tmp_path, monkeypatch):
    file, write = tmp_path / "u.safetensors", save.save_file

    def write_after_another(*args, **options):
        file.write_text("another's")
        write(*args, **options)

    monkeypatch.setattr(save, "save_file", write_after_another)
    with pytest.raises(UserError, match="another process wrote it"):
        evaluate_command([f"run={trained}", f"save_updates={file}"])
    assert file.read_text() == "another's" and list(tmp_path.iterdir()) == [file]


def test_an_export_names_what_a_killed_one_left(trained, tmp_path, monkeypatch, capsys):
    mine, other = tmp_path / "out[1]", tmp_path / "out1"
    with pytest.MonkeyPatch.context() as patch:  # killed before it removed anything
        patch.setattr(evaluate_export, "remove_path", lambda path: None)
        patch.setattr(evaluate_export, "check_weights", lambda *args: 1 / 0)
        for folder in (mine, other):
            with pytest.raises(ZeroDivisionError):
                export(trained, folder)
    (left,) = tmp_path.glob(".out[[]*")
    capsys.readouterr()
    export(trained, mine)
    lines = [line for line in capsys.readouterr().err.splitlines() if "unfinished export" in line]
    assert lines == [f"{left}: an unfinished export; remove it, unless it is still being written"]
    assert left.is_dir()
