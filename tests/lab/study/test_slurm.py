"""A real Slurm of one node, from Debian's packages unpacked into a temporary folder; `make test-slurm`. It has no
accounting, so what a cluster's sacct tells is not tested here."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.places import ROOT

pytestmark = pytest.mark.slow
PACKAGES = ["slurmctld", "slurmd", "slurm-client"]
RUN = ["model=tiny-roberta", "task=demo/sentiment", "eval.max_examples=4", "eval.before=false", "wandb.mode=disabled"]
# A node without GPUs, of whatever size.
SLURM = ["hydra/launcher=slurm", "hydra.launcher.partition=main", "hydra.launcher.mem_gb=null"]
SLURM += ["hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PluginDir={plugins}
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.log
MpiDefault=none
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def until(what: str, holds: Callable[[], object], seconds: float = 240) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s: {what}"
        time.sleep(0.5)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


def unpacked(here: Path) -> Path:
    """Return the folder that holds Debian's packages and what they need, unpacked, not installed."""
    get = ["apt-get", "install", "--download-only", "--yes", "--no-install-recommends"]
    get += ["-o", f"Dir::Cache::archives={here}/", "-o", "Debug::NoLocking=1", *PACKAGES]
    done = subprocess.run(get, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"apt-get cannot fetch {', '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")
    for file in here.glob("*.deb"):
        subprocess.run(["dpkg", "-x", file, here / "root"], check=True)
    return here / "root"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Path]:
    """A running Slurm, whose programs this process and its children find; its folder."""
    for need in ("apt-get", "dpkg"):
        if not shutil.which(need):
            pytest.skip(f"needs {need}")
    if os.geteuid():
        pytest.skip("needs root: slurmd starts jobs as their user")
    here = tmp_path_factory.mktemp("slurm")
    root = unpacked(here)
    libraries = next(root.glob("usr/lib/*-linux-gnu"))
    for name in ("state", "spool"):
        (here / name).mkdir()
    values = {"host": socket.gethostname().partition(".")[0], "here": here, "plugins": libraries / "slurm-wlm"}
    values |= {"ctld": free_port(), "slurmd": free_port(), "cpus": os.cpu_count()}
    (here / "slurm.conf").write_text(CONF.format(**values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(here / "slurm.conf"))
        patch.setenv("LD_LIBRARY_PATH", f"{libraries}:{libraries / 'slurm-wlm'}")
        patch.setenv("PATH", f"{root / 'usr/bin'}:{root / 'usr/sbin'}:{os.environ['PATH']}")
        step = next((root / "usr/sbin").glob("slurmstepd*"))
        commands = [["slurmctld-wlm", "-D"], ["slurmd-wlm", "-D", "-d", str(step)]]
        daemons = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
        try:
            until("a node is idle", lambda: "idle" in told("sinfo", "--noheader", "--format=%T"), 60)
            yield here
        finally:
            told("scancel", "--user=root")
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(60)


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def start(*words: str) -> subprocess.Popen:
    given = {word.partition("=")[0] for word in words}
    command = [
        sys.executable,
        "train.py",
        "-m",
        *(w for w in [*SLURM, *RUN] if w.partition("=")[0] not in given),
        *words,
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def jobs() -> list[str]:
    return told("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()


def waiting(job: str) -> bool:
    return "PENDING" in told("squeue", "--noheader", f"--jobs={job}", "--format=%T")


def test_what_slurm_refuses_is_told(slurm, runs_folder):
    """After sbatch's own words, which submitit prints."""
    command = start("hydra.launcher.partition=nowhere")
    out, err = command.communicate(timeout=300)
    assert command.returncode == 2 and "Traceback" not in err, err
    assert "train.py: hydra/launcher=slurm: sbatch: error: invalid partition specified: nowhere" in err, err


def test_one_of_three_jobs_fails(slurm, runs_folder):
    """A rank of 1 for one module cannot be shared between two groups, which the job finds out."""
    command = start("train.max_steps=2", "method=lora,dual_lora,dora", "+method.peft.rank_pattern={query:1}")
    out, err = command.communicate(timeout=500)
    print(out, err)
    assert "3 of 3 runs handed to slurm" in out
    assert command.returncode == 2 and "2 of 3 runs finished" in err, err
    assert "dual_lora_s0" in err and "rank_pattern['query']=1: expected an integer of at least 2" in err
    assert len(list(runs_folder.glob("adhoc/*/result.json"))) == 2
    assert len(list(runs_folder.glob(".multirun/*/.submitit/*/*_log.out"))) == 3


@pytest.mark.parametrize("how", ["TERM", "scancel", "USR2"])
def test_a_preempted_job_leaves_a_checkpoint_and_goes_on(slurm, runs_folder, how):
    """TERM is what preemption sends first, scancel adds KILL after KillWait; after USR2, which a time limit sends,
    the job itself is queued again and goes on without a further command."""
    words = ["train.max_steps=150", "method=lora", f"seed={len(how)}"]
    command = start(*words)
    until("steps are logged", lambda: [p for p in runs_folder.glob("adhoc/*/metrics.jsonl") if "loss" in p.read_text()])
    (job,) = jobs()
    (folder,) = runs_folder.glob("adhoc/*")
    told("scancel", job, *([] if how == "scancel" else [f"--signal={how}"]))
    if how == "USR2":
        until("it is queued again", lambda: "DUE TO JOB REQUEUE" in log(runs_folder) and waiting(job))
        assert "SIGUSR2: stopping after this step" in log(runs_folder) and list(folder.glob("checkpoints/*/"))
        told("scontrol", "update", f"JobId={job}", "StartTime=now")  # else in two minutes
    out, err = command.communicate(timeout=500)
    print(out, err, log(runs_folder))
    if how != "USR2":
        assert command.returncode == 3 and "by SIGTERM; the same command resumes it" in err, err
        assert list(folder.glob("checkpoints/*/")) and not (folder / "result.json").exists()
        again = start(*words)
        out, err = again.communicate(timeout=500)
        assert again.returncode == 0, err
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 150 and not list(folder.glob("checkpoints"))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(set(steps)) >= 15


def log(runs_folder: Path) -> str:
    return "".join(p.read_text() for p in runs_folder.glob(".multirun/*/.submitit/*/*_log.out"))


def test_a_job_that_is_killed_without_a_word_is_told(slurm, runs_folder):
    command = start("train.max_steps=100", "method=lora,dual_lora")
    own = "adhoc/tiny-roberta_demo-sentiment_lora_s0*/.lock"
    until("the run is begun", lambda: [p for p in runs_folder.glob(own) if p.read_text()])
    (lock,) = runs_folder.glob(own)
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    out, err = command.communicate(timeout=500)
    print(out, err)
    assert command.returncode == 1 and f"{lock.parent.name}: Killed: ended without a result" in err
    assert "1 of 2 runs finished" in err
