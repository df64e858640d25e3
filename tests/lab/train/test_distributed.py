"""Two processes on one run, as torchrun starts them, do what one does with the doubled batch, and can be stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dual_lora.lab.commands.evaluate import evaluate_command
from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.errors import EXIT_FAILED, EXIT_STOPPED
from dual_lora.lab.record.record import Record
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.execute import execute_run
from dual_lora.lab.system import distributed
from dual_lora.lab.train.run import train_run
from tests.support.pages import COMMANDS, words
from tests.support.places import ROOT

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

((_, *OPTIONS, SCRIPT, FSDP2, DEVICES),) = (words(command) for command in COMMANDS if command.startswith("torchrun"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", *OPTIONS]
COMMON = ["wandb.mode=disabled", "train.max_steps=6", "eval.max_examples=8", "eval.batch_size=4", "train.log_steps=1"]
TEXT, WORDS = ["model=tiny-llama", "task=demo/restaurants"], ["model=tiny-roberta", "task=demo/sentiment"]
GROUPED = [*WORDS, "train.group_by_length=true", "train.max_examples=48"]  # in groups of 8, not 12
ONE, TWO = ["train.batch_size=8"], ["train.batch_size=4", DEVICES]
# What may differ: names, and what was not computed but measured.
OTHER = {"batch", "identity", "train_seconds", "tokens_per_second", "peak_memory_bytes", "merged", "train_loss"}
OTHER |= {"sha256", "digest"}


def start(script: str, *arguments: str, runs: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DUAL_LORA_RUNS": str(runs)}
    command = [*TORCHRUN, script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def done(process: subprocess.Popen) -> str:
    said, _ = process.communicate()
    assert process.returncode == 0, said[-3000:]
    return said


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w for file in sorted(folder.glob("*/*.safetensors")) for name, w in load_file(file).items()}


def same_record(two: Path, one: Path) -> None:
    """Hold two records equal: weights and logged rows to rounding, everything that is counted or decided exactly."""
    results = [json.loads((folder / "result.json").read_text()) for folder in (two, one)]
    assert results[0].keys() == results[1].keys()
    for name in results[0].keys() - OTHER:
        assert results[0][name] == results[1][name], name
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], abs=1e-5)
    assert (two / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()
    for mine, other in zip(rows(two), rows(one), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    mine, other = weights(two), weights(one)
    assert mine.keys() == other.keys() and mine
    for name, weight in mine.items():
        # But for one in a thousand: for a rounded digit Adam may move a weight with next to no gradient by a step.
        close = torch.isclose(weight, other[name], rtol=1e-3, atol=1e-5)
        assert close.double().mean() >= 0.999, name
        assert (weight.double() - other[name].double()).norm() <= 1e-5 + 1e-3 * other[name].double().norm(), name


def test_the_readme_starts_two_processes_with_fsdp2():
    """As the test below does, in these words."""
    assert [*OPTIONS, SCRIPT] == ["--nproc-per-node", "2", "train.py"]
    assert [FSDP2, DEVICES] == ["hardware=fsdp2", "hardware.devices=2"]


@pytest.mark.parametrize(
    ("hardware", "kind", "methods"),
    [
        ("ddp", GROUPED, ["dual_lora"]),
        ("fsdp2", TEXT, ["dual_lora", "full"]),
        pytest.param("ddp", TEXT, ["dual_lora", "full"], marks=pytest.mark.slow),
        pytest.param("fsdp2", TEXT, ["lora", "lora_plus", "rslora"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_leave_the_record_of_one_with_the_doubled_batch(hardware, kind, methods, runs_folder, capsys):
    chosen = [*kind, *COMMON]
    named = [f"method={','.join(methods)}", *["-m"][: len(methods) - 1]]
    said = done(start(SCRIPT, *chosen, *TWO, f"hardware={hardware}", *named, runs=runs_folder))
    assert said.count("record ") == len(methods), "the second process speaks, too"
    for method in methods:
        two = Run.prepare(load_settings([*chosen, *TWO, f"hardware={hardware}", f"method={method}"])).record.folder
        one = train_run(Run.prepare(load_settings([*chosen, *ONE, f"method={method}"])))
        same_record(two, runs_folder / "adhoc" / one["identity"])
        assert json.loads((two / "environment.json").read_text())["processes"] == 2
        assert evaluate_command([f"run={two}"]) == 0, "one process evaluates what two have trained"


@pytest.mark.slow
def test_several_processes_evaluate_a_run_again(runs_folder, capsys):
    result = train_run(Run.prepare(load_settings([*TEXT, *COMMON, *ONE])))
    said = done(start("eval.py", f"run={runs_folder / 'adhoc' / result['identity']}", runs=runs_folder))
    assert said.count("reproduced exactly") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("hardware", "grouped"), [("ddp", "true"), ("fsdp2", "null")])
def test_processes_that_are_stopped_go_on_to_the_same_bytes(hardware, grouped, runs_folder, tmp_path):
    """Stopped in the second epoch, of 60 steps; hardly ever at its very end."""
    common = [word for word in COMMON if not word.startswith("train.max_steps=")]
    chosen = [*TEXT, *common, *TWO, f"hardware={hardware}", "train.max_steps=150", "method.dropout=0.1"]
    chosen += [f"train.group_by_length={grouped}", "train.max_examples=480"]
    whole = start("train.py", *chosen, runs=tmp_path / "whole")
    done(whole)
    folder = Run.prepare(load_settings(chosen)).record.folder
    process = start("train.py", *chosen, runs=runs_folder)
    while process.poll() is None and not (folder.is_dir() and len(Record(folder).read_log()) > 65):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert (
        60 < len(Record(folder).read_log()) < 150
        and Record(folder).find_checkpoint()
        and not Record(folder).read_result()
    )
    done(start("train.py", *chosen, runs=runs_folder))
    (other,) = (tmp_path / "whole").glob("adhoc/*")
    assert rows(folder) == rows(other)
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (
        other / "adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "hardware.devices=1: started as 2 process(es); add hardware=ddp or hardware=fsdp2 and hardware.devices=2"),
        (["hardware=ddp"], "hardware.devices=8: started as 2 process(es); start it with torchrun --nproc-per-node 8"),
        pytest.param(
            [*TEXT, *TWO, "hardware=fsdp2", "method=dora"],
            "method=dora starts from the base weights, which are sharded; take hardware=ddp",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["model=tiny-gpt2", *TWO, "hardware=fsdp2"],
            "transformers cannot shard a gpt2; take hardware=ddp",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_several_processes_cannot_do_is_told_in_one_line(arguments, said, runs_folder):
    process = start("train.py", "wandb.mode=disabled", *arguments, runs=runs_folder)
    out, _ = process.communicate()
    told = [line for line in out.splitlines() if re.match(r"(train\.py|failed): ", line.rpartition("\r")[2])]
    told = {line for line in told if "stopped by" not in line}  # of the first one, had it been very late
    assert len(told) == 1 and said in told.pop(), out[-2000:]
    assert process.returncode


@pytest.mark.parametrize("asked", [None, "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("where", ["before a run", "in a run"])
def test_another_process_waits_for_the_first_before_it_says_why(where, asked, runs_folder, monkeypatch, capsys):
    """It is stopped while it waits once the first one has ended, and says nothing then."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)

    def fail(*_):
        raise ValueError("odd")

    def sleep(seconds: float) -> None:
        assert seconds == distributed.FIRST_PROCESS_SECONDS and capsys.readouterr() == ("", "")
        if asked:
            os.kill(os.getpid(), getattr(signal, asked))

    monkeypatch.setattr("dual_lora.lab.train.run.train_run", fail)
    monkeypatch.setattr(distributed.time, "sleep", sleep)
    doing = fail if where == "before a run" else lambda: execute_run(Run.prepare(load_settings([*WORDS, *COMMON])))
    with pytest.raises(SystemExit) as end:
        run_command(doing)
    said = capsys.readouterr().err
    if asked == "SIGTERM":
        assert said == "" and end.value.code == EXIT_STOPPED
    else:
        assert said.count("Traceback") == 1 and "ValueError: odd" in said.splitlines()[-1]
        assert end.value.code == EXIT_FAILED


FAILS = """import os, sys, time
from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.errors import require
from dual_lora.lab.system import distributed

def do():
    time.sleep(2 * (os.environ["RANK"] == SLOW))
    require(os.environ["RANK"] not in FAILING, "what=this: does not do")
    time.sleep(600)

if FAILING == "01":
    distributed.FIRST_PROCESS_SECONDS = 600.0
sys.argv[0] = "train.py"
run_command(do)
"""


@pytest.mark.parametrize(
    ("slow", "failing"),
    [("0", "01"), pytest.param("1", "01", marks=pytest.mark.slow), pytest.param("0", "1", marks=pytest.mark.slow)],
)
def test_one_process_tells_why_whichever_fails_before_the_others(slow, failing, tmp_path, monkeypatch):
    """The first to end is the end of all: torchrun stops the others."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DUAL_LORA_LAZY", "1")
    script = tmp_path / "fails.py"
    script.write_text(FAILS.replace("SLOW", repr(slow)).replace("FAILING", repr(failing)))
    process = start(str(script), runs=tmp_path / "runs")
    out, _ = process.communicate()
    told = [line for line in out.splitlines() if line.startswith("train.py: ")]
    also = ["train.py: stopped by SIGTERM; the same command resumes from here"] if failing == "1" else []
    assert told == ["train.py: what=this: does not do", *also], out[-2000:]
