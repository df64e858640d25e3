"""Runs through Hydra's launchers: in other processes everything is as in this one, and the command tells what became of
them. A real Slurm: test_slurm.py."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from dual_lora.lab.commands.sweep import sweep_command
from dual_lora.lab.commands.train import check_command
from dual_lora.lab.config.compose import list_choices, load_settings
from dual_lora.lab.errors import Stopped, UserError
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.execute import (
    EXIT_ELSEWHERE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER,
    execute_run,
    failures,
    report_failures,
)
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.launch import command
from dual_lora.lab.study.launch import process as launched
from dual_lora.lab.study.launch.command import (
    call_in_thread,
    check_launcher,
    compose_launcher,
    get_launcher_name,
    launch_runs,
    name_sweep_folder,
    note_failures,
    prepare_launch_folder,
)
from dual_lora.lab.system.signals import REQUEUE, STOP
from dual_lora.lab.train import run as train_run
from tests.support.pages import COMMANDS, PAGES, words
from tests.support.places import ROOT
from tests.support.small_runs import SMALL, SPEC

TINY = ["model=tiny-roberta", "task=demo/sentiment", *SMALL]
INSTALLED = [name for name in list_choices("hydra/launcher") if name != "ray_cluster"]
LONG = ["train.max_steps=4000"]


@pytest.fixture
def start():
    """A function that starts train.py with a launcher, in a process group that does not outlive the test."""
    begun = []

    def do(*words: str, cwd: Path = ROOT) -> subprocess.Popen:
        given = {word.partition("=")[0] for word in words}
        words = [word for word in TINY if word.partition("=")[0] not in given] + list(words)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, str(ROOT / "train.py"), "-m", *words]
        begun.append(subprocess.Popen(command, cwd=cwd, start_new_session=True, **streams))
        return begun[-1]

    yield do
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def doing(folder: Path, number: int) -> list[int]:
    """Wait until so many runs log steps and return the processes that do them."""
    end = time.monotonic() + 1500
    while time.monotonic() < end:
        begun = [p.parent for p in folder.glob("adhoc/*/metrics.jsonl") if "loss" in p.read_text()]
        if len(begun) >= number:
            with suppress(FileNotFoundError):  # one has ended since
                return [json.loads((run / ".lock").read_text())["pid"] for run in begun]
        time.sleep(0.3)
    raise AssertionError(f"{number} runs never began")


@pytest.mark.parametrize("name", INSTALLED)
def test_every_launcher_composes(name):
    assert compose_launcher([f"hydra/launcher={name}"]).hydra.launcher._target_.startswith("hydra_plugins.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hydra/launcher=slrum", "hydra/launcher=slrum: no such launcher. Did you mean slurm? Known: basic, "),
        ("hydra/launcher=slurm hydra.launcher.partitoin=x", "hydra.launcher.partitoin: launcher slurm has no such"),
        ("hydra/launcher=workstation +hydra.launcher.x=1", "hydra.launcher.x: launcher workstation has no such"),
        ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs: launcher basic has no such setting."),
        ("hydra/launcher=workstation hydra.launcher.n_jobs=two", "hydra.launcher.n_jobs: Value 'two' of type 'str'"),
        ("hydra/launcher=workstation hydra.launcher.n_jobs=1,2", "hydra.launcher.n_jobs: one value for all runs"),
        ("hydra/launcher=workstation,slurm", "hydra/launcher: one value for all runs"),
        ("+hydra/launcher=slurm", "+hydra/launcher: already exists"),
        (
            "hydra/launcher=slurm hydra.sweeper.max_batch_size=2",
            "hydra.sweeper.max_batch_size: only hydra/launcher may be set",
        ),
        ("hydra/sweeper=basic", "hydra/sweeper: only hydra/launcher may be set"),
        ("hydra.launchers=slurm", "hydra.launchers: only hydra/launcher may be set"),
    ],
)
def test_mistakes(words, message):
    for refuse in (
        lambda: check_command(["-m", *words.split()]),
        lambda: sweep_command(["experiment=cost", *words.split()]),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["hydra/launcher='workstation'", 'hydra/launcher="workstation"'])
def test_a_launcher_in_quotes_is_that_launcher(word):
    check_launcher([word, "hydra.launcher.n_jobs=2"])
    assert get_launcher_name([word]) == "workstation"


def test_a_launcher_that_is_not_installed_names_the_extra(monkeypatch):
    def missing(words):
        raise MissingConfigException("no such config", "hydra/launcher/x")

    monkeypatch.setattr(command, "compose_launcher", missing)
    for name, extra in {"ray_cluster": "ray", "slurm": "launchers", "workstation": "launchers"}.items():
        with pytest.raises(UserError, match=rf"hydra/launcher={name}: not installed; pip install -e '.\[{extra}\]'$"):
            check_launcher([f"hydra/launcher={name}"])


@pytest.mark.parametrize("name", ["it's, here", r"a\b", "${x}", "new\nline"])
def test_jobs_compose_the_folder_of_the_launch_whatever_its_name(name, tmp_path):
    config = compose_launcher(["hydra/launcher=slurm_local", name_sweep_folder(tmp_path / name)])
    composed = GlobalHydra.instance().config_loader().load_sweep_config(config, [])
    assert composed.hydra.sweep.dir == str(tmp_path / name)


def test_no_slurm_here_is_told(runs_folder, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="^hydra/launcher=slurm: Could not detect"):
        launch_runs([Run.prepare(load_settings(TINY))], ["hydra/launcher=slurm"])


def test_the_documentation_names_every_launcher():
    assert all(f"| `{name}` |" in PAGES["docs/distributed.md"] for name in list_choices("hydra/launcher"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "hydra/launcher" in c])
def test_a_failing_run_stops_no_other(command, runs_folder, start, tmp_path):
    """The README's commands, without Slurm (test_slurm.py has it), and with a rank of one module that cannot be
    shared between two groups, which only the run itself finds out. The current folder is left as it is: a file takes
    the name of the folder that Hydra would make there."""
    local = {"hydra/launcher=slurm": "hydra/launcher=slurm_local", "hydra.launcher.partition=NAME": "train.lr=1e-3"}
    given = [local.get(word, word) for word in words(command)[3:]]
    (here := tmp_path / "here").mkdir()
    (here / "multirun").touch()
    process = start(*given, "+method.peft.rank_pattern={query:1}", cwd=here)
    out, err = process.communicate(timeout=1500)
    assert f"2 of 2 runs handed to {get_launcher_name(given)}" in out
    assert process.returncode == EXIT_USER and "1 of 2 runs finished" in err, err
    assert "dual_lora_s0" in err and "rank_pattern['query']=1: expected an integer of at least 2" in err
    assert [p.parent.name.count("dual_lora") for p in runs_folder.glob("adhoc/*/result.json")] == [0]
    assert list((runs_folder / ".multirun").iterdir()), "a launch with a failure keeps its logs"
    assert [path.name for path in here.iterdir()] == ["multirun"]


@pytest.fixture
def experiment(monkeypatch):
    """Make `experiment=small` mean SPEC, with one rate to choose from and one seed."""
    tune = {"holdout": 32, "grid": {"LoRA": [1e-3], "Dual LoRA": [2e-3]}}
    spec = SPEC | {"tune": tune, "smoke": SPEC["smoke"] | {"seeds": [0]}}
    monkeypatch.setattr(Experiment, "load", lambda name, scale=None: Experiment.from_content(name, spec, scale))
    return ["experiment=small", "hydra/launcher=slurm_local", *SMALL]


def test_a_sweep_hands_over_what_is_missing(experiment, runs_folder, monkeypatch, capsys):
    """First the runs that choose rates, then the table's own, each cell with its own settings."""
    handed = []

    def launch(runs, words):
        handed.append([(run.settings.method.name, run.settings.seed, run.settings.train.lr) for run in runs])
        assert words == ["hydra/launcher=slurm_local"]
        for run in runs:
            execute_run(run)

    monkeypatch.setattr("dual_lora.lab.study.schedule.launch_runs", launch)
    assert sweep_command(experiment) == 0
    trials = [("lora", 1000, 1e-3), ("dual_lora", 1000, 2e-3)]
    assert handed == [trials, [("lora", 0, 1e-3), ("dual_lora", 0, 2e-3)]]
    assert sweep_command(experiment) == 0
    assert handed[2:] == [[], []]


@pytest.mark.slow
def test_a_sweep_through_a_launcher(experiment, runs_folder, monkeypatch, capsys):
    monkeypatch.setattr(
        "dual_lora.lab.study.schedule.choose_learning_rate", lambda cell, study: cell
    )  # no trials: seconds less
    monkeypatch.setattr(Experiment, "list_trials", lambda *_: ())
    assert sweep_command(experiment) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 runs handed to slurm_local" in shown and "| LoRA" in shown
    assert len(list(runs_folder.glob("small/*/result.json"))) == 2
    assert not list((runs_folder / ".multirun").iterdir()), "a launch that is whole leaves nothing"


@pytest.mark.slow
def test_a_killed_process_ends_in_the_usual_words(runs_folder, start):
    command = start("hydra/launcher=workstation", "method=lora,dual_lora", *LONG)
    os.kill(doing(runs_folder, 2)[0], signal.SIGKILL)
    out, err = command.communicate(timeout=1500)
    assert command.returncode == EXIT_FAILED and "Traceback" not in err
    assert err.count("Killed: ended without a result; the same command tries again") == 2
    assert "0 of 2 runs finished" in err


@pytest.mark.slow
def test_a_stopped_command_stops_its_runs_with_checkpoints(runs_folder, start):
    """Ctrl-C as a terminal sends it: to all processes at once; the one of four runs that waits is not begun."""
    command = start("hydra/launcher=workstation", "method=lora,dual_lora", "seed=0,1", *LONG)
    doing(runs_folder, 2)
    os.killpg(command.pid, signal.SIGINT)
    out, err = command.communicate(timeout=1500)
    assert command.returncode == EXIT_STOPPED and "Traceback" not in err
    assert "the runs are asked to stop" in err and "stopped by SIGINT; the same command resumes" in err
    assert len(list(runs_folder.glob("adhoc/*/checkpoints/*/"))) == 2 == len(list(runs_folder.glob("adhoc/*")))


@pytest.mark.slow
def test_a_killed_command_leaves_no_run_behind(runs_folder, start):
    """SIGKILL of the command alone: its runs notice, and stop with checkpoints."""
    command = start("hydra/launcher=workstation", "method=lora,dual_lora", *LONG)
    workers = doing(runs_folder, 2)
    command.kill()
    until = time.monotonic() + 600
    while list(runs_folder.glob("adhoc/*/.lock")) and time.monotonic() < until:
        time.sleep(0.2)
    assert not list(runs_folder.glob("adhoc/*/.lock")), workers
    assert len(list(runs_folder.glob("adhoc/*/checkpoints/*/"))) == 2


@pytest.mark.slow
def test_a_command_killed_before_any_run_leaves_no_worker_behind(runs_folder, start):
    """SIGKILL of the command alone as soon as its workers are there: idle ones end within seconds, not minutes."""
    command = start("hydra/launcher=workstation", "method=lora,dual_lora", *LONG)
    workers = wait_for_workers(command.pid, 2)
    command.kill()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive and not list(runs_folder.glob("adhoc/*/metrics.jsonl"))


def wait_for_workers(pid: int, number: int) -> list[psutil.Process]:
    """Wait until a command has so many processes of joblib's and return them."""
    command, end = psutil.Process(pid), time.monotonic() + 600
    while time.monotonic() < end:
        found = [p for p in command.children(recursive=True) if "loky" in " ".join(p.cmdline())]
        if len(found := [p for p in found if "resource_tracker" not in " ".join(p.cmdline())]) >= number:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{number} workers never started")


@pytest.mark.slow
def test_a_run_that_takes_longer_than_the_launcher_allows_is_one_line(runs_folder, start):
    command = start("hydra/launcher=workstation", "hydra.launcher.timeout=1", "method=lora,dual_lora", *LONG)
    _, err = command.communicate(timeout=1500)
    assert command.returncode == EXIT_USER and "Traceback" not in err
    assert "hydra.launcher.timeout: a run took longer" in err
    assert not list(runs_folder.glob("adhoc/*/.lock"))


@pytest.fixture
def work(runs_folder, monkeypatch):
    """A function that does job 0 of a launch as a launcher's process does, with `attempt` in place of the run."""
    monkeypatch.setattr(launched, "stop_reasons", [])
    folder = prepare_launch_folder([Run.prepare(load_settings(TINY))])
    here = OmegaConf.create({"job": {"num": 0}})
    monkeypatch.setattr(launched.HydraConfig, "get", lambda: here)

    def do(attempt=execute_run):
        monkeypatch.setattr(launched, "execute_run", attempt)
        return launched.execute_launched_run(folder, None)

    do.folder = folder
    return do


def test_a_process_that_was_stopped_takes_no_more_runs(work):
    def preempted(settings):
        signal.raise_signal(signal.SIGTERM)

    stopped = {"error": "Stopped", "message": "SIGTERM"}
    assert work(preempted) == stopped
    assert work(lambda settings: pytest.fail("begun")) == stopped


def test_a_stopped_launch_begins_no_more_runs(work):
    (work.folder / "stop").touch()
    assert work(lambda settings: pytest.fail("begun"))["error"] == "Stopped"


def test_what_a_process_cannot_read_is_a_failed_run(work):
    (work.folder / "0" / "config.yaml").write_text("seed: [")
    assert work()["error"] == "UserError"


def test_a_process_that_finds_another_run_than_the_command_says_so(work):
    """Files may have changed while a job waited in a queue, or another machine has others."""
    file = work.folder / "0" / "run.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"identity": "expected"}))
    failure = work(lambda run: pytest.fail("begun"))
    assert failure["error"] == "UserError" and "\n" not in failure["message"]
    assert failure["message"].startswith(
        f"{about['identity']} here, expected for the command: data, weights or settings"
    )


def test_before_the_time_limit_the_run_stops_and_submitit_queues_it_again(work):
    heard = []

    def limit(settings):
        signal.raise_signal(REQUEUE)

    before = signal.signal(REQUEUE, lambda *_: heard.append(1))
    try:
        assert work(limit) == {"error": "Stopped", "message": REQUEUE.name}
    finally:
        signal.signal(REQUEUE, before)
    assert heard == [1]  # by whoever listened before the run did, after the run


def test_the_signal_of_a_time_limit_is_left_alone_where_nobody_listens():
    with STOP.listen():
        assert signal.getsignal(REQUEUE) is signal.SIG_DFL


def test_sys_exit_is_a_failed_run_like_any_other(runs_folder, monkeypatch, capsys):
    monkeypatch.setattr(train_run, "train_and_evaluate", lambda *_: sys.exit(3))
    run = Run.prepare(load_settings(TINY))
    execute_run(run)
    assert report_failures([run]) == EXIT_FAILED
    assert "SystemExit: 3" in capsys.readouterr().err


def test_a_process_that_died_over_a_forced_run_is_told_though_an_old_result_is_there(runs_folder, capsys):
    run = Run.prepare(load_settings([*TINY, "force=true"]))
    execute_run(run)
    note_failures([run], [None])
    assert report_failures([run]) == EXIT_FAILED
    assert "Killed: ended without a result" in capsys.readouterr().err


def test_exit_codes_of_what_other_processes_tell(runs_folder, capsys):
    run = Run.prepare(load_settings(TINY))
    expected = {"Stopped": EXIT_STOPPED, "RunHeldElsewhere": EXIT_ELSEWHERE, "UserError": EXIT_USER}
    for error, code in {**expected, "ValueError": EXIT_FAILED}.items():
        failures[run.record.folder] = {"error": error, "message": "SIGTERM"}
        assert report_failures([run]) == code
    assert "by SIGTERM; the same command resumes it" in capsys.readouterr().err


def test_a_thread_hears_no_ctrl_c_nor_do_its_processes():
    masks = call_in_thread(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [])).result()
    assert masks == {signal.SIGINT}
    with pytest.raises(Stopped):
        call_in_thread(lambda: (_ for _ in ()).throw(Stopped("SIGTERM"))).result()
