"""Runs handed to a launcher of Hydra's: to processes of this machine, or to the jobs of a cluster.

Every launch has a folder of its own, removed when all its runs finished:

    runs/.multirun/WHEN_XXXX/
        N/config.yaml   the settings of run N, which its process reads, so that it does what was checked here
        .submitit/JOB/  what a job of Slurm prints, and how submitit hands it over (pickles)
        stop            made when the command is stopped: all runs of the launch then stop, wherever they are
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import strftime

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import MissingConfigException
from hydra.types import HydraContext
from omegaconf import DictConfig

from dual_lora.lab import cli, runs
from dual_lora.lab.disk import writing
from dual_lora.lab.runs import ROOT, Record
from dual_lora.lab.settings import Settings, UserError, first_line, nearest, require
from dual_lora.lab.stopping import REQUEUE, STOP, Stopped

HERE = "basic"  # Hydra's name for: in this process, one after the other
EXTRAS = {"ray_cluster": "ray"}  # of pyproject.toml; all others need `launchers`
# This process has been told to stop: it takes no more runs.
told: list[str] = []


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def chosen(words: list[str]) -> list[str]:
    """Return what of a command line chooses or sets a launcher."""
    return [word for word in words if key_of(word).replace("/", ".").startswith("hydra.launcher")]


def name_of(words: list[str]) -> str:
    """Return the launcher that a command line chooses."""
    names = [word.partition("=")[2] for word in words if key_of(word) == "hydra/launcher"]
    return names[-1] if names else HERE


def elsewhere(words: list[str]) -> bool:
    """Return whether runs are done outside of this process."""
    return name_of(words) != HERE


def composed(words: list[str]) -> DictConfig:
    """Return Hydra's own config with these overrides."""
    GlobalHydra.instance().clear()
    initialize_config_dir(str(cli.CONF), version_base="1.3")  # stays: a launcher composes with it
    return compose("launch", overrides=words, return_hydra_config=True)


def check(words: list[str]) -> None:
    """Refuse a launcher that is not known or not installed, and settings that it does not have.

    Raises:
        UserError: what is wrong, and the mend.
    """
    words = [word for word in words if re.match(r"hydra[./]", key_of(word))]
    if not words:
        return
    name, known = name_of(words), [HERE, *cli.choices("hydra/launcher")]
    hint = nearest(name, known)
    require(name in known, f"hydra/launcher={name}: no such launcher.{hint} Known: {', '.join(known)}")
    has = settings_of(name)
    for key in map(key_of, words):
        part = key.removeprefix("hydra.launcher.").partition(".")[0]
        own = key == "hydra/launcher" or not chosen([key])
        require(own or part in has, f"{key}: launcher {name} has no such setting.{nearest(part, has)}")
        swept = key.replace("/", ".").startswith("hydra.sweeper") and name != HERE
        require(not swept, f"{key}: not with hydra/launcher={name}, which gets all runs at once")
    try:
        composed(chosen(words))
    except Exception as error:  # Hydra and OmegaConf raise a dozen kinds over what they are told
        raise UserError(cli.one_line(error)) from error


def settings_of(name: str) -> list[str]:
    """Return the names of a launcher's settings.

    Raises:
        UserError: it is not installed.
    """
    try:
        return list(composed([f"hydra/launcher={name}"]).hydra.launcher)
    except MissingConfigException as error:
        extra = EXTRAS.get(name, "launchers")
        raise UserError(f"hydra/launcher={name}: not installed; pip install -e '.[{extra}]'") from error


def launch(jobs: list[Settings], words: list[str]) -> None:
    """Hand the jobs that are not finished to the launcher that `words` choose, and wait for all of them. Why one did
    not finish is kept for `cli.conclude`.

    Raises:
        UserError: the launcher does not take them.
        Stopped: a stop was asked for; it has reached the jobs, and they have ended.
    """
    missing = [job for job in jobs if job.force or Record.of(job).result() is None]
    if not missing:
        return
    folder = prepared(missing)
    print(f"{len(missing)} of {len(jobs)} runs handed to {name_of(words)}, logs below {folder}", flush=True)
    started = aside(partial(hand_over, len(missing), words, folder))
    try:
        returned = started.result()
    except Stopped as stopped:
        (folder / "stop").touch()
        print(f"\n{stopped}: the runs are told to stop; once more ends at once", file=sys.stderr)
        with suppress(Exception):
            started.result()
        raise
    note(missing, returned)
    if all(done and done.return_value is None for done in returned):
        shutil.rmtree(folder, ignore_errors=True)


def note(jobs: list[Settings], returned: list[JobReturn | None]) -> None:
    """Keep why jobs did not finish; of one whose process died nothing is known."""
    for job, done in zip(jobs, returned, strict=True):
        failure = done.return_value if done else None
        if done is None and job.force:  # an old result says nothing of this try
            failure = cli.KILLED
        if failure:
            cli.unfinished[Record.of(job).folder] = failure
        if failure and failure["error"] == "Elsewhere" and len(jobs) == 1:
            print(f"done elsewhere: {Record.of(job).shown()}: {failure['message']}", file=sys.stderr)


def prepared(jobs: list[Settings]) -> Path:
    """Return the new folder of a launch, with the settings of every job in it."""
    place = runs.RUNS.resolve() / ".multirun"
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=strftime("%Y-%m-%d_%H-%M-%S_"), dir=place))
        for number, job in enumerate(jobs):
            (folder / str(number)).mkdir()
            (folder / str(number) / "config.yaml").write_text(yaml.safe_dump(asdict(job), sort_keys=False))
    return folder


def aside(call: Callable[[], object]) -> Future:
    """Return what a call comes to, made in a thread in which, and in whose processes, Ctrl-C is not heard: this process
    hears it and tells them."""
    done: Future = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def hand_over(number: int, words: list[str], folder: Path) -> list[JobReturn | None]:
    """Return what the launcher returns for each job; None for one whose process died.

    Raises:
        UserError: the launcher does not take them.
    """
    place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    config = composed([*words, f"hydra.sweep.dir='{place}'"])
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
    launcher = Plugins.instance().instantiate_launcher(context, partial(work, folder), config)
    # A process that starts anew finds this tree wherever it starts; bars of several runs would fill one screen.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with patient():
            return launcher.launch([[] for _ in range(number)], initial_job_idx=0)
    except BrokenExecutor:  # joblib ends all its processes when one of them dies
        return [None] * number
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"hydra/launcher={name_of(words)}: {first_line(error)}") from error


def patient() -> AbstractContextManager:
    """Return what has submitit, if it is installed, wait for all jobs, whatever becomes of one."""
    if not find_spec("submitit"):
        return nullcontext()
    from dual_lora.lab import waiting

    return waiting.patient()


def work(folder: Path, config: DictConfig) -> dict[str, str] | None:
    """Do a job in a launcher's process and return why it did not finish; None if it did."""
    runs.RUNS = folder.parents[1]
    try:
        settings = cli.recorded(folder / str(HydraConfig.get().job.num))
        with STOP.heard(), stopped_by(folder / "stop"):
            return cli.attempt(settings)
    except Stopped as stopped:
        if str(stopped) == REQUEUE.name:
            with suppress(Exception):
                signal.raise_signal(REQUEUE)  # submitit has the job queued again and ends this process
        told.append(str(stopped))
        return cli.reason(stopped)
    except Exception as error:
        return cli.reason(error)


@contextmanager
def stopped_by(file: Path) -> Iterator[None]:
    """Stop this process's work, as a signal would, when the file is made."""
    if told or file.exists():
        raise Stopped(*told[:1] or ["the command that started it"])
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            if file.exists():
                return None if STOP.asked else os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
