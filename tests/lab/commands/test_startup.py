"""What the commands import before they answer: a library that is not needed is a second or more that a user waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.record.run import Run
from dual_lora.lab.train.run import train_run
from tests.support.places import ROOT

TRAINED = ["train.max_steps=1", "train.max_examples=4", "train.batch_size=4", "eval.max_examples=2"]
TRAINED += ["eval.before=false", "wandb.mode=disabled", "model=tiny-roberta", "task=demo/sentiment"]
TORCH = {"torch", "transformers", "peft", "accelerate", "bitsandbytes"}
TABLES = {"pandas", "numpy", "scipy", "sklearn", "statsmodels", "matplotlib"}
DATA = {"datasets", "pyarrow", "evaluate", "sacrebleu"}
SETTINGS = {"hydra", "omegaconf", "yaml"}
# Runs a script as `python SCRIPT WORDS`, then prints the packages it has imported.
PROBE = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs with the finished one of TRAINED."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder)
        train_run(Run.prepare(load_settings(TRAINED)))
    return folder


def list_imports(runs: Path, *words: str) -> set[str]:
    """Return the packages that a command has imported when it ends."""
    environment = os.environ | {"DUAL_LORA_RUNS": str(runs)}
    environment.pop("DUAL_LORA_LAZY", None)  # the entry points set it
    command = [sys.executable, "-c", PROBE, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    code, names = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return set(names)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "sweep.py"])
def test_help_needs_no_library(script, tmp_path):
    assert not list_imports(tmp_path, script, "--help") & (TORCH | TABLES | DATA | SETTINGS - {"yaml"})


def test_a_finished_run_is_told_without_torch_and_without_data(runs):
    found = list_imports(runs, "train.py", *TRAINED)
    assert not found & (TORCH | TABLES | DATA) and {"hydra", "tasks"} <= found


def test_settings_are_composed_without_torch_and_without_data(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text("""
import os, sys
os.environ["DUAL_LORA_LAZY"] = "1"
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.study.experiment import Experiment
load_settings(["model=gpt2-medium", "task=e2e"])
for name in ("nlu", "commonsense"):
    Experiment.load(name).compose_cells(["seed=0"])
sys.exit(0)
""")
    assert not list_imports(tmp_path, str(probe)) & (TORCH | TABLES | DATA)


def test_a_plan_reads_no_data_and_draws_nothing(tmp_path):
    found = list_imports(tmp_path, "train.py", "model=tiny-roberta", "task=glue/rte", "plan=true")
    assert "torch" in found and not found & {"datasets", "matplotlib", "statsmodels", "wandb", "evaluate"}


def test_a_report_of_records_needs_no_torch(runs):
    words = ["experiment=learning_rates", "scale=smoke", "run=false"]
    found = list_imports(runs, "sweep.py", *words)
    assert "pandas" in found and not found & (TORCH | {"datasets", "wandb", "evaluate"})
