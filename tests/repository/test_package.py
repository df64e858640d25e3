"""The package alone: a wheel, installed into an empty environment, adapts a model."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.places import ROOT

USE = """
import torch, dual_lora
from peft import get_peft_model

assert "site-packages" in dual_lora.__file__ and not dual_lora.__file__.startswith({checkout!r}), dual_lora.__file__
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), dual_lora.DualLoraConfig(r=4, target_modules=["0"]))
model(torch.ones(2, 8)).sum().backward()
print(type(model.base_model).__name__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=600)
    (found,) = folder.glob("dual_lora-*.whl")
    return found


@pytest.mark.slow
def test_a_wheel_holds_the_method_and_nothing_of_the_harness(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dual_lora/functional.py", "dual_lora/tuner/layer.py", "dual_lora/paper/DEVIATIONS.md"} <= set(names)
    assert not [name for name in names if name.startswith(("dual_lora/lab", "tasks", "tests", "conf"))]


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """torch and PEFT come from this environment, so that nothing is downloaded; the package comes from the wheel."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=600)
    (there,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (there / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = USE.format(checkout=str(ROOT))
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip() == "DualLoraModel", done.stderr
