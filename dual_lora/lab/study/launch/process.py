"""The launched process's side: it executes one run of a launch, and stops when the command asks for that or is gone."""

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import tasks
from dual_lora.lab.config import paths
from dual_lora.lab.config.outside.plugins import check_plugins, get_plugin_word, import_plugin
from dual_lora.lab.config.recorded import load_recorded_settings
from dual_lora.lab.errors import EXIT_STOPPED, Stopped, require
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.execute import describe_error, execute_run
from dual_lora.lab.system.environment import isolate_environment
from dual_lora.lab.system.libraries import hide_foreign_warnings
from dual_lora.lab.system.signals import REQUEUE, STOP

# Why this process was asked to stop. It then takes no more runs.
stop_reasons: list[str] = []
# Held while this process executes a run.
run_in_progress = threading.Lock()


def execute_launched_run(folder: Path, config: DictConfig) -> dict[str, str] | None:
    """Execute one run in a launcher's process and return why it did not finish; None if it did."""
    paths.RUNS = folder.parents[1]
    hide_foreign_warnings()
    try:
        isolate_environment()
        restore_outside(folder)
        with run_in_progress, listen_in_process(), stop_on_file(folder / "stop"):
            return execute_run(prepare_launched_run(folder / str(HydraConfig.get().job.num)))
    except Stopped as stopped:
        if stopped.by == REQUEUE.name:
            with suppress(Exception):
                signal.raise_signal(REQUEUE)  # submitit has the job queued again and ends this process
        stop_reasons.append(stopped.by)
        return describe_error(stopped)
    except Exception as error:
        return describe_error(error)


def restore_outside(folder: Path) -> None:
    """Use what the command of a launch named from outside of the repository: folders of settings files, and code, which
    is imported as it was then.

    Raises:
        UserError: the code is gone or changed.
    """
    command = json.loads((folder / "command.json").read_text("utf-8"))
    paths.own_folders[:] = map(Path, command["settings"])
    named = command["plugins"]
    for name, about in named.items():
        if name not in tasks.plugins:  # a launcher may use the command's own process
            import_plugin(get_plugin_word(about))
    check_plugins(named, "the command")


def prepare_launched_run(place: Path) -> Run:
    """Return the run whose settings are in a folder of a launch.

    Raises:
        UserError: it is another run than it was for the command, or see `Run.prepare`.
    """
    about = json.loads((place / "run.json").read_text("utf-8"))
    run, expected = Run.prepare(load_recorded_settings(place), about["differences"]), about["identity"]
    require(
        run.identity == expected,
        f"{run.identity} here, {expected} for the command: data, weights or settings files have changed since, or are "
        "others on this machine; run the command again",
    )
    return run


def listen_in_process() -> AbstractContextManager:
    """Return a context in which signals stop this process's run. A launcher that does one run at a time may use a
    thread of the command's own process, which already listens; Python allows only the main thread to handle signals."""
    main = threading.current_thread() is threading.main_thread()
    return STOP.listen() if main else nullcontext()


@contextmanager
def stop_on_file(file: Path) -> Iterator[None]:
    """Stop this process's work, as a signal would, when the file exists or the command that started it is gone.

    Raises:
        Stopped: that is so already, or an earlier run of this process was stopped.
    """
    if stop_reasons or file.exists() or is_command_gone(file.parent):
        raise Stopped(*stop_reasons[:1] or ["the command that started it"])
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            if file.exists() or is_command_gone(file.parent):
                if not STOP.asked:
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def is_command_gone(folder: Path) -> bool:
    """Return whether the command of a launch has ended, as far as this process can know: on its machine only."""
    try:
        command = json.loads((folder / "command.json").read_text("utf-8"))
        return command["host"] == platform.node() and is_process_gone(command["pid"], command["since"])
    except (OSError, ValueError, KeyError):  # the folder of a launch is removed only when its command is done with it
        return not folder.exists()


def is_process_gone(pid: int, since: float) -> bool:
    """Return whether a process of this machine, started at a time in seconds, has ended."""
    try:
        process = psutil.Process(pid)
        return process.create_time() != since or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_with_command(pid: int, since: float) -> None:
    """End this process of joblib's once the command that started it is gone and no run is in progress; joblib itself
    lets it wait for work for five minutes. A run in progress is stopped by `stop_on_file`."""

    def watch() -> None:
        while not is_process_gone(pid, since) or run_in_progress.locked():
            time.sleep(1)
        os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, daemon=True).start()
