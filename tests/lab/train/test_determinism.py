"""The same run twice gives the same weights, bit for bit; and the record names what else could change a digit."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.config.recorded import load_recorded_settings, replace_settings
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.model.adapt import attach_method, list_kernels
from dual_lora.lab.model.load import load_model
from dual_lora.lab.record import provenance as record_provenance
from dual_lora.lab.record.provenance import (
    describe_code,
    describe_environment,
    has_uncommitted_changes,
    hash_code,
    list_attempts,
    run_git,
)
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.system.environment import count_available_cores
from dual_lora.lab.train.run import train_run

FEW = ["deterministic=true", "train.max_steps=4", "train.batch_size=8", "eval.max_examples=4", "eval.before=false"]
FAMILIES = {"tiny-roberta": "demo/sentiment", "tiny-llama": "demo/restaurants"}


def trained(folder) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*/*.safetensors")
    return load_file(file)


def twice(model: str, *overrides: str) -> None:
    """Run the same twice, with draws and a changed number of draws before the second, and compare all that was made."""
    chosen = load_settings(
        [f"model={model}", f"task={FAMILIES[model]}", *FEW, "wandb.mode=disabled", "force=true", *overrides]
    )
    record, found = Run.prepare(chosen).record, []
    for _ in range(2):
        torch.rand(7)
        result = train_run(Run.prepare(chosen))
        assert not torch.are_deterministic_algorithms_enabled()  # or the next run would be another
        predictions = (record.folder / "predictions.jsonl").read_bytes()
        found.append((trained(record.folder), record.read_log(), predictions, result["metrics"], result["train_loss"]))
    (weights, *first), (again, *second) = found
    assert weights.keys() == again.keys() and first == second
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("method", list_choices("method"))
def test_every_method_gives_the_same_weights_twice(method, runs_folder):
    twice("tiny-roberta", f"method={method}")


def test_a_model_that_writes_gives_the_same_weights_and_texts_twice(runs_folder):
    twice("tiny-llama", "method=dual_lora", "method.dropout=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("method", list_choices("method"))
@pytest.mark.parametrize("model", FAMILIES)
def test_twice_for_longer(model, method, runs_folder):
    twice(model, f"method={method}", "train.max_steps=30")


def test_the_record_names_what_can_change_a_digit(runs_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["model=tiny-roberta", "task=demo/sentiment", *FEW, "wandb.mode=disabled", "model.dropout=0.1"]
    chosen = load_settings(words)
    result = train_run(Run.prepare(chosen))
    folder = Run.prepare(chosen).record.folder
    found = json.loads((folder / "environment.json").read_text())
    assert {"torch", "transformers", "tokenizers", "peft", "safetensors", "numpy"} <= found["packages"].keys()
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["cores"] == count_available_cores()
    assert found["threads"] == torch.get_num_threads() and found["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["tf32"].keys() == {"matmul", "cudnn"} and found["float32_matmul_precision"] == "highest"
    assert found["instructions"] and found["processor"]
    assert {"accelerator", "cuda", "cudnn", "python", "platform", "commit", "uncommitted_changes"} <= found.keys()
    assert result["kernels"] == ["recompute"]
    base = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1)
    assert result["dropouts"] == base | {"classifier_dropout": 0.0}
    assert load_recorded_settings(folder).model.dtype == "float32" and load_recorded_settings(folder).deterministic


def test_what_one_run_sets_for_the_process_is_recorded_and_no_other_run_sees_it(runs_folder, monkeypatch):
    names = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = {}
    for value in (True, False):
        chosen = load_settings(["model=tiny-roberta", "task=demo/sentiment", *FEW, "wandb.mode=disabled"])
        chosen = replace_settings(chosen, {"deterministic": value})
        train_run(Run.prepare(chosen))
        assert not set(names) & os.environ.keys() and torch.backends.cudnn.benchmark
        found[value] = Run.prepare(chosen).record.read_environment()
    on, off = (found[value]["deterministic"] for value in (True, False))
    assert on == {"algorithms": True, "cudnn": True, "benchmark": False}
    assert off == {"algorithms": False, "cudnn": False, "benchmark": True}
    assert found[True]["variables"]["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in found[False]["variables"]


@pytest.mark.parametrize(
    ("override", "used"),
    [
        ("method=lora", []),
        ("+method.peft.kernel=eager", ["eager"]),
        ("+method.peft.kernel=triton", ["recompute"]),  # without a GPU and without Triton's interpreter
        ("+method.peft.magnitude=abs", ["eager"]),
    ],
)
@pytest.mark.filterwarnings("ignore:kernel='triton'")
def test_the_kernel_that_was_used_is_told(override, used, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = load_settings(["model=tiny-roberta", "task=demo/sentiment", override])
    task = load_task(chosen)
    base, _ = load_model(chosen, task)
    assert list_kernels(attach_method(base, chosen, task.form)) == used


def test_uncommitted_changes_are_seen(monkeypatch):
    said = {"rev-parse": "abc", "status": " M file"}
    monkeypatch.setattr(record_provenance, "run_git", lambda command, *rest: said[command])
    describe_code.cache_clear()
    assert describe_environment()["uncommitted_changes"] is True and describe_environment()["commit"] == "abc"
    said |= {"rev-parse": "def", "status": ""}  # committed while this process runs: not what it runs
    assert describe_environment()["uncommitted_changes"] is True and describe_environment()["commit"] == "abc"
    describe_code.cache_clear()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one committed task, which takes the place of this one."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "old.py").write_text("VERSION = 1\n")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        assert run_git(*words) is not None
    return tmp_path


def test_a_new_file_of_code_is_an_uncommitted_change_and_a_report_is_none(repository):
    assert has_uncommitted_changes() is False
    (repository / "runs" / "study" / "report").mkdir(parents=True)
    (repository / "runs" / "study" / "report" / "table.md").write_text("")
    assert has_uncommitted_changes() is False
    (repository / "tasks" / "new.py").write_text("VERSION = 1\n")
    assert has_uncommitted_changes() is True


def test_changed_code_is_told_apart(repository):
    found = []
    for name, text in (("old.py", "VERSION = 2\n"), ("old.py", "VERSION = 3\n"), ("README.md", "")):
        (repository / "tasks" / name).write_text(text)
        hash_code.cache_clear()
        found.append(hash_code())
    hash_code.cache_clear()
    assert found[0] != found[1] == found[2]


def test_the_tries_of_a_run_are_kept_with_their_code(tmp_path, monkeypatch):
    """Also where nothing but the scores before training is left of one."""
    record, chosen = Record(tmp_path), load_settings(["model=tiny-roberta", "task=demo/sentiment"])
    for code in "abc":
        known = {"commit": None, "uncommitted_changes": None, "code": code}
        monkeypatch.setattr(record_provenance, "describe_code", lambda known=known: known)
        record.prepare_folder(chosen)
        record.append_log({"step": 0, "eval/accuracy": 0.5})
    found = record.read_environment()
    assert [t["code"] for t in found["earlier_tries"]] == ["a", "b"] and found["code"] == "c"


def test_every_attempt_keeps_its_versions_machine_threads_and_precision(tmp_path):
    record, chosen = Record(tmp_path), load_settings(["model=tiny-roberta", "task=demo/sentiment"])
    record.prepare_folder(chosen)
    record.append_log({"step": 0, "eval/accuracy": 0.5})
    first = record.read_environment()
    record.prepare_folder(chosen)
    (attempt,) = record.read_environment()["earlier_tries"]
    assert attempt == {name: value for name, value in first.items() if name not in ("identity", "model_files")}
    assert attempt.keys() > {"python", "packages", "processor", "threads", "instructions", "tf32", "variables"}
    assert list_attempts(record.read_environment())[1:] == [attempt]
    assert list_attempts({"processor": "abacus", "earlier_tries": [{"commit": "c0ffee"}]})[1:] == []


def test_code_that_git_does_not_know_is_not_called_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert has_uncommitted_changes() is None
    monkeypatch.setenv("PATH", "")
    assert run_git("status") is None


@pytest.mark.parametrize(
    ("begun", "now", "together"),
    [(True, False, True), (False, True, True), (None, False, None), (False, None, None), (False, False, False)],
)
def test_a_run_that_goes_on_is_as_clean_as_its_dirtiest_part(begun, now, together, tmp_path, monkeypatch):
    record, chosen = Record(tmp_path), load_settings(["model=tiny-roberta", "task=demo/sentiment"])
    was = {"commit": "old", "uncommitted_changes": begun, "threads": 1, "started": "then"}
    record.write_file("environment.json", was)
    today = {"commit": "new", "uncommitted_changes": now, "threads": 1, "started": "today"}
    monkeypatch.setattr("dual_lora.lab.record.record.describe_environment", lambda: today)
    monkeypatch.setattr("dual_lora.lab.record.record.hash_model_files", lambda settings: {})
    today = today | {"identity": record.name, "model_files": {}}
    record.prepare_folder(chosen)
    assert record.read_environment() == today  # begun anew
    record.write_file("environment.json", was)
    monkeypatch.setattr(Record, "find_checkpoint", lambda self: tmp_path)
    record.prepare_folder(chosen)
    assert record.read_environment() == today | {
        "uncommitted_changes": together,
        "earlier_commits": ["old"],
        "earlier_tries": [was],
        "started": "then",
    }
