"""torch.compile as a setting: the same training, a name of its own, and one line where it cannot work."""

import shutil
from functools import partial

import pytest
import torch
from transformers import TrainingArguments

from dual_lora.lab.commands.train import train_command
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.system.libraries import describe_float32_products, keep_float32_products
from dual_lora.lab.train import run as train_run_module
from dual_lora.lab.train.run import train_run
from dual_lora.lab.train.trainer import RunTrainer, translate_compile_errors
from tests.support.small_runs import settings

ON = "train.compile=true"
FEW = ["train.batch_size=4", "train.max_steps=3", "eval.before=false"]


def compare_runs(runs_folder, *words: str) -> None:
    """Train with and without compilation and compare every logged row."""
    torch._dynamo.reset()
    found = []
    for switch in ([], [ON]):
        result = train_run(Run.prepare(settings("tiny-llama", *FEW, *words, *switch)))
        log = Record(runs_folder / "adhoc" / result["identity"]).read_log()
        found.append([row for row in log if "train/loss" in row])
    assert len(found[0]) == 3
    for plain, compiled in zip(*found, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-3)


def test_a_traced_run_trains_as_any_other(runs_folder, monkeypatch):
    """Traced as for torch.compile, but executed by torch itself, which needs no C++ compiler."""
    eager = partial(TrainingArguments, torch_compile_backend="aot_eager")
    monkeypatch.setattr(
        train_run_module,
        "TrainingArguments",
        lambda torch_compile, **k: eager(torch_compile=True, **k) if torch_compile else TrainingArguments(**k),
    )
    traced = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: traced.append(k.get("backend")) or real(*a, **k))
    compare_runs(runs_folder)
    assert traced == ["aot_eager"]


def test_a_run_that_is_compiled_takes_its_products_in_float32_as_any_other(runs_folder, monkeypatch):
    """On a GPU that has TF32, transformers and accelerate allow it where a model is compiled."""
    seen, real, built = [], RunTrainer.training_step, []

    def allow(settings, record):
        torch.backends.fp32_precision = "tf32"
        torch.backends.cuda.matmul.allow_tf32 = True
        built.append(describe_float32_products()["tf32"]["matmul"])
        return arguments(settings, record)

    def step(self, *args, **kwargs):
        seen.append(describe_float32_products())
        return real(self, *args, **kwargs)

    arguments = train_run_module.build_training_arguments
    monkeypatch.setattr(train_run_module, "build_training_arguments", allow)
    monkeypatch.setattr(RunTrainer, "training_step", step)
    before = describe_float32_products()
    train_run(Run.prepare(settings("tiny-llama", *FEW)))
    assert built == [True] and seen == [before] * 3 and describe_float32_products() == before
    assert before == {"tf32": {"matmul": False, "cudnn": True}, "float32_matmul_precision": "highest"}


def test_a_setting_of_one_part_of_torch_is_described():
    with keep_float32_products():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        found = describe_float32_products()
    assert found["tf32"] == {"matmul": True, "cudnn": True}
    assert found["float32_matmul_precision"] == torch.backends.fp32_precision


@pytest.mark.slow
def test_a_compiled_run_trains_as_any_other(runs_folder):
    compare_runs(runs_folder)


def test_it_is_off_by_default_and_names_a_run_apart(runs_folder):
    names = [Run.prepare(settings("tiny-llama", *more)).identity for more in ((), ("train.compile=false",), (ON,))]
    assert names[0] == names[1] != names[2]


def test_without_a_compiler_it_is_refused_before_anything_is_loaded(runs_folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "my-cxx")
    with pytest.raises(UserError, match="^train.compile=true: needs a C.. compiler, and there is no my-cxx"):
        train_command([ON])


def test_what_torch_cannot_compile_is_one_line():
    error = type("CompileError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("C++ compile error\nmore")
    said = r"^train.compile=true: torch cannot .* here \(C\+\+ compile error\); drop it$"
    with pytest.raises(UserError, match=said), translate_compile_errors(settings("tiny-llama", ON)):
        raise error
    for chosen, other in ((settings("tiny-llama"), error), (settings("tiny-llama", ON), RuntimeError("mine"))):
        with pytest.raises(RuntimeError), translate_compile_errors(chosen):
            raise other
