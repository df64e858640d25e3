"""The command's side: it checks a launcher, hands the runs to it and waits for all of them."""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import strftime

import psutil
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import MissingConfigException
from hydra.types import HydraContext
from omegaconf import DictConfig

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import describe_config_error
from dual_lora.lab.config.outside.plugins import locate_plugins
from dual_lora.lab.config.overrides import parse_override
from dual_lora.lab.config.paths import list_choices
from dual_lora.lab.config.recorded import format_settings
from dual_lora.lab.errors import RunHeldElsewhere, Stopped, UserError, get_first_line, require, suggest_name
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.execute import KILLED, describe_failure, failures
from dual_lora.lab.study.launch.process import end_with_command, execute_launched_run
from dual_lora.lab.system.environment import hide_bars
from dual_lora.lab.system.files import translate_write_errors

IN_PROCESS = "basic"  # Hydra's name for: in this process, one after the other
EXTRAS = {"ray_cluster": "ray"}  # of pyproject.toml; all others need `launchers`


def parse_key(word: str) -> str:
    """Return the setting that a word of the command line names, without Hydra's + or ~."""
    return word.partition("=")[0].lstrip("+~")


def select_launcher_words(words: list[str]) -> list[str]:
    """Return the words of a command line that choose or set a launcher."""
    return [word for word in words if parse_key(word).replace("/", ".").startswith("hydra.launcher")]


def get_launcher_name(words: list[str]) -> str:
    """Return the launcher that a command line chooses."""
    names = [str(parse_override(word).value()) for word in words if parse_key(word) == "hydra/launcher"]
    return names[-1] if names else IN_PROCESS


def uses_launcher(words: list[str]) -> bool:
    """Return whether runs are done outside of this process."""
    return get_launcher_name(words) != IN_PROCESS


def compose_launcher(words: list[str]) -> DictConfig:
    """Return Hydra's own config with these overrides."""
    GlobalHydra.instance().clear()
    initialize_config_dir(str(paths.CONF), version_base="1.3")  # stays: a launcher composes with it
    return compose("launch", overrides=words, return_hydra_config=True)


def check_launcher(words: list[str]) -> None:
    """Refuse a launcher that is not known or not installed, and settings that it does not have.

    Raises:
        UserError: what is wrong, and the remedy.
    """
    words = select_launcher_words(words)
    if not words:
        return
    name, known = get_launcher_name(words), [IN_PROCESS, *list_choices("hydra/launcher")]
    hint = suggest_name(name, known)
    require(name in known, f"hydra/launcher={name}: no such launcher.{hint} Known: {', '.join(known)}")
    has = list_launcher_settings(name)
    for key in map(parse_key, words):
        part = key.removeprefix("hydra.launcher.").partition(".")[0]
        known_key = key == "hydra/launcher" or part in has
        require(known_key, f"{key}: launcher {name} has no such setting.{suggest_name(part, has)}")
    try:
        compose_launcher(words)
    except Exception as error:  # Hydra and OmegaConf raise a dozen kinds over what they are given
        raise UserError(describe_config_error(error)) from error


def list_launcher_settings(name: str) -> list[str]:
    """Return the names of a launcher's settings.

    Raises:
        UserError: it is not installed.
    """
    try:
        return list(compose_launcher([f"hydra/launcher={name}"]).hydra.launcher)
    except MissingConfigException as error:
        extra = EXTRAS.get(name, "launchers")
        raise UserError(f"hydra/launcher={name}: not installed; pip install -e '.[{extra}]'") from error


def launch_runs(runs: list[Run], words: list[str]) -> None:
    """Hand the runs that are not finished to the launcher that `words` choose, and wait for all of them. Why one did
    not finish is kept for `report_failures`.

    Raises:
        UserError: the launcher does not take them.
        Stopped: a stop was asked for; it has reached the jobs, and they have ended.
    """
    missing = [run for run in runs if run.is_pending]
    if not missing:
        return
    folder = prepare_launch_folder(missing)
    print(f"{len(missing)} of {len(runs)} runs handed to {get_launcher_name(words)}, logs below {folder}", flush=True)
    started = call_in_thread(partial(hand_to_launcher, len(missing), words, folder))
    try:
        returned = started.result()
    except Stopped as stopped:
        (folder / "stop").touch()
        print(f"\n{stopped}: the runs are asked to stop; press Ctrl-C again to end at once", file=sys.stderr)
        with suppress(Exception):
            started.result()
        raise
    note_failures(missing, returned)
    if all(done and done.return_value is None for done in returned):
        shutil.rmtree(folder, ignore_errors=True)


def note_failures(runs: list[Run], returned: list[JobReturn | None]) -> None:
    """Keep why runs did not finish. Nothing is known of a run whose process died."""
    for run, done in zip(runs, returned, strict=True):
        failure = done.return_value if done else None
        if done is None and run.settings.force:  # an old result says nothing of this attempt
            failure = KILLED
        if failure:
            failures[run.record.folder] = failure
        if failure and failure["error"] == RunHeldElsewhere.__name__ and len(runs) == 1:
            print(describe_failure(run, failure), file=sys.stderr)


def prepare_launch_folder(runs: list[Run]) -> Path:
    """Return the new folder of a launch, with the settings of every run in it.

    Raises:
        UserError: it cannot be written.
    """
    place = paths.RUNS.resolve() / ".multirun"
    with translate_write_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=strftime("%Y-%m-%d_%H-%M-%S_"), dir=place))
        for number, run in enumerate(runs):
            (folder / str(number)).mkdir()
            (folder / str(number) / "config.yaml").write_text(format_settings(run.settings), "utf-8")
            about = {"identity": run.identity, "differences": run.differences}
            (folder / str(number) / "run.json").write_text(json.dumps(about), "utf-8")
        command = {"pid": os.getpid(), "since": psutil.Process().create_time(), "host": platform.node()}
        command |= {"plugins": locate_plugins(), "settings": list(map(str, paths.own_folders))}
        (folder / "command.json").write_text(json.dumps(command), "utf-8")
    return folder


def call_in_thread(call: Callable[[], object]) -> Future:
    """Run a call in a thread and return its future. The thread and the processes it starts ignore Ctrl-C; this process
    receives it and passes it on to them."""
    done: Future = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def name_sweep_folder(folder: Path) -> str:
    """Return the override by which a launcher writes below a folder. Its jobs compose again, from overrides alone."""
    text = str(folder).replace("${", r"\${")  # a path, whatever OmegaConf would read into it
    return f"hydra.sweep.dir={QuotedString(text, Quote.single).with_quotes()}"


def hand_to_launcher(number: int, words: list[str], folder: Path) -> list[JobReturn | None]:
    """Return what the launcher returns for each job; None for one whose process died.

    Raises:
        UserError: the launcher does not take them.
    """
    config = compose_launcher([*words, name_sweep_folder(folder)])
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
    launcher = Plugins.instance().instantiate_launcher(context, partial(execute_launched_run, folder), config)
    if isinstance(settings := getattr(launcher, "joblib", None), dict):
        identity = os.getpid(), psutil.Process().create_time()
        settings |= {"initializer": end_with_command, "initargs": identity}
    # A new process must find this tree, wherever it starts. Progress bars of several runs would fill one screen.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))
    hide_bars()
    try:
        with wait_for_all_jobs():
            return launcher.launch([[] for _ in range(number)], initial_job_idx=0)
    except BrokenExecutor:  # joblib ends all its processes when one of them dies
        return [None] * number
    except (TimeoutError, multiprocessing.TimeoutError) as error:  # joblib's limit for one run; it gives up on all then
        (folder / "stop").touch()
        limit = "hydra.launcher.timeout: a run took longer, so all were ended; leave it out, or give more seconds"
        raise UserError(limit) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"hydra/launcher={get_launcher_name(words)}: {get_first_line(error)}") from error


def wait_for_all_jobs() -> AbstractContextManager:
    """Return a context in which submitit, if installed, waits for all jobs even if one of them fails."""
    if not find_spec("submitit"):
        return nullcontext()
    from dual_lora.lab.study.launch.slurm import wait_for_every_job

    return wait_for_every_job()
