"""What runs print: headlines that name what was asked for, lines in log files, how to upload, no foreign warnings."""

import re
import subprocess
import sys

import pytest
from tqdm.utils import envwrap

from dual_lora.lab.commands.train import check_command, train_command
from dual_lora.lab.errors import EXIT_OK
from dual_lora.lab.evaluate import evaluate
from dual_lora.lab.system.environment import hides_bars
from tests.support import forked
from tests.support.places import ROOT
from tests.support.small_runs import TINY


def test_the_headline_of_a_single_run_names_its_settings(runs_folder):
    words = [*TINY, "method.magnitude_ratio=0.25", "train.group_by_length=true", "train.save_steps=9", "seed=3"]
    (run,) = check_command(words)
    given = [word.rpartition(".")[2] for word in TINY if word.startswith("train.")]
    named = " ".join(["dual_lora", *given, "magnitude_ratio=0.25", "group_by_length=true"])
    assert run.title == f"tiny-roberta  demo/sentiment  {named}  seed 3"


def test_a_switch_is_named_as_it_is_typed(runs_folder):
    runs = check_command(["-m", *TINY, "train.group_by_length=null,true"])
    assert [run.label for run in runs] == ["dual_lora group_by_length=null", "dual_lora group_by_length=true"]


def test_runs_of_a_launcher_name_what_varies(runs_folder, capfd):
    """joblib with one process works in a thread of this one."""
    launcher = ["hydra/launcher=workstation", "hydra.launcher.n_jobs=1"]
    words = [word for word in TINY if not word.startswith("train.")]
    assert (
        train_command(["-m", *words, *launcher, "train.max_steps=2", "train.log_steps=1", "method.rank=4,8"]) == EXIT_OK
    )
    shown = capfd.readouterr()
    assert re.findall(r"demo/sentiment  (dual_lora rank=\d)  seed 0", shown.out) == [
        "dual_lora rank=4",
        "dual_lora rank=8",
    ]
    lines = re.findall(r"(?m)^tiny-roberta_demo-sentiment_dual_lora_s0_\w{10}: step 2/2, loss ", shown.err)
    assert len(lines) == 2, "in a file that several runs share, a line of progress says whose it is"


@pytest.mark.parametrize("variable", [None, ""])
def test_an_evaluation_writes_lines_into_a_log_file_and_no_bar(variable, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "LINE_SECONDS", 0.0)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # which runs beside others set
    if variable is not None:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    assert list(evaluate.show_progress([[0], [1], [2]], "after")) == [[0], [1], [2]]
    said = capsys.readouterr().err
    assert re.findall(r"(?m)^after: batch (\d)/3, \d+ s left$", said)[-2:] == ["1", "2"] and "\r" not in said


@pytest.mark.parametrize("value", [None, "", "0", "1", "false"])
def test_bars_are_hidden_where_tqdm_hides_them(value, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TQDM_DISABLE", value)
    disabled = envwrap("tqdm")(lambda disable=False: disable)()
    assert hides_bars() is disabled is (value not in (None, ""))


def test_a_run_mirrored_offline_says_how_to_upload_it(runs_folder):
    words = [word for word in TINY if not word.startswith("wandb.")]
    done = forked.run("train.py", *words)
    (folder,) = runs_folder.glob("adhoc/*")
    assert f"upload   wandb sync {folder}/wandb/offline-run-*\n" in done.stdout
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert not re.search("kernels|Warning|it/s|\r", done.stderr), done.stderr


def test_importing_the_package_says_nothing_of_optional_kernels():
    """In a process of its own: commands and Hydra turn loggers off in this one."""
    code = """
import importlib, logging, os
os.environ["DUAL_LORA_LAZY"] = "1"
import dual_lora
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
importlib.import_module = lambda name: [logger.warning(text) for text in (
    "Failed to load CPU gemm_4bit_forward from kernels-community: %s", "something else")]
dual_lora._import_tuner()
assert not logger.filters
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "something else\n")
