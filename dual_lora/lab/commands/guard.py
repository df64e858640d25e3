"""What wraps every command: an exit code, and one line about whatever ended it.

Nothing here imports a heavy library, so that an error while one is imported is reported in one line as well.
"""

import atexit
import ctypes
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from dual_lora.lab.commands.screen import guard_screen
from dual_lora.lab.config import paths
from dual_lora.lab.config.outside.addresses import check_hub_address
from dual_lora.lab.config.paths import NOT_UTF8, is_utf8, resolve_path
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER,
    Stopped,
    UserError,
    describe_machine_error,
    get_first_line,
    require,
)
from dual_lora.lab.system.distributed import is_first_process, wait_for_first_process_error
from dual_lora.lab.system.environment import isolate_environment
from dual_lora.lab.system.signals import STOP

# Where libraries keep temporary files, models and data.
FOLDER_VARIABLES = ("TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


def describe_end(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message for the error that ended the command. If it is neither the user's nor the
    machine's error, it is a bug, and its traceback is printed first."""
    if isinstance(error, UserError):
        return EXIT_USER, str(error)
    if message := describe_machine_error(error):
        return EXIT_USER, message
    print(redact_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
    return EXIT_FAILED, f"{type(error).__name__}: {get_first_line(error)}; internal error, please report it"


def check_surroundings() -> None:
    """Check what the process was started with: its folder, its environment and the folder of runs.

    Raises:
        UserError: what is wrong and the remedy.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("the current folder no longer exists; change to another one (cd) and try again") from error
    require(sys.flags.optimize < 2, "PYTHONOPTIMIZE=2 (or -OO): transformers needs its docstrings; unset it")
    isolate_environment()
    check_hub_address()
    resolve_path("DUAL_LORA_RUNS", str(paths.RUNS))
    for name in FOLDER_VARIABLES:
        if value := os.environ.get(name):
            require(is_utf8(value), f"{name}={value[:80]}: {NOT_UTF8}; set another folder")


def run_guarded(name: str, command: Callable[..., int], *args: object) -> int:
    """Return what `command` returns; whatever else ends it is printed as one line, and its exit code returned."""
    try:
        with STOP.listen():
            check_surroundings()
            try:
                with nullcontext() if is_first_process() else redirect_stdout(io.StringIO()):
                    return command(*args)
            except Exception:
                if STOP.raised:  # the library that was interrupted raised an error of its own
                    return print_stop(name, Stopped(STOP.asked, STOP.can_resume))
                wait_for_first_process_error()
                raise
    except Exception as error:
        code, message = describe_end(error)
        print(f"{name}: {redact_secrets(message)}", file=sys.stderr)
        return code
    except (Stopped, KeyboardInterrupt) as stopped:
        return print_stop(name, stopped)


def print_stop(name: str, stopped: BaseException) -> int:
    """Print what stopped the work and what the same command does next, and return the exit code."""
    by, can_resume = (stopped.by, stopped.can_resume) if isinstance(stopped, Stopped) else ("SIGINT", True)
    restarts = "starts this run again from the beginning: a sharded model that is trained in full has no checkpoints"
    if is_first_process():
        then = "resumes from here" if can_resume else restarts
        if STOP.repeats:
            then = "starts with the first run again, since force=true does finished ones again"
        print(f"{name}: stopped by {by}; the same command {then}", file=sys.stderr)
    return EXIT_STOPPED


def run_command(command: Callable[..., int], *args: object) -> NoReturn:
    """Run `command` and exit. Skip Python's teardown if the caller is the top-level script; under a debugger, profiler
    or test, exit normally.

    Raises:
        SystemExit: with the exit code that `command` returns or that belongs to what ended it.
    """
    name = Path(sys.argv[0]).name
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the scripts block while they import this
        with guard_screen(name):
            code = run_guarded(name, command, *args)
    except (Stopped, KeyboardInterrupt) as stopped:  # before the work, or after it
        code = print_stop(name, stopped)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop
    if sys._getframe(1).f_back is None:
        exit_without_teardown(code)
    sys.exit(code)


def exit_without_teardown(code: int) -> NoReturn:
    """End the process as `multiprocessing` ends its own: wait for threads, call what `atexit` holds, flush, and leave.
    Python would then free the million objects of torch and transformers one by one, which takes two seconds."""
    with suppress(KeyboardInterrupt):
        threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or never open
            stream.flush()
    ctypes.pythonapi.fflush(None)  # what libraries in C have printed
    os._exit(code)
