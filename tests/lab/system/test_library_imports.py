"""What the environment does to libraries while they are imported, and to what Python does at the end."""

import importlib
import os
import subprocess
import sys

import pytest

from dual_lora.lab.config.paths import BUNDLED
from dual_lora.lab.errors import (
    EXIT_USER,
    UserError,
    describe_machine_error,
    translate_machine_errors,
    translate_read_errors,
)
from dual_lora.lab.inputs.model_files import link_model
from tests.support.places import ROOT


def import_and_describe(folder, monkeypatch, source):
    """Return what is said of a module that fails while it is imported."""
    (folder / "library_of_ours.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ValueError) as error:
        importlib.import_module("library_of_ours")
    return describe_machine_error(error.value)


@pytest.mark.parametrize("value", ["abc", "1,5", "12 s", "x"])
def test_a_variable_that_a_library_cannot_read_is_named(value, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBRARY_TIMEOUT", value)
    said = import_and_describe(tmp_path, monkeypatch, "import os\nfloat(os.environ['LIBRARY_TIMEOUT'])")
    assert said.startswith(f"LIBRARY_TIMEOUT={value}: ") and said.endswith("; unset it")
    assert len(said.splitlines()) == 1


def test_a_variable_is_named_also_where_a_library_is_imported_while_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBRARY_TIMEOUT", "abc")
    (tmp_path / "library_of_ours.py").write_text("import os\nfloat(os.environ['LIBRARY_TIMEOUT'])")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(UserError, match="^LIBRARY_TIMEOUT=abc: .*; unset it$"),
        translate_machine_errors(),
        translate_read_errors("task=own: cannot load its train split", "give data_dir=DIR"),
    ):
        importlib.import_module("library_of_ours")


def test_other_errors_are_not_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBRARY_TIMEOUT", "abc")
    assert import_and_describe(tmp_path, monkeypatch, "int('xyz')") is None
    with pytest.raises(ValueError) as error:
        int("abc")
    assert describe_machine_error(error.value) is None


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        ("HF_HUB_ETAG_TIMEOUT", "abc", ["plan=true"]),
        ("TORCH_LOGS", "foo", ["plan=true"]),
        ("PYTHONOPTIMIZE", "2", ["plan=true"]),
        ("TQDM_POSITION", "x", []),  # read while tqdm is imported
        ("TQDM_ASCII", "q", ["plan=true"]),  # read while a bar is drawn
    ],
)
def test_a_command_says_which_variable_it_is(name, value, more, tmp_path):
    words = ["train.py", "model=tiny-roberta", "task=demo/sentiment", "train.max_steps=1", *more]
    env = os.environ | {name: value} | {"DUAL_LORA_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == EXIT_USER
    assert f"{name}={value}" in done.stderr and "Traceback" not in done.stderr


def test_links_to_a_model_end_without_a_warning():
    code = f"from pathlib import Path\nfrom {link_model.__module__} import link_model\n"
    code += f"print(link_model(Path({str(BUNDLED / 'tiny-gpt2')!r})))"
    env = os.environ | {"PYTHONWARNINGS": "error::ResourceWarning"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "ResourceWarning" not in done.stderr
    assert not os.path.exists(done.stdout.splitlines()[-1])
